"""How an op is measured: providers of one case are checked, then timed in turns, with fresh arguments at every call.

A case is one computation at one size; a provider is one way to do it. Every provider is first run twice on poisoned
memory and compared with the float64 oracle: a red one is not timed, and no ratio involves it. Then rounds go over all
providers in turn, so that a disturbance hits all alike; a round times a short batch of calls, each with its own key, t
and input set. The median and the 20th and 80th percentile are over rounds.

On a GPU a batch is queued behind a sleep kernel, so that events time the device alone, whatever a launch costs;
`host_ms` is what issuing a call took. The input sets together exceed the cache, and as many outputs are kept alive.
"""

from __future__ import annotations

import time
from collections import deque
from typing import Any

import numpy as np
import torch

import diffgan_fast as dgf
from benchmarks import oracle
from benchmarks.cases import Call, Case, Options, Provider, set_count
from benchmarks.check import verify

SLEEP_CYCLES = 20_000_000  # about 10 ms


class Calls:
    """Makes the arguments of calls: the data sets in turn, a fresh key and fresh t every time."""

    def __init__(self, case: Case):
        self.case = case
        self.sets = [case.data() for _ in range(set_count(case.size))]
        self.count = 0

    def next(self, provider: Provider) -> Call:
        self.count += 1
        key = dgf.random.fold_in(dgf.random.key(0), self.count)
        data = self.sets[self.count % len(self.sets)]
        size = self.case.size
        argument = t = torch.randint(1, oracle.T + 1, size.shape[:1], device=size.device)
        if provider.time.startswith("one"):
            argument = -(-int(t[0]) // 100) * 100  # ten levels, as a sampler meets the same ones in every run
            t = torch.full_like(t, argument)
        if provider.time.endswith("0"):
            argument = argument - 1
        return Call((*data, argument, *((key,) if provider.backend else ())), data, t, key)


class Stopwatch:
    """Times batches of calls of one provider."""

    def __init__(self, provider: Provider, calls: Calls, options: Options):
        self.provider, self.calls, self.cuda = provider, calls, options.device == "cuda"
        self.kept: deque = deque(maxlen=len(calls.sets) if self.cuda else 1)
        self.seconds: list[float] = []
        self.host: list[float] = []
        self.inner = 1
        for _ in range(1 if options.quick else 3):
            self.batch()
        estimate = min(max(pair) for pair in zip(self.seconds, self.host, strict=True))
        self.inner = max(1, min(32 if self.cuda else 1000, int(options.batch_s / max(estimate, 1e-7))))
        self.batch()
        self.seconds, self.host = [], []

    def batch(self) -> None:
        """Times `inner` calls; adds the seconds a call took on the device, and the seconds to issue it."""
        arguments = [self.calls.next(self.provider).arguments for _ in range(self.inner)]
        run, keep = self.provider.run, self.kept.append
        with dgf.backend(self.provider.backend or "auto"):
            if self.cuda:
                start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                torch.cuda.synchronize()
                torch.cuda._sleep(SLEEP_CYCLES)
                start.record()
            before = time.perf_counter()
            for a in arguments:
                keep(run(*a))
            host = (time.perf_counter() - before) / self.inner
            if self.cuda:
                end.record()
                torch.cuda.synchronize()
        self.host.append(host)
        self.seconds.append(start.elapsed_time(end) / 1e3 / self.inner if self.cuda else host)


def measure(benchmark: str, case: Case, options: Options) -> list[dict]:
    """One row for each provider of a case."""
    torch.manual_seed(0)
    size = case.size
    calls = Calls(case)
    providers = list(case.providers)
    status = {}
    for p in providers:
        found = [verify(case, p, calls.next(p)) for _ in range(2)]
        status[p.name] = next((s for s in found if s != "ok"), "ok")
    watches = {p.name: Stopwatch(p, calls, options) for p in providers if status[p.name] == "ok"}
    for _ in range(options.rounds):
        for watch in watches.values():
            watch.batch()
    torch._dynamo.reset()
    n = torch.Size(size.shape).numel()
    rows = []
    for p in providers:
        row: dict[str, Any] = {
            "benchmark": benchmark,
            "case": case.name,
            "shape": "x".join(map(str, size.shape)),
            "dtype": str(size.dtype).removeprefix("torch."),
            "device": options.device,
            "threads": options.threads,
            "provider": p.name,
            "status": status[p.name],
            "bytes_per_element": p.bytes or case.bytes,
            "ops_per_element": 0 if p.name == "copy" else case.ops,
        }
        if watch := watches.get(p.name):
            row |= quantiles(watch.seconds)
            if watch.cuda:
                row["host_ms"] = quantiles(watch.host)["ms"]
            row["ns_per_element"] = row["ms"] * 1e6 / n
            row["gb_per_s"] = row["bytes_per_element"] / row["ns_per_element"]
        rows.append(row)
    return rows


def quantiles(seconds: list[float]) -> dict[str, float]:
    """The median, 20th and 80th percentile in milliseconds."""
    p20, median, p80 = np.quantile(np.array(seconds) * 1e3, [0.2, 0.5, 0.8]).tolist()
    return {"ms": median, "p20_ms": p20, "p80_ms": p80}
