"""Kernel distance between sets of feature vectors, by tiles of the kernel matrix. All arithmetic is float64."""

from typing import overload

import numpy as np
import torch
from torch import Tensor

from .checks import checked_pair

TILE = 512  # rows and columns of the kernel matrix at a time: 2 MiB


def _kernel(x: Tensor, y: Tensor) -> Tensor:
    """(x·y/d + 1)³ of all pairs of rows."""
    return torch.addmm(x.new_ones(()), x, y.T, alpha=1 / x.shape[1]).pow_(3)


def _across(x: Tensor, y: Tensor, of_x: Tensor, of_y: Tensor) -> Tensor:
    """For each column s of `of_x` [n, c] and t of `of_y` [m, c]: the sum of s_i k(x_i, y_j) t_j over all pairs."""
    total = x.new_zeros(of_x.shape[1])
    for i in range(0, len(x), TILE):
        for j in range(0, len(y), TILE):
            total += (of_x[i : i + TILE] * (_kernel(x[i : i + TILE], y[j : j + TILE]) @ of_y[j : j + TILE])).sum(0)
    return total


def _within(x: Tensor, of_x: Tensor) -> Tensor:
    """For each column s of `of_x` [n, c]: the sum of s_i k(x_i, x_j) s_j over i ≠ j; each pair is computed once."""
    total = x.new_zeros(of_x.shape[1])
    for i in range(0, len(x), TILE):
        rows = of_x[i : i + TILE]
        for j in range(i, len(x), TILE):
            k = _kernel(x[i : i + TILE], x[j : j + TILE])
            if i == j:
                k.fill_diagonal_(0)
            total += (1 + (i != j)) * (rows * (k @ of_x[j : j + TILE])).sum(0)
    return total


def mean_kernel_within(x: Tensor) -> float:
    """Mean kernel of all pairs of different rows, float64 [n, d]: the part of the distance that one set decides."""
    return float(_within(x, x.new_ones(len(x), 1))) / (len(x) * (len(x) - 1))


def mmd2(x: Tensor, y: Tensor, within_x: float) -> float:
    """Unbiased squared MMD of float64 [n, d] and [m, d]: pairs of a row with itself are left out."""
    across = float(_across(x, y, x.new_ones(len(x), 1), y.new_ones(len(y), 1)))
    return within_x + mean_kernel_within(y) - 2 * across / (len(x) * len(y))


def _subset_values(x: Tensor, y: Tensor, chosen: list[tuple[Tensor, Tensor]], size: int) -> Tensor:
    """Unbiased squared MMD of each pair of subsets (rows of y, rows of x)."""
    pairs, kept = size * (size - 1), len(chosen) * 2 * size**2
    if (len(x) + len(y)) ** 2 / 2 > kept:  # fewer kernel values if each subset computes its own
        values = [mmd2(x[i], y[j], mean_kernel_within(x[i])) for j, i in chosen]
        return torch.tensor(values, dtype=torch.float64)
    of_x, of_y = x.new_zeros(len(x), len(chosen)), y.new_zeros(len(y), len(chosen))
    for column, (j, i) in enumerate(chosen):
        of_x[i, column] = of_y[j, column] = 1
    within = (_within(x, of_x) + _within(y, of_y)) / pairs
    return (within - 2 * _across(x, y, of_x, of_y) / size**2).cpu()


@overload
def kid(real, fake, *, subsets: None = None, subset_size: int = 1000, seed: int = 0) -> float: ...
@overload
def kid(real, fake, *, subsets: int, subset_size: int = 1000, seed: int = 0) -> tuple[float, float]: ...
def kid(real, fake, *, subsets=None, subset_size=1000, seed=0):
    """Kernel distance: unbiased squared MMD with the kernel (x·y/d + 1)³.

    Its mean over samples is 0 for equal distributions, so a single value may be negative. With ``subsets`` it
    is the mean over random subsets instead, drawn without replacement as torch-fidelity draws them (fake's
    indices, then real's, from ``RandomState(seed)``; its default seed is 2020). The kernel matrix is never held; where
    subsets overlap much, its values are computed once for all of them.

    Args:
        real: features ``[n, d]``, tensor on any device or array.
        fake: features ``[m, d]``.
        subsets: number of subsets, at least 1, or None for one value from all pairs.
        subset_size: rows in each subset, 2 to min(n, m).
        seed: of the subsets, 0 to 2³² - 1.

    Returns:
        The value; with ``subsets``, the mean and standard deviation over subsets.

    Raises:
        ValueError: an argument out of its range, different d, or values that are not finite.

    Source: Bińkowski et al. 2018, arXiv:1801.01401.
    """
    real, fake = checked_pair(real, fake)
    if subsets is None:
        return mmd2(real, fake, mean_kernel_within(real))
    if subsets < 1:
        raise ValueError(f"subsets must be at least 1 or None, not {subsets}")
    if not 2 <= subset_size <= min(len(real), len(fake)):
        raise ValueError(f"subset_size must be 2..{min(len(real), len(fake))}, not {subset_size}")
    draw = np.random.RandomState(seed).choice
    chosen = [
        tuple(torch.from_numpy(draw(len(of), subset_size, replace=False)).to(real.device) for of in (fake, real))
        for _ in range(subsets)
    ]
    values = _subset_values(real, fake, chosen, subset_size)
    return float(values.mean()), float(values.std(correction=0))
