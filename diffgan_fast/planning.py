"""What a run will take: memory and time of a step, measured on short chains and extrapolated to the whole one.

With n steps in the chain, the peak memory of recompute="none" is a + b n (b: the activations of a run of the network),
that of "step" a' + s n (s: a state x_t), that of an int k a' + s (n / k + k); times are straight lines in n.
"""

from __future__ import annotations

import dataclasses
import math
import time
import weakref
from collections.abc import Callable, Hashable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from diffgan_fast import random, report
from diffgan_fast.engine import Batch, Method, TrainingError, out_of_memory, precision, sample_group
from diffgan_fast.engine.memory import free_memory
from diffgan_fast.run import build

SHARE = 0.9  # of the free memory that a run may take: workspaces of libraries come on top of what is counted
SHORT, LONG = 2, 6  # steps of the chains that are measured
TRIES = 3  # timed steps of a kind
PHASED = 240  # steps whose kinds are counted: a multiple of every usual interval of a lazy penalty


@dataclasses.dataclass(frozen=True)
class Row:
    """One way to run a step: peak memory in bytes above what the process holds now, and seconds a step.

    Both are math.inf for plain autograd of which not even a short chain fits.
    """

    recompute: str | int | None
    peak: float
    seconds: float


@dataclasses.dataclass(frozen=True)
class Plan:
    """What `dgf.plan` found. `rows` has one row for each `recompute`, the fastest first; `print` shows it.

    Attributes:
        method, batch_size, steps, device: what was asked for.
        free: bytes of memory that are free on the device, once the data are there.
        recompute: the fastest that fits, or None if none does (or the method has no chain).
    """

    method: str
    batch_size: int
    steps: int
    device: torch.device
    free: int
    rows: tuple[Row, ...]

    def fits(self, row: Row) -> bool:
        return row.peak <= SHARE * self.free

    @property
    def recompute(self) -> str | int | None:
        return next((row.recompute for row in self.rows if self.fits(row)), None)

    def __str__(self) -> str:
        columns = {"recompute": "recompute", "memory": "peak memory", "step": "s/step", "run": "run", "fits": "fits"}
        rows: list[dict[str, Any]] = [
            {
                "recompute": "–" if row.recompute is None else str(row.recompute),
                "memory": f"{row.peak / 2**20:,.0f} MiB" if math.isfinite(row.peak) else "–",
                "step": f"{row.seconds:.3g}" if math.isfinite(row.seconds) else "–",
                "run": f"{row.seconds * self.steps / 60:,.1f} min" if math.isfinite(row.seconds) else "–",
                "fits": "yes" if self.fits(row) else "no",
            }
            for row in self.rows
        ]
        head = f"{self.method}, batch {self.batch_size}, {self.device}, {self.free / 2**20:,.0f} MiB free"
        return f"{head}\n{report.table(rows, columns)}"


def measure(
    method: Method,
    networks: Callable[[], dict],
    seed: int,
    device: torch.device,
    tries: int = TRIES,
    taken: int = 0,
) -> Plan:
    """The plan of a method with its config's batch size. `networks` gives the networks that are not made anew.

    Of `tries` timed steps the fastest counts; with none, all seconds are 0. `taken` bytes of the free memory are
    those that the data will take. TrainingError if even a short chain, or a method's step, does not fit.
    """
    c: Any = method.config
    n = c.batch_size

    def probe(**changes: Any) -> tuple[float, float]:
        if hasattr(c, "fakes"):
            changes["fakes"] = n  # they are drawn once, before the first step
        if hasattr(c, "critic_steps"):
            changes["critic_steps"] = 0  # the first steps, of the critic alone, take least
        short = type(method)(dataclasses.replace(c, **changes), method.shape, method.num_classes)
        try:
            return _probe(short, networks(), seed, device, tries)
        except RuntimeError as error:
            if not out_of_memory(error):
                raise
            if changes.get("recompute") == "none":
                return math.inf, math.inf  # it is the others that may fit
            raise _too_large(n, device) from error

    if not hasattr(c, "recompute"):  # the method has no chain
        rows = [Row(None, *probe())]
    else:
        steps = c.sample_steps or c.T
        short, long = min(SHORT, steps), min(LONG, steps)
        found = {
            how: [probe(recompute=how, sample_steps=s, grad_steps=None) for s in (short, long)]
            for how in ("none", "step", SHORT)
        }
        rows = _extrapolated(found, steps, c.grad_steps or steps, short, long, state=4 * n * math.prod(method.shape))
    free = free_memory(device) - taken
    return Plan(method.name, n, c.steps, device, free, tuple(sorted(rows, key=lambda r: r.seconds)))


