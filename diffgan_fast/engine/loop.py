"""The training loop that all methods share."""

from __future__ import annotations

import json
import math
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

import torch
from tqdm import tqdm

from diffgan_fast import random
from diffgan_fast.engine import checkpoint, distributed, precision
from diffgan_fast.engine.compiling import compiled
from diffgan_fast.engine.feed import Feed
from diffgan_fast.engine.gpu import Meter
from diffgan_fast.engine.method import Batch, Method
from diffgan_fast.engine.state import State
from diffgan_fast.engine.steps import Steps


class TrainingError(RuntimeError):
    """Training cannot go on: a loss is not finite, or memory is out."""


def out_of_memory(error: RuntimeError) -> bool:
    """Whether this is what torch raises where a device, or the CPU, has no memory left."""
    return isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)


class Loop:
    """Runs a method's steps from `state.step` to `config.steps`.

    Everything random in step s is a function of (seed, s): no generator state is kept, and a run that was stopped goes
    on bit for bit. Losses stay on the device until a row is logged. Of several processes each trains on its part of a
    batch, with the noise that the whole batch has there, and the main one writes.

    Args:
        state: of several processes `together`.
        on_log: called with each row that was written, in every process.
        on_sample: called at every `sample_every`-th step, in every process.
        on_evaluate: called at every `evaluate_every`-th step and at the last, in every process; what it gives, the same
            in all, is the row's "evaluation".
    """

    def __init__(
        self,
        method: Method,
        state: State,
        feed: Feed,
        folder: Path,
        seed: int,
        *,
        progress: bool = True,
        on_log: Callable[[dict], object] = lambda row: None,
        on_sample: Callable[[int], None] = lambda step: None,
        on_evaluate: Callable[[], dict] = dict,
    ):
        self.method, self.state, self.feed, self.folder = method, state, feed, folder
        self.config, self.progress = method.config, progress and distributed.is_main()
        self.part = distributed.share(self.config.batch_size)
        self.on_log, self.on_sample, self.on_evaluate = on_log, on_sample, on_evaluate
        self.steps = Steps.on(feed.device, method, state)
        self.seed_key = random.key(seed)
        self.seconds, self.meter = 0.0, Meter(feed.device)
        self._saved: int | None = None  # step of the last checkpoint
        self._pending: list[dict[str, torch.Tensor]] = []  # losses since the last row, still on the device
        self.unlogged: list[dict[str, float]] = []  # the same on the host, known to be finite
        self._since = 0.0

    def run(self) -> None:
        """Trains to the end. Ctrl-C and SIGTERM save a checkpoint and raise KeyboardInterrupt."""
        c, state = self.config, self.state
        for net in state.nets.values():
            net.train()
        bar = tqdm(total=c.steps, initial=state.step, desc=self.method.name, disable=not self.progress, leave=False)
        self._begin()
        forked = torch.random.fork_rng(devices=range(torch.cuda.device_count()))
        batches = self.feed.batches(range(state.step, c.steps), self.part)
        with forked, bar, self._interrupts(), compiled(state.nets, c.compile, self.feed.device), batches as ahead:
            stop = distributed.Stop()
            try:
                while state.step < c.steps:
                    self._step(bar, ahead)
                    if stop.agreed(self._interrupted):
                        raise KeyboardInterrupt
                if state.step != self._saved:
                    self.save()
            except KeyboardInterrupt:
                self.save()
                raise
            except distributed.ProcessLost as error:
                raise TrainingError(
                    f"{error} at step {state.step + 1}; {self._last_good()} ({error.__cause__})"
                ) from error
            finally:
                self.steps.release()

    @contextmanager
    def _interrupts(self) -> Iterator[None]:
        """Ctrl-C, and SIGTERM, take effect between steps: a step that was cut in two could not be resumed."""
        self._interrupted = False
        if threading.current_thread() is not threading.main_thread():
            yield  # only the main thread is interrupted, and may install handlers
            return

        def note(*_) -> None:
            self._interrupted = True

        before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _step(self, bar: tqdm, batches: Iterator[Batch]) -> None:
        c, state = self.config, self.state
        key = random.fold_in(self.seed_key, "step", state.step)
        random.seed_torch(random.fold_in(key, "torch", self.part.start), self.feed.device)  # for dropout and the like
        try:
            batch = next(batches)
            with precision.reduced(c.precision, self.feed.device):
                losses = self.steps(batch, key)
        except RuntimeError as error:
            if not out_of_memory(error):
                raise
            raise TrainingError(self._out_of_memory()) from error
        self._pending.append({k: v.detach() for k, v in losses.items()})
        state.step += 1
        bar.update()
        last = state.step == c.steps
        judged = c.evaluate_every and (last or state.step % c.evaluate_every == 0)
        if last or judged or state.step % c.log_every == 0:
            bar.set_postfix_str(self._log(bool(judged)))
        if c.sample_every and state.step % c.sample_every == 0 and not last:
            with self._aside():
                self.on_sample(state.step)
        if c.checkpoint_every and state.step % c.checkpoint_every == 0 and not last:
            self.save()

    def save(self) -> None:
        """Writes a checkpoint of the present step, once losses and weights are known to be finite."""
        self._settle()
        for name, net in self.state.nets.items():
            if not all(bool(p.isfinite().all()) for p in net.parameters()):
                self._fail(f"a weight of {name!r}", self.state.step)
        self._clock()
        facts = {"seconds": self.seconds, "unlogged": self.unlogged}
        distributed.from_main(lambda: checkpoint.save(self.folder, self.state, facts, self.config.keep))
        self._saved = self.state.step

    def restore(self) -> None:
        """Goes back to the last checkpoint of the run's folder."""
        facts = checkpoint.load(self.folder, self.state)
        self.seconds, self.unlogged, self._saved = facts["seconds"], facts["unlogged"], self.state.step
        self.meter.row(self.state.step * self.config.batch_size // distributed.size())  # images of others' energy

    @contextmanager
    def _aside(self) -> Iterator[None]:
        """For work that is not training: its seconds do not count, and nothing is compiled for it."""
        self._clock()
        with torch.compiler.set_stance("force_eager"):
            yield
        self._begin()

    def _begin(self) -> None:
        self.meter.start()
        self._since = time.perf_counter()

    def _clock(self) -> None:
        self.meter.stop()
        now = time.perf_counter()
        self.seconds, self._since = self.seconds + now - self._since, now

    def _settle(self) -> None:
        """Brings the losses since the last row to the host. TrainingError, in every process, if one is not finite."""
        first = self.state.step - len(self._pending) + 1
        if not self._pending:
            return
        values = [v.float() for losses in self._pending for v in losses.values()]
        flat = distributed.mean(torch.stack(values)).tolist() if values else []
        for step, losses in enumerate(self._pending, first):
            row = dict(zip(losses, flat[: len(losses)], strict=True))
            flat = flat[len(losses) :]
            for name, value in row.items():
                if not math.isfinite(value):
                    self._fail(name, step)
            self.unlogged.append(row)
        self._pending.clear()

    def _out_of_memory(self) -> str:
        c, how = self.config, getattr(self.config, "recompute", None)
        chain = ", or recompute='step' or an int" if how == "none" else ""
        return (
            f"out of memory at step {self.state.step + 1}: take a batch_size below {c.batch_size}{chain}; "
            f"dgf.plan({self.method.name!r}, …) says what fits, and batch_size='auto' takes what does"
        )

    def _fail(self, what: str, step: int) -> NoReturn:
        raise TrainingError(f"{what} is not finite at step {step}; {self._last_good()}")

    def _last_good(self) -> str:
        kept = checkpoint.steps(self.folder)
        where = self.folder / "checkpoints" / f"step-{kept[-1]}" if kept else "none was written yet"
        return f"last good checkpoint: {where}"

    def _log(self, judged: bool) -> str:
        """Writes the means of the losses since the last row as one row, with scores if it is `judged`."""
        self._settle()
        self._clock()
        images = self.state.step * self.config.batch_size
        means = {}
        for name in sorted({k for losses in self.unlogged for k in losses}):
            values = [losses[name] for losses in self.unlogged if name in losses]
            means[name] = sum(values) / len(values)
        self.unlogged = []
        row: dict[str, Any] = {
            "step": self.state.step,
            "images_seen": images,
            "seconds": round(self.seconds, 3),
            **means,
        }
        if doing := self.meter.row(images // distributed.size()):
            row["gpu"] = doing
        if judged:
            with self._aside():
                row["evaluation"] = self.on_evaluate()
        distributed.from_main(lambda: self._append(row))
        self.on_log(row)
        return " ".join(f"{k}={v:.3g}" for k, v in means.items())

    def _append(self, row: dict[str, Any]) -> None:
        with open(self.folder / "metrics.jsonl", "a") as f:
            f.write(json.dumps(row) + "\n")
