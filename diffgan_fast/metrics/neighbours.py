"""Scores from balls around features that reach to their k-th neighbour, by tiles of the distances, in float64.

Only squared distances are compared, |x|² + |y|² - 2 x·y: those below about 1e-15 (|x|² + |y|²) are rounding.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from .checks import checked_pair

TILE = 1024  # rows and columns of the distances at a time: 8 MiB


class PRDC(NamedTuple):
    """What :func:`prdc` gives. All lie in 0..1, but density, which may exceed 1."""

    precision: float
    recall: float
    density: float
    coverage: float


class _Tiles:
    """Squared distances between parts of two sets."""

    def __init__(self, x: Tensor, y: Tensor):
        self.x, self.y = x, y
        self.xx, self.yy = x.square().sum(1, keepdim=True), y.square().sum(1)

    def __call__(self, rows: slice, columns: slice) -> Tensor:
        return (self.xx[rows] + self.yy[columns]).addmm_(self.x[rows], self.y[columns].T, alpha=-2)


def _parts(n: int) -> list[slice]:
    return [slice(i, min(i + TILE, n)) for i in range(0, n, TILE)]


def squared_neighbour_distances(x: Tensor, k: int) -> Tensor:
    """Squared distances [n, k] of each row of float64 [n, d] to its k nearest others, ascending."""
    tiles, nearest = _Tiles(x, x), x.new_full((len(x), k), torch.inf)

    def take(rows: slice, found: Tensor) -> None:
        best = found.topk(min(k, found.shape[1]), 1, largest=False).values
        nearest[rows] = torch.cat([nearest[rows], best], 1).topk(k, 1, largest=False).values

    parts = _parts(len(x))
    for i, rows in enumerate(parts):
        for columns in parts[i:]:  # each pair once: a tile serves its rows and its columns
            found = tiles(rows, columns)
            if rows == columns:
                found.fill_diagonal_(torch.inf)
            else:
                take(columns, found.T.contiguous())
            take(rows, found)
    return nearest


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
    (n, m), least = (len(real), len(fake)), min(len(real), len(fake))
    if not 1 <= k < least:
        raise ValueError(f"k must be 1..{least - 1} for {n} real and {m} fake samples, not {k}")
    if not 1 <= density_k < n:
        raise ValueError(f"density_k must be 1..{n - 1} for {n} real samples, not {density_k}")
    around_real = squared_neighbour_distances(real, max(k, density_k))
    reach_fake = squared_neighbour_distances(fake, k)[:, k - 1]
    reach, dense_reach = around_real[:, k - 1 : k], around_real[:, density_k - 1 : density_k]
    tiles, inside = _Tiles(real, fake), torch.zeros((), dtype=torch.int64, device=real.device)
    precise = torch.zeros(m, dtype=torch.bool, device=real.device)
    recalled, covered = (torch.zeros(n, dtype=torch.bool, device=real.device) for _ in range(2))
    for rows in _parts(n):
        for columns in _parts(m):
            found = tiles(rows, columns)
            precise[columns] |= (found <= reach[rows]).any(0)
            recalled[rows] |= (found <= reach_fake[columns]).any(1)
            hits = (found < dense_reach[rows]).sum(1)
            covered[rows] |= hits > 0
            inside += hits.sum()
    precision, recall, coverage = (float(of.double().mean()) for of in (precise, recalled, covered))
    return PRDC(precision, recall, float(inside) / (density_k * m), coverage)


def precision_recall(real, fake, k: int = 3) -> tuple[float, float]:
    """Improved precision and recall: see :func:`prdc`, of which they are the first two."""
    return prdc(real, fake, k, k)[:2]


def density_coverage(real, fake, k: int = 5) -> tuple[float, float]:
    """Density and coverage: see :func:`prdc`, of which they are the last two.

    Raises:
        ValueError: as :func:`prdc` does; k must be 1 to n - 1.
    """
    return prdc(real, fake, 1, k)[2:]
