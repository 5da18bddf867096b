"""FID, KID, precision and recall from the same float64 features: the libraries' procedures against ours.

The procedures are written out as the libraries run them, so that nothing but scipy is needed; prdc is called itself.
    sqrtm       FID by scipy's matrix square root (pytorch-fid 0.3.0, clean-fid 0.1.35)
    eigvals     FID by eigenvalues of the unsymmetric product (torch-fidelity 0.4.0)
    subset      KID by three kernel matrices a subset (torch-fidelity 0.4.0, torchmetrics 1.9.0)
    prdc        prdc 0.2, where it is installed

Means and covariances are timed too, but in `fid-statistics`, which starts from them. A call is timed nine times; one
that takes more than a second three times, of which its first, which is checked, is one: all of it takes minutes, mostly
in sqrtm. Before each there is a pause, for threads of NumPy's BLAS wait busily for a while and would take the cores of
torch's. Of few samples every value is checked against the nuclear norm of the float64 Gram matrix (ours to 1e-8, others
to 1e-4), else against `eigvals`, `subset` and prdc to 1e-6. `peak_mib` is what the process takes at most above what it
holds before, sampled every millisecond. Quick sizes only show that everything works.
"""

from __future__ import annotations

import importlib.util
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy import linalg

from benchmarks.cases import Options
from benchmarks.harness import quantiles
from diffgan_fast import metrics

OURS = "dgf-metrics"
ROUNDS, LONG_ROUNDS, LONG = 9, 3, 1.0  # timed calls of a provider, of long ones, and the seconds that make a call long


@dataclass(frozen=True)
class Case:
    """providers: name -> call. expected: the value that all must give, or the provider that gives it.

    ours, others: the relative errors allowed.
    """

    name: str
    shape: str
    providers: dict[str, Callable[[], Any]]
    expected: Callable[[], Any] | str
    ours: float = 1e-6
    others: float = 1e-6


