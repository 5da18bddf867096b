"""How a run's steps are run: as they are, or on CUDA as replays of CUDA graphs."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field

import torch

from diffgan_fast.engine import distributed
from diffgan_fast.engine.method import Batch, Method
from diffgan_fast.engine.state import State
from diffgan_fast.graphs import NotCapturable, Recorder
from diffgan_fast.random import Key


@dataclass
class _Kind:
    """A kind of step, and once it is recorded how to run it again."""

    rehearsals: int = 0
    replay: Callable[[], None] | None = None
    names: list[str] = field(default_factory=list)
    values: torch.Tensor | None = None  # of the names
    updates: dict[str, int] = field(default_factory=dict)  # by how much the counts of updates grow
    later: list[Callable[[Key], None]] = field(default_factory=list)


class Steps:
    """Runs the steps of a method.

    With a recorder, each kind of step is captured in a graph. Replays see the batch, the key, learning rates and
    weights of averages in tensors that are filled before them: a replayed step does what it does as it is, with the
    same random numbers. Where a step cannot be captured, the run goes on without graphs, and a warning says why.

    Args:
        rehearsals: steps of each kind that run as they are at first: libraries choose their algorithms, caches fill.
    """

    def __init__(self, method: Method, state: State, recorder: Recorder | None = None, rehearsals: int = 2):
        self.method, self.state, self.recorder, self.rehearsals = method, state, recorder, rehearsals
        self._kinds: dict[Hashable, _Kind] = {}
        self._batch: Batch | None = None  # where replays find theirs
        self._key: torch.Tensor | None = None

    @classmethod
    def on(cls, device: torch.device, method: Method, state: State) -> Steps:
        """A run's steps on a device: in CUDA graphs, if its config wants them and it is a CUDA device."""
        if device.type != "cuda" or not method.config.cuda_graphs:
            return cls(method, state)
        made = cls(method, state, Recorder(device))
        if distributed.size() > 1:
            made._give_up("several processes exchange gradients")
        return made

    def __call__(self, batch: Batch, key: int) -> dict[str, torch.Tensor]:
        """One step: the scalars to log."""
        if self.recorder is not None:
            try:
                return self._recorded(batch, key, self.recorder)
            except NotCapturable as error:
                self._give_up(str(error))
        return self.method.step(self.state, batch, key)

    def _recorded(self, batch: Batch, key: int, recorder: Recorder) -> dict[str, torch.Tensor]:
        state = self.state
        batch, device_key = self._fill(batch, key)
        for name in state.optimizers:
            state.number(name)
        averages = tuple(state.averages_next(name) for name in state.optimizers)
        kind = self._kinds.setdefault((self.method.phase(state.step), averages), _Kind())
        if kind.rehearsals < self.rehearsals:
            kind.rehearsals += 1
            state.later = None
            with recorder.rehearsal():
                losses = self.method.step(state, batch, device_key)
            return losses
        if kind.replay is None:
            self._record(kind, batch, device_key, recorder)
        else:
            for name, more in kind.updates.items():
                state.updates[name] += more
        assert kind.replay is not None and kind.values is not None
        kind.replay()
        for run in kind.later:
            run(key)
        return dict(zip(kind.names, kind.values.clone().unbind(), strict=True))

    def _fill(self, batch: Batch, key: int) -> tuple[Batch, torch.Tensor]:
        """The batch and the key in the tensors that graphs read."""
        mine = self._batch
        if mine is None or mine.x.shape != batch.x.shape or (mine.labels is None) != (batch.labels is None):
            if not self._kinds:
                self.state.numbers_on_device()
            self._kinds.clear()
            labels = None if batch.labels is None else batch.labels.clone()
            mine = self._batch = Batch(batch.x.clone(), labels, batch.first_sample)
            self._key = torch.zeros((), dtype=torch.int64, device=batch.x.device)
        else:
            mine.x.copy_(batch.x)
            if mine.labels is not None and batch.labels is not None:
                mine.labels.copy_(batch.labels)
        assert self._key is not None
        return mine, self._key.fill_(key)

    def _record(self, kind: _Kind, batch: Batch, key: torch.Tensor, recorder: Recorder) -> None:
        state = self.state
        before = dict(state.updates)
        state.later = kind.later

        def step() -> torch.Tensor:
            losses = self.method.step(state, batch, key)
            kind.names = list(losses)
            return torch.stack([v.detach().float() for v in losses.values()])

        try:
            kind.replay, kind.values = recorder.record(step)
        except (RuntimeError, NotCapturable) as error:
            if isinstance(error, torch.OutOfMemoryError):
                raise
            state.updates.update(before)
            raise NotCapturable(str(error).splitlines()[0]) from error
        finally:
            state.later = None
        kind.updates = {name: count - before[name] for name, count in state.updates.items()}

    def release(self) -> None:
        """Lets go of the graphs and their memory; the steps to come are recorded anew."""
        self._kinds.clear()
        self._batch = self._key = None

    def _give_up(self, why: str) -> None:
        warnings.warn(f"the steps of {self.method.name!r} run without CUDA graphs: {why}", stacklevel=3)
        self.recorder, self.state.captured = None, False
        self._kinds.clear()