def _extrapolated(found, steps, carrying, short, long, state) -> list[Row]:
    """Rows for a chain of so many steps, of which the last `carrying` have gradients, from what short ones take."""
    width = max(long - short, 1)
    slope = {how: (at_long[1] - at_short[1]) / width for how, (at_short, at_long) in found.items()}
    # an interval of 2 runs every second step once more
    forward = max(2 * (slope[SHORT] - slope["step"]), 0.0)

    def seconds(how, extra=0.0):
        return max(found[how][1][1] + slope[how] * (carrying - long) + forward * (steps - carrying) + extra, 0.0)

    (at_short, _), (at_long, _) = found["none"]
    if math.isinf(at_long):
        plain = Row("none", math.inf, math.inf)
    else:
        plain = Row("none", round(at_long + (at_long - at_short) / width * (carrying - long)), seconds("none"))
    k = math.isqrt(carrying)
    kept = found["step"][1][0] - long * state
    return [
        plain,
        Row("step", round(kept + carrying * state), seconds("step")),
        Row(k, round(kept + (math.ceil(carrying / k) + k) * state), seconds("step", forward * carrying * (k - 1) / k)),
    ]


def largest_batch(
    method: Method, networks: Callable[[], dict], seed: int, device: torch.device, most: int, taken: int = 0
) -> int:
    """The largest batch, up to `most`, whose step fits into the memory that is free but for `taken` bytes.

    TrainingError if not even 1 does.
    """

    def peak(n: int) -> float:
        smaller = type(method)(dataclasses.replace(method.config, batch_size=n), method.shape, method.num_classes)
        plan = measure(smaller, networks, seed, device, tries=0)
        how = getattr(method.config, "recompute", None)
        same = [row for row in plan.rows if row.recompute == how]
        # another interval than the one that is measured: as a kept state each step, which takes no less
        found = (same or [row for row in plan.rows if row.recompute == "step"])[0].peak
        if math.isinf(found):
            raise _too_large(n, device)
        return found

    low, high = peak(4), peak(8)
    each = max((high - low) / 4, 1.0)
    room = SHARE * (free_memory(device) - taken) - (low - 4 * each)
    if room < each:
        raise TrainingError(f"not even one sample fits into the free memory of {device}")
    fitting = max(1, min(most, int(room / each)))
    group = sample_group(method.networks(networks()).values())
    return fitting if fitting < group else fitting - fitting % group


def _too_large(n: int, device: torch.device) -> TrainingError:
    return TrainingError(f"a step at batch_size {n} does not fit into the memory of {device}: give a smaller one")


def _probe(
    method: Method, networks: dict[str, nn.Module], seed: int, device: torch.device, tries: int
) -> tuple[int, float]:
    """Peak memory above networks and optimisers, and a step's mean seconds over its kinds, on a batch of noise."""
    state, key, n = build(method, networks, seed, device), random.key(seed), method.config.batch_size
    for net in state.nets.values():
        net.train()
    x = random.normal((n, *method.shape), key, device=device).clamp(-1, 1)
    if method.config.channels_last and x.dim() == 4:
        x = x.contiguous(memory_format=torch.channels_last)
    batch = Batch(x, torch.arange(n, device=device) % method.num_classes if method.num_classes else None)
    with TemporaryDirectory() as folder, torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        method.prepare(state, key, Path(folder))
        peak, total, phases = 0, 0.0, _phases(method)
        with precision.reduced(method.config.precision, device):
            for numbers in phases:
                state.step = numbers[0]
                peak = max(peak, peak_memory(lambda: method.step(state, batch, key), device))
                fastest = min((_seconds(lambda: method.step(state, batch, key)) for _ in range(tries)), default=0.0)
                total += fastest * len(numbers)
        return peak, total / sum(map(len, phases))


def _phases(method: Method) -> list[list[int]]:
    """The first steps of a run, PHASED at most, sorted by what they do: with a lazy penalty, or without one."""
    found: dict[Hashable, list[int]] = {}
    for number in range(max(1, min(method.config.steps, PHASED))):
        found.setdefault(method.phase(number), []).append(number)
    return list(found.values())


def _seconds(step: Callable[[], dict[str, torch.Tensor]]) -> float:
    started = time.perf_counter()
    float(next(iter(step().values())).detach())  # waits for the device
    return time.perf_counter() - started


def peak_memory(call: Callable[[], object], device: torch.device) -> int:
    """Bytes that a call has at most beside what there was before."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        call()
        return torch.cuda.max_memory_allocated(device) - before
    with _Alive() as alive:
        call()
    return alive.peak


class _Alive(TorchDispatchMode):
    """Counts the bytes of tensors that live at the same time, of those that ops made since it was entered."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._known: weakref.WeakSet[torch.UntypedStorage] = weakref.WeakSet()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        before = [v.untyped_storage() for v in tree_leaves((args, kwargs)) if isinstance(v, torch.Tensor)]
        out = func(*args, **(kwargs or {}))
        for storage in (v.untyped_storage() for v in tree_leaves(out) if isinstance(v, torch.Tensor)):
            if storage not in self._known and all(storage is not other for other in before):
                self._known.add(storage)
                self.now += storage.nbytes()
                weakref.finalize(storage, self._gone, storage.nbytes())
        self.peak = max(self.peak, self.now)
        return out

    def _gone(self, size: int) -> None:
        self.now -= size
