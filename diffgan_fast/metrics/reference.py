"""Real data that samples are measured against: what of them alone a metric needs is computed once, and kept."""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from ..data.base import Modes
from .checks import float64
from .extraction import Extracted, Kept
from .frechet import Moments
from .kernel import mean_kernel_within
from .knn import RealPoints
from .neighbours import RealBalls

STATISTICS = 1  # part of the cache's names: raise it when a statistic comes to be computed otherwise


def order(n: int, seed: int = 0) -> Tensor:
    """A fixed random order of n samples."""
    return torch.from_numpy(np.random.Generator(np.random.PCG64(seed)).permutation(n))


class Reference:
    """Real samples with their statistics, whatever is measured against them.

    Args:
        real: their features.
        kept: where the statistics are kept.
        modes: of points, if they are known.
    """

    def __init__(self, real: Extracted, kept: Kept, modes: Modes | None = None):
        self.real, self.modes, self._kept = real, modes, kept
        self._balls: dict[int, RealBalls] = {}

    def keep(self, what: str, compute: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
        """Numbers that follow from these samples and what the name says."""
        found = self._kept(f"{what}-{STATISTICS}", compute)
        return {name: value.to(self.real.features.device) for name, value in found.items()}

    @cached_property
    def features(self) -> Tensor:
        return float64(self.real.features)

    @cached_property
    def moments(self) -> Moments:
        n, d = self.features.shape
        if n <= d:
            return Moments(self.features)  # they are the rows themselves

        def compute() -> dict[str, Tensor]:
            made = Moments(self.features)
            return {"mean": made.mean, "covariance": made.covariance}

        return Moments.from_statistics(**self.keep("moments", compute), n=n)

    @cached_property
    def kernel(self) -> float:
        def compute() -> dict[str, Tensor]:
            return {"mean": torch.tensor(mean_kernel_within(self.features), dtype=torch.float64)}

        return float(self.keep("kernel", compute)["mean"])

    @cached_property
    def points(self) -> RealPoints:
        points = RealPoints(self.features.cpu().numpy())

        def compute() -> dict[str, Tensor]:
            return {"mean_log": torch.tensor(points.own_distance, dtype=torch.float64)}

        points.own_distance = float(self.keep(f"distance-{points.k}", compute)["mean_log"])
        return points

    def balls(self, n: int) -> RealBalls:
        """Of n samples, a fixed choice. ValueError if they are too few."""
        if n not in self._balls:
            balls = self._balls[n] = RealBalls(float64(self.real.part(order(len(self.real))[:n]).features))
            balls.nearest = self.keep(f"neighbours-{n}", lambda: {"squared": balls.nearest})["squared"]
        return self._balls[n]
