"""Fréchet distance between Gaussians fitted to features, without a matrix square root. All arithmetic is float64."""

from __future__ import annotations

import numpy as np
import torch
from scipy import linalg
from torch import Tensor

from .checks import checked, float64


class Moments:
    """Number, mean and covariance of feature vectors, gathered batch by batch in float64.

    Up to d vectors are kept as they are, which takes no more memory than a covariance and from which :func:`fid` is
    exact and cheap; from the next batch on only mean and covariance are kept, whatever the number.

    Args:
        features: a first batch ``[n, d]``, tensor or array, or None.

    Attributes:
        n: number of vectors.
    """

    def __init__(self, features=None) -> None:
        self.n = 0
        self._rows: list[Tensor] = []  # all of them, while n <= d
        self._mean: Tensor | None = None
        self._scatter: Tensor | None = None  # sum of outer products of centred vectors, once n > d
        if features is not None:
            self.update(features)

    @classmethod
    def from_statistics(cls, mean, covariance, n: int) -> Moments:
        """Of n vectors of which only mean ``[d]`` and covariance ``[d, d]`` (with n - 1) are known.

        Raises:
            ValueError: n < 2, shapes that do not fit, or values that are not finite.
        """
        made = cls()
        made.n, made._mean, covariance = n, float64(mean).reshape(-1), float64(covariance)
        d = len(made._mean)
        if n < 2:
            raise ValueError(f"n must be at least 2, not {n}")
        if covariance.shape != (d, d) or not (torch.isfinite(covariance).all() and torch.isfinite(made._mean).all()):
            raise ValueError(f"covariance must be finite and {[d, d]} as mean has {d}, not {list(covariance.shape)}")
        made._scatter = covariance * (n - 1)
        return made

    def update(self, features) -> Moments:
        """Adds a batch ``[n, d]``, n at least 1, on the device where it is. Returns self.

        Raises:
            ValueError: not ``[n, d]``, another d than before, or values that are not finite.
        """
        x = checked(features, "features", least=1)
        x = x if self._mean is None else x.to(self._mean.device)
        mean = x.mean(0)
        if self._scatter is None and self.n + len(x) <= x.shape[1]:
            self._combine(len(x), mean, None)
            self._rows.append(x.clone())  # the caller may fill its buffer again
        else:
            self._fold()
            centred = x - mean
            self._combine(len(x), mean, centred.T @ centred)
        return self

    def merge(self, other: Moments) -> Moments:
        """Adds what another one has gathered, which stays as it is. Returns self."""
        if other._scatter is None:
            for rows in tuple(other._rows):  # other may be self
                self.update(rows)
        else:
            self._fold()
            self._combine(other.n, other.mean, other._scatter)
        return self

    def _fold(self) -> None:
        """Rows become a covariance."""
        if self._rows:
            centred = torch.cat(self._rows) - self.mean
            self._scatter, self._rows = centred.T @ centred, []

    def _combine(self, n: int, mean: Tensor, scatter: Tensor | None) -> None:
        """Chan, Golub and LeVeque's update: exact, and without the cancellation of E[xxᵀ] - μμᵀ."""
        if self._mean is None:
            self.n, self._mean, self._scatter = n, mean.clone(), None if scatter is None else scatter.clone()
            return
        if len(mean) != len(self._mean):
            raise ValueError(f"features must have {len(self._mean)} columns as before, not {len(mean)}")
        gap, total = mean.to(self._mean) - self._mean, self.n + n
        if scatter is not None and self._scatter is not None:
            between = torch.outer(gap, gap) * (self.n * n / total)
            self._scatter = self._scatter + scatter.to(between) + between
        self._mean = self._mean + gap * (n / total)
        self.n = total

    @property
    def mean(self) -> Tensor:
        """The mean ``[d]``. ValueError if there are no vectors."""
        if self._mean is None:
            raise ValueError("there are no features yet: call update first")
        return self._mean

    @property
    def covariance(self) -> Tensor:
        """The covariance ``[d, d]``, with n - 1. ValueError for fewer than two vectors."""
        if self._scatter is not None:
            return self._scatter / (self.n - 1)
        rows = self._scaled()
        return rows.T @ rows

    @property
    def variance(self) -> float:
        """The trace of the covariance."""
        if self._scatter is not None:
            return float(self._scatter.trace()) / (self.n - 1)
        return float(self._scaled().square().sum())

    @property
    def rows(self) -> Tensor | None:
        """R ``[n, d]`` with RᵀR the covariance, while there are at most d vectors; else None."""
        return self._scaled() if self._scatter is None else None

    def _scaled(self) -> Tensor:
        if self.n < 2:
            raise ValueError(f"a covariance needs at least 2 vectors, not {self.n}")
        return (torch.cat(self._rows) - self.mean) / (self.n - 1) ** 0.5


