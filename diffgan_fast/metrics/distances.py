"""Distances between sets of feature vectors, and the Inception score. All arithmetic is float64."""

from typing import overload

import numpy as np
from scipy import linalg, special

_BLOCK = 1 << 22  # kernel values held at a time: 32 MiB


def _float64(values) -> np.ndarray:
    """A tensor of any device, or an array, as float64."""
    return np.asarray(values.detach().cpu().double() if hasattr(values, "detach") else values, np.float64)


def _features(values, name: str) -> np.ndarray:
    """A tensor or array as float64 [n, d] with n >= 2, checked."""
    values = _float64(values)
    if values.ndim != 2 or len(values) < 2 or values.shape[1] == 0:
        raise ValueError(f"{name} must be [n, d] with n >= 2 and d >= 1, not {list(values.shape)}")
    if not np.isfinite(values).all():
        raise ValueError(f"{name} must be finite; it holds NaN or infinity")
    return values


def checked_pair(real, fake) -> tuple[np.ndarray, np.ndarray]:
    """Two sets of rows as float64 ``[n, d]`` and ``[m, d]``, n and m at least 2. ValueError if they are not."""
    real, fake = _features(real, "real"), _features(fake, "fake")
    if real.shape[1] != fake.shape[1]:
        raise ValueError(f"fake must have {real.shape[1]} features as real has, not {fake.shape[1]}")
    return real, fake


def fid(real, fake) -> float:
    """Fréchet distance between the Gaussians fitted to two sets of features (covariances with n - 1).

    |μ₁ - μ₂|² + tr(Σ₁ + Σ₂ - 2 (Σ₁Σ₂)^½). With centred features X, Y the last trace is the nuclear norm of
    X Yᵀ / √((n-1)(m-1)), which is exact where n or m is at most d and the covariances are singular.

    Args:
        real: features ``[n, d]``, tensor or array.
        fake: features ``[m, d]``.

    Returns:
        The distance, in squared units of the features. It is "FID" only on Inception-v3's of 2015-12-05.

    Raises:
        ValueError: fewer than two rows, different d, or values that are not finite.

    Source: Heusel et al. 2017, arXiv:1706.08500.
    """
    x, y = checked_pair(real, fake)
    mu1, mu2 = x.mean(0), y.mean(0)
    x, y = x - mu1, y - mu2
    n, m, d = len(x), len(y), x.shape[1]
    if min(n, m) > d:
        return fid_from_statistics(mu1, x.T @ x / (n - 1), mu2, y.T @ y / (m - 1))
    x, y = x / np.sqrt(n - 1), y / np.sqrt(m - 1)
    traces = np.square(x).sum() + np.square(y).sum()
    # R of the QR decomposition has the same RᵀR and only d rows
    x, y = (rows if len(rows) <= d else linalg.qr(rows, mode="r")[0][:d] for rows in (x, y))
    return float(np.square(mu1 - mu2).sum() + traces - 2 * linalg.svdvals(x @ y.T).sum())


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
        ValueError: shapes that do not fit, or values that are not finite.
    """
    mu1, mu2, cov1, cov2 = map(_float64, (mu1, mu2, cov1, cov2))
    d = mu1.size
    for name, value, shape in (
        ("mu1", mu1, (d,)),
        ("mu2", mu2, (d,)),
        ("cov1", cov1, (d, d)),
        ("cov2", cov2, (d, d)),
    ):
        if value.shape != shape or not np.isfinite(value).all():
            raise ValueError(f"{name} must be finite and {list(shape)}, not {list(value.shape)}")
    try:
        root = linalg.cholesky(cov1, lower=True)
    except linalg.LinAlgError:  # singular: a constant feature, say
        values, vectors = linalg.eigh(cov1)
        root = vectors * np.sqrt(values.clip(0))
    eigenvalues = linalg.eigvalsh(root.T @ cov2 @ root).clip(0)
    return float(np.square(mu1 - mu2).sum() + np.trace(cov1 + cov2) - 2 * np.sqrt(eigenvalues).sum())


def _kernel_sum(x: np.ndarray, y: np.ndarray) -> float:
    """Sum of (x·y/d + 1)³ over all pairs of rows."""
    total, rows = 0.0, max(1, _BLOCK // len(y))
    for start in range(0, len(x), rows):
        k = x[start : start + rows] @ y.T / x.shape[1] + 1
        total += float((k * k * k).sum())
    return total


def _mmd2(x: np.ndarray, y: np.ndarray) -> float:
    """Unbiased squared MMD: pairs of a row with itself are left out."""
    n, m, d = len(x), len(y), x.shape[1]
    within_x = (_kernel_sum(x, x) - ((np.square(x).sum(1) / d + 1) ** 3).sum()) / (n * (n - 1))
    within_y = (_kernel_sum(y, y) - ((np.square(y).sum(1) / d + 1) ** 3).sum()) / (m * (m - 1))
    return float(within_x + within_y - 2 * _kernel_sum(x, y) / (n * m))


@overload
def kid(real, fake, *, subsets: None = None, subset_size: int = 1000, seed: int = 0) -> float: ...
@overload
def kid(real, fake, *, subsets: int, subset_size: int = 1000, seed: int = 0) -> tuple[float, float]: ...
def kid(real, fake, *, subsets=None, subset_size=1000, seed=0):
    """Kernel distance: unbiased squared MMD with the kernel (x·y/d + 1)³.

    Its mean over samples is 0 for equal distributions, so a single value may be negative. With ``subsets`` it
    is the mean over random subsets instead, drawn without replacement as torch-fidelity draws them (fake's
    indices, then real's, from ``RandomState(seed)``; its default seed is 2020).

    Args:
        real: features ``[n, d]``, tensor or array.
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
        return _mmd2(real, fake)
    if subsets < 1:
        raise ValueError(f"subsets must be at least 1 or None, not {subsets}")
    if not 2 <= subset_size <= min(len(real), len(fake)):
        raise ValueError(f"subset_size must be 2..{min(len(real), len(fake))}, not {subset_size}")
    draw = np.random.RandomState(seed).choice
    values = []
    for _ in range(subsets):
        chosen = fake[draw(len(fake), subset_size, replace=False)]
        values.append(_mmd2(real[draw(len(real), subset_size, replace=False)], chosen))
    return float(np.mean(values)), float(np.std(values))


def inception_score(logits, splits=1) -> tuple[float, float]:
    """exp of the mean KL divergence of class probabilities from their average: 1 (worst) to K classes (best).

    Args:
        logits: class logits ``[n, K]``, tensor or array; each row goes through a softmax.
        splits: number of equal parts, in the order of the rows, 1 to n/2; the score is computed on each.

    Returns:
        Mean and standard deviation over the splits (0 for one).

    Raises:
        ValueError: fewer than two rows, values that are not finite, or splits out of range.

    Source: Salimans et al. 2016, arXiv:1606.03498.
    """
    logits = _features(logits, "logits")
    if not 1 <= splits <= len(logits) // 2:
        raise ValueError(f"splits must be 1..{len(logits) // 2}, not {splits}")
    parts = np.array_split(special.softmax(logits, axis=1), splits)
    scores = [np.exp(special.rel_entr(p, p.mean(0)).sum(1).mean()) for p in parts]
    return float(np.mean(scores)), float(np.std(scores))