def statistics(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    return x.mean(0), np.cov(x, rowvar=False)


def fid_by(root: Callable[[np.ndarray], float], mu1, cov1, mu2, cov2) -> float:
    """The textbook formula; `root` gives the trace of the square root of a product."""
    return float(np.square(mu1 - mu2).sum() + np.trace(cov1) + np.trace(cov2) - 2 * root(cov1 @ cov2))


def trace_by_sqrtm(product: np.ndarray) -> float:
    return np.trace(linalg.sqrtm(product).real)


def trace_by_eigvals(product: np.ndarray) -> float:
    return np.sqrt(np.linalg.eigvals(product).astype(complex)).real.sum()


def fid_by_gram(x: np.ndarray, y: np.ndarray) -> float:
    """The exact value where samples are fewer than features."""
    xc, yc = x - x.mean(0), y - y.mean(0)
    gram = xc @ yc.T / np.sqrt((len(x) - 1) * (len(y) - 1))
    roots = np.linalg.svd(gram, compute_uv=False).sum()
    traces = np.square(xc).sum() / (len(x) - 1) + np.square(yc).sum() / (len(y) - 1)
    return float(np.square(x.mean(0) - y.mean(0)).sum() + traces - 2 * roots)


def kid_of_subset(x: np.ndarray, y: np.ndarray) -> float:
    """Unbiased, from three whole kernel matrices."""
    m, d = x.shape
    k_xx, k_xy, k_yy = ((a @ b.T / d + 1) ** 3 for a, b in ((x, x), (x, y), (y, y)))
    within = sum(k.sum() - np.trace(k) for k in (k_xx, k_yy)) / (m * (m - 1))
    return float(within - 2 * k_xy.sum() / m**2)


def kid_of_subsets(x: np.ndarray, y: np.ndarray, subsets: int, size: int) -> tuple[float, float]:
    draw = np.random.RandomState(2020).choice
    values = []
    for _ in range(subsets):
        chosen = y[draw(len(y), size, replace=False)]
        values.append(kid_of_subset(x[draw(len(x), size, replace=False)], chosen))
    return float(np.mean(values)), float(np.std(values))


def features(n: int, d: int, seed: int, scale: float = 1.0, shift: float = 0.0) -> np.ndarray:
    """Correlated alike for every seed, with the fast decay of variances that networks' features have."""
    mix = np.random.RandomState(0).standard_normal((d, d)) / np.sqrt(d)
    x = np.random.RandomState(seed).standard_normal((n, d)) * np.arange(1, d + 1) ** -0.5
    return x @ mix * scale + shift


def cases(options: Options) -> list[Callable[[], Case]]:
    """Each made when its turn comes, so that the features of one are gone before those of the next."""
    d, few, more, size, subsets, many = (
        (24, 9, 20, 10, 5, 60) if options.quick else (2048, 500, 2000, 1000, 100, 10_000)
    )

    def pair(n: int) -> tuple[np.ndarray, np.ndarray, torch.Tensor, torch.Tensor]:
        x, y = features(n, d, 1), features(n, d, 2, 1.02, 0.005)
        return x, y, *(torch.from_numpy(of).to(options.device) for of in (x, y))

    def fid_of(name: str, n: int, cached: bool = False) -> Case:
        x, y, ours_x, ours_y = pair(n)
        held = statistics(x) if cached else None
        known = metrics.Moments.from_statistics(*held, n) if held else None
        roots = {"eigvals": trace_by_eigvals} | ({} if cached else {"sqrtm": trace_by_sqrtm})

        def library(root):
            return lambda: fid_by(root, *(held or statistics(x)), *statistics(y))

        providers: dict[str, Callable[[], Any]] = {name: library(root) for name, root in roots.items()}
        providers[OURS] = lambda: metrics.fid(known or ours_x, ours_y)
        return Case(name, f"2x{n}x{d}", providers, lambda: fid_by_gram(x, y), 1e-6 if cached else 1e-8, 1e-4)

    def fid_of_statistics() -> Case:
        x, y, *_ = pair(5 * d // 2)
        given = (*statistics(x), *statistics(y))
        return Case(
            "fid-statistics", f"2x{d}x{d}",
            {"sqrtm": lambda: fid_by(trace_by_sqrtm, *given), "eigvals": lambda: fid_by(trace_by_eigvals, *given),
             OURS: lambda: metrics.fid_from_statistics(*given)},
            "eigvals",
        )  # fmt: skip

    def kid_subsets() -> Case:
        x, y, ours_x, ours_y = pair(5 * size // 2)
        return Case(
            "kid-subsets", f"{subsets}x{size} of {len(x)}x{d}",
            {"subset": lambda: kid_of_subsets(x, y, subsets, size),
             OURS: lambda: metrics.kid(ours_x, ours_y, subsets=subsets, subset_size=size, seed=2020)},
            "subset",
        )  # fmt: skip

    def kid_full() -> Case:
        x, y, ours_x, ours_y = pair(size)
        return Case(
            "kid-full", f"2x{size}x{d}",
            {"subset": lambda: kid_of_subset(x, y), OURS: lambda: metrics.kid(ours_x, ours_y)},
            "subset",
        )  # fmt: skip

    def neighbours() -> Case:
        x, y, ours_x, ours_y = pair(many)
        providers: dict[str, Callable[[], Any]] = {OURS: lambda: metrics.prdc(ours_x, ours_y, 5, 5)}
        if importlib.util.find_spec("prdc"):
            import prdc

            providers["prdc"] = lambda: tuple(prdc.compute_prdc(x, y, 5).values())
        return Case("precision-recall", f"2x{many}x{d}", providers, "prdc" if "prdc" in providers else OURS)

    return [lambda: fid_of("fid-few", few), lambda: fid_of("fid-fewer-than-features", more),
            lambda: fid_of("fid-cached-reference", few, cached=True), fid_of_statistics, kid_full, kid_subsets,
            neighbours]  # fmt: skip


def peak_of(call: Callable[[], Any]) -> tuple[Any, float]:
    """The value of a call, and the MiB that the process takes at most above what it holds before."""
    page, statm = 4096, Path("/proc/self/statm")
    held = [int(statm.read_text().split()[1])]
    done = threading.Event()

    def watch() -> None:
        while not done.wait(0.001):
            held.append(int(statm.read_text().split()[1]))

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        value = call()
    finally:
        done.set()
        thread.join()
    return value, (max(held) - held[0]) * page / 2**20


def pause() -> float:
    """Until no pool of threads waits busily any more; the time then."""
    time.sleep(0.2)
    return time.perf_counter()


def run(options: Options) -> list[dict]:
    """The rows of this benchmark: providers in turn, in rounds."""
    rows = []
    for make in cases(options):
        case = make()
        found: dict[str, dict[str, Any]] = {}
        values = {}
        for name, call in case.providers.items():
            started = pause()
            value, peak = peak_of(call)
            first = time.perf_counter() - started
            values[name] = np.array(value)
            left = 1 if options.quick else ROUNDS if first <= LONG else LONG_ROUNDS - 1
            found[name] = {"peak_mib": peak, "seconds": [first] if first > LONG else [], "left": left}
        expected = values[case.expected] if isinstance(case.expected, str) else np.array(case.expected())
        for i in range(ROUNDS):
            for name, call in case.providers.items():
                if i < found[name]["left"]:
                    started = pause()
                    call()
                    found[name]["seconds"].append(time.perf_counter() - started)
        for name, about in found.items():
            del about["left"]
            error = float(np.max(np.abs(values[name] - expected) / np.abs(expected)))
            allowed = case.ours if name == OURS else case.others
            about["status"] = "ok" if error <= allowed else f"RED: relative error {error:.1e}, allowed {allowed:g}"
            row = {"benchmark": "metrics", "case": case.name, "shape": case.shape, "dtype": "float64",
                   "device": options.device, "threads": options.threads, "provider": name}  # fmt: skip
            rows.append(row | quantiles(about.pop("seconds")) | about)
    return rows