def fid(real, fake) -> float:
    """Fréchet distance between the Gaussians fitted to two sets of features (covariances with n - 1).

    |μ₁ - μ₂|² + tr(Σ₁ + Σ₂ - 2 (Σ₁Σ₂)^½), the last trace by the cheapest exact route. With R the centred features over
    √(n-1), so that Σ = RᵀR:

    - both n at most d: the nuclear norm of R₁R₂ᵀ;
    - one n at most d, or of the other set only the covariance is known: the sum of √λ(R₁Σ₂R₁ᵀ), exact to about 1e-5
      where features vary by many orders of magnitude, else to 1e-8;
    - both n above d: with Σ₁ = LLᵀ, the sum of √λ(LᵀΣ₂L).

    Args:
        real: features ``[n, d]``, tensor on any device or array, or their :class:`Moments`.
        fake: features ``[m, d]``, or their :class:`Moments`.

    Returns:
        The distance, in squared units of the features. It is "FID" only on Inception-v3's of 2015-12-05.

    Raises:
        ValueError: fewer than two rows, different d, or values that are not finite.

    Source: Heusel et al. 2017, arXiv:1706.08500.
    """
    real, fake = (
        of if isinstance(of, Moments) else Moments(checked(of, name)) for of, name in ((real, "real"), (fake, "fake"))
    )
    if len(real.mean) != len(fake.mean):
        raise ValueError(f"fake must have {len(real.mean)} features as real has, not {len(fake.mean)}")
    gap, x, y = fake.mean.to(real.mean) - real.mean, real.rows, fake.rows
    if x is None and y is None:
        root = _trace_of_root(_numpy(real.covariance), _numpy(fake.covariance))
    else:
        few, other = (y, real) if x is None or (y is not None and len(y) < len(x)) else (x, fake)
        if other.rows is None:
            # Rows add up to 0: one eigenvalue is 0, and the root of its rounding error would be seen (1e-8).
            root = _sum_of_roots(_numpy(few @ other.covariance.to(few) @ few.T), zeros=1)
        else:  # not by the eigenvalues of a square, in which small singular values drown
            root = linalg.svdvals(_numpy(few @ other.rows.to(few).T), overwrite_a=True, check_finite=False).sum()
    return float(gap @ gap) + real.variance + fake.variance - 2 * float(root)


def fid_from_statistics(mu1, cov1, mu2, cov2) -> float:
    """Fréchet distance between N(mu1, cov1) and N(mu2, cov2).

    With cov1 = L Lᵀ, the trace of (cov1 cov2)^½ is the sum of the square roots of the eigenvalues of
    Lᵀ cov2 L, which is symmetric: no matrix square root is taken.

    Args:
        mu1, mu2: means ``[d]``, tensor or array.
        cov1, cov2: covariances ``[d, d]``, symmetric and positive semidefinite.

    Returns:
        The distance, in squared units of the features.

    Raises:
        ValueError: shapes that do not fit, values that are not finite, or no covariance.
    """
    given = {"mu1": mu1, "cov1": cov1, "mu2": mu2, "cov2": cov2}
    m1, c1, m2, c2 = (_numpy(float64(value)) for value in given.values())
    d = m1.size
    for (name, _), value, shape in zip(given.items(), (m1, c1, m2, c2), ((d,), (d, d)) * 2, strict=True):
        if value.shape != shape or not np.isfinite(value).all():
            raise ValueError(f"{name} must be finite and {list(shape)}, not {list(value.shape)}")
    for name, covariance in (("cov1", c1), ("cov2", c2)):
        if (
            np.abs(covariance - covariance.T).max() > 1e-6 * np.abs(covariance).max()
            or np.diagonal(covariance).min() < 0
        ):
            raise ValueError(f"{name} must be a covariance: symmetric, with no variance below 0")
    return float(np.square(m1 - m2).sum() + np.trace(c1) + np.trace(c2) - 2 * _trace_of_root(c1, c2))


def fid_infinity(real, fake, *, points: int = 15, least: int | None = None, seed: int = 0) -> float:
    """Fréchet distance extrapolated to infinitely many samples: FID's bias is nearly linear in 1/m.

    FID is measured with `points` numbers of samples, evenly spaced from `least` to m, each a random choice without
    replacement; a straight line in one over their number is fitted, and its value at 0 returned. The bias that the
    number of real samples brings stays: take all there are.

    Args:
        real: features ``[n, d]``, tensor or array, or their :class:`Moments`.
        fake: features ``[m, d]``, tensor or array.
        points: how many numbers, at least 2.
        least: the smallest of them, 2 to m - 1; by default m / 10, but at least 2.
        seed: of the choices.

    Returns:
        The extrapolated distance, which may be negative where the truth is near 0.

    Raises:
        ValueError: an argument out of its range, different d, or values that are not finite.

    Source: Chong and Forsyth 2020, arXiv:1911.07023 (there 15 points from 5,000 to 50,000).
    """
    fake = checked(fake, "fake", least=3)
    m = len(fake)
    least = max(2, m // 10) if least is None else least
    if points < 2:
        raise ValueError(f"points must be at least 2, not {points}")
    if not 2 <= least < m:
        raise ValueError(f"least must be 2..{m - 1}, not {least}")
    real = real if isinstance(real, Moments) else Moments(checked(real, "real"))
    draw = np.random.Generator(np.random.PCG64(seed))
    sizes = np.linspace(least, m, points).astype(int)
    values = [fid(real, fake[torch.from_numpy(draw.permutation(m)[:size])]) for size in sizes]
    return float(np.polynomial.polynomial.polyfit(1 / sizes, values, 1)[0])


def _numpy(values: Tensor) -> np.ndarray:
    return values.cpu().numpy()


def _sum_of_roots(symmetric: np.ndarray, zeros: int = 0) -> float:
    """Sum of the square roots of the eigenvalues but the least, of which so many are 0; none is negative."""
    return np.sqrt(linalg.eigvalsh(symmetric, overwrite_a=True)[zeros:].clip(0)).sum()


def _trace_of_root(cov1: np.ndarray, cov2: np.ndarray) -> float:
    """tr (cov1 cov2)^½."""
    try:
        root = linalg.cholesky(cov1, lower=True)
    except linalg.LinAlgError:  # singular: a constant feature, say
        values, vectors = linalg.eigh(cov1)
        root = vectors * np.sqrt(values.clip(0))
    return _sum_of_roots(root.T @ cov2 @ root)
