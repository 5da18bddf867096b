"""Scores from balls around features that reach to their k-th neighbour, by tiles of the distances, in float64.

Only squared distances are compared, |x|² + |y|² - 2 x·y with x and y counted from the middle of the real features, so
that it does not matter where that is: those below about 1e-15 (|x|² + |y|²) are rounding.
"""

from collections.abc import Iterator
from functools import cached_property
from math import floor, log2
from typing import NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

from .checks import checked_pair

TILE = 1024  # rows and columns of the distances at a time: 8 MiB


class PRDC(NamedTuple):
    """What :func:`prdc` gives. All lie in 0..1, but density, which may exceed 1."""

    precision: float
    recall: float
    density: float
    coverage: float


def _parts(n: int) -> list[slice]:
    return [slice(i, min(i + TILE, n)) for i in range(0, n, TILE)]


def _middle(x: Tensor) -> Tensor:
    """The mean [d] of rows, rounded to what they differ by: counting from it keeps whole numbers whole, and ties."""
    mean = x.mean(0)
    apart = max(float((x[part] - mean).abs().max()) for part in _parts(len(x)))
    if apart == 0:
        return x[0]
    step = 2.0 ** floor(log2(apart))
    return (mean / step).round() * step


def _tiles(x: Tensor, y: Tensor | None, middle: Tensor) -> Iterator[tuple[slice, slice, Tensor]]:
    """(rows of x, rows of y, squared distances between them). Without y of x with itself, each pair of parts once."""
    within, y = y is None, x if y is None else y
    parts = [(i, j) for i in _parts(len(x)) for j in _parts(len(y)) if not within or i.start <= j.start]
    xx, yy = (torch.cat([(of[i] - middle).square().sum(1) for i in _parts(len(of))]) for of in (x, y))
    for rows, columns in tqdm(parts, desc="neighbours", leave=False, delay=1, disable=None):
        near, far = x[rows] - middle, y[columns] - middle  # not of all rows at once, which may be gigabytes
        yield rows, columns, (xx[rows, None] + yy[columns]).addmm_(near, far.T, alpha=-2)


def squared_neighbour_distances(x: Tensor, k: int, middle: Tensor) -> Tensor:
    """Squared distances [n, k] of each row of float64 [n, d] to its k nearest others, ascending."""
    nearest = x.new_full((len(x), k), torch.inf)

    def take(rows: slice, found: Tensor) -> None:
        best = found.topk(min(k, found.shape[1]), 1, largest=False).values
        nearest[rows] = torch.cat([nearest[rows], best], 1).topk(k, 1, largest=False).values

    for rows, columns, found in _tiles(x, None, middle):
        if rows == columns:
            found.fill_diagonal_(torch.inf)
        else:
            take(columns, found.T.contiguous())
        take(rows, found)
    return nearest


class RealBalls:
    """Real features, float64 ``[n, d]``, and the distances within them, found once for any number of fake sets.

    Raises:
        ValueError: density_k is not 1 to n - 1.
    """

    def __init__(self, real: Tensor, k: int = 3, density_k: int = 5):
        if density_k not in range(1, len(real)):
            raise ValueError(f"density_k must be 1..{len(real) - 1} for {len(real)} real samples, not {density_k}")
        self.real, self.k, self.density_k = real, k, density_k

    @cached_property
    def middle(self) -> Tensor:
        return _middle(self.real)

    @cached_property
    def nearest(self) -> Tensor:
        """Squared distances of each to its nearest others, ascending."""
        return squared_neighbour_distances(self.real, max(self.k, self.density_k), self.middle)

    def prdc(self, fake: Tensor) -> PRDC:
        """What :func:`prdc` gives for float64 ``[m, d]``."""
        real, k, density_k = self.real, self.k, self.density_k
        (n, m), least = (len(real), len(fake)), min(len(real), len(fake))
        if k not in range(1, least):
            raise ValueError(f"k must be 1..{least - 1} for {n} real and {m} fake samples, not {k}")
        reach, dense_reach = self.nearest[:, k - 1 : k], self.nearest[:, density_k - 1 : density_k]
        reach_fake = squared_neighbour_distances(fake, k, self.middle)[:, k - 1]
        inside = torch.zeros((), dtype=torch.int64, device=real.device)
        precise = torch.zeros(m, dtype=torch.bool, device=real.device)
        recalled, covered = (torch.zeros(n, dtype=torch.bool, device=real.device) for _ in range(2))
        for rows, columns, found in _tiles(real, fake, self.middle):
            precise[columns] |= (found <= reach[rows]).any(0)
            recalled[rows] |= (found <= reach_fake[columns]).any(1)
            hits = (found < dense_reach[rows]).sum(1)
            covered[rows] |= hits > 0
            inside += hits.sum()
        precision, recall, coverage = (float(of.double().mean()) for of in (precise, recalled, covered))
        return PRDC(precision, recall, float(inside) / (density_k * m), coverage)


def prdc(real, fake, k: int = 3, density_k: int = 5) -> PRDC:
    """Improved precision and recall, density and coverage, in one pass over the distances.

    Around each sample stands a ball that reaches to its k-th nearest neighbour in its own set.

    - precision: share of fake samples in the ball of any real one; recall: share of real ones in the ball of any fake;
    - density: number of real balls that a fake sample lies in, on average, over k; coverage: share of real balls that
      hold a fake sample. Both with ``density_k``, and the sphere itself left out, as in the authors' code.

    The distance matrix is never held. All four depend on both numbers of samples: compare only where they are equal.

    Args:
        real: features ``[n, d]``, tensor on any device or array.
        fake: features ``[m, d]``.
        k: of precision and recall, 1 to min(n, m) - 1.
        density_k: of density and coverage, 1 to n - 1.

    Returns:
        A named tuple (precision, recall, density, coverage).

    Raises:
        ValueError: an argument out of its range, different d, or values that are not finite.

    Source: Kynkäänniemi et al. 2019, arXiv:1904.06991 (k = 3, on VGG-16 features); Naeem et al. 2020, arXiv:2002.09797
    (k = 5).
    """
    real, fake = checked_pair(real, fake)
    return RealBalls(real, k, density_k).prdc(fake)


def precision_recall(real, fake, k: int = 3) -> tuple[float, float]:
    """Improved precision and recall: see :func:`prdc`, of which they are the first two."""
    return prdc(real, fake, k, k)[:2]


def density_coverage(real, fake, k: int = 5) -> tuple[float, float]:
    """Density and coverage: see :func:`prdc`, of which they are the last two.

    Raises:
        ValueError: as :func:`prdc` does; k must be 1 to n - 1.
    """
    return prdc(real, fake, 1, k)[2:]
