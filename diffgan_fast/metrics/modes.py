"""Scores of class probabilities, and what part of known modes or classes samples reach. All arithmetic is float64."""

import torch
from torch import Tensor

from .checks import checked, float64


def inception_score(logits, splits: int = 1) -> tuple[float, float]:
    """exp of the mean KL divergence of class probabilities from their average: 1 (worst) to K classes (best).

    Args:
        logits: class logits ``[n, K]``, tensor on any device or array; each row goes through a softmax.
        splits: number of equal parts, in the order of the rows, 1 to n/2; the score is computed on each.

    Returns:
        Mean and standard deviation over the splits (0 for one).

    Raises:
        ValueError: fewer than two rows, values that are not finite, or splits out of range.

    Source: Salimans et al. 2016, arXiv:1606.03498.
    """
    logits = checked(logits, "logits")
    if not 1 <= splits <= len(logits) // 2:
        raise ValueError(f"splits must be 1..{len(logits) // 2}, not {splits}")
    n = len(logits)
    parts = [logits[i * n // splits : (i + 1) * n // splits].softmax(1) for i in range(splits)]  # as everybody cuts
    scores = torch.stack([information(p.mean(0), torch.xlogy(p, p).sum(1).mean()) for p in parts]).exp()
    return float(scores.mean()), float(scores.std(correction=0))


def information(mean: Tensor, negative_entropy: Tensor) -> Tensor:
    """Mean KL divergence of distributions from their mean [K], in nats, given their mean of Σ p ln p."""
    return negative_entropy - torch.xlogy(mean, mean).sum()


def nearest_modes(points, modes, radius: float) -> Tensor:
    """int64 counts [K + 1]: points whose nearest mode is k and lies within the radius, and last all others."""
    points, modes = checked(points, "points", least=1), checked(modes, "modes", least=1)
    if points.shape[1] != modes.shape[1]:
        raise ValueError(f"modes must have {points.shape[1]} columns as points have, not {modes.shape[1]}")
    if not radius > 0:
        raise ValueError(f"radius must be above 0, not {radius}")
    modes, k = modes.to(points.device), len(modes)
    counts = torch.zeros(k + 1, dtype=torch.int64, device=points.device)
    for part in points.split(4096):
        distance, nearest = torch.cdist(part, modes, compute_mode="donot_use_mm_for_euclid_dist").min(1)
        counts += torch.bincount(nearest.where(distance <= radius, k), minlength=k + 1)
    return counts


def mode_coverage(points, modes, radius: float, *, least: int = 1) -> tuple[int, float]:
    """How many known modes samples reach, and the share of samples that lie near one ("high quality").

    A sample belongs to its nearest mode if that is within the radius, commonly three standard deviations of the mode.

    Args:
        points: samples ``[n, d]``, tensor on any device or array, n >= 1.
        modes: centres ``[K, d]``.
        radius: above 0, in units of the points.
        least: samples that make a mode covered, at least 1.

    Returns:
        (number of covered modes, 0..K; share of samples within the radius of a mode, 0..1)

    Raises:
        ValueError: an argument out of its range, different d, or values that are not finite.

    Source: Srivastava et al. 2017, arXiv:1705.07761.
    """
    return coverage_of_modes(nearest_modes(points, modes, radius), least)


def coverage_of_modes(counts: Tensor, least: int) -> tuple[int, float]:
    """What :func:`mode_coverage` gives, from the counts of :func:`nearest_modes`."""
    if least < 1:
        raise ValueError(f"least must be at least 1, not {least}")
    near = counts[:-1]
    return int((near >= least).sum()), float(near.sum() / counts.sum())


def class_coverage(logits, target=None, *, least: int = 1) -> tuple[int, float]:
    """How many classes a classifier finds among samples, and how far their shares are from the wanted ones.

    Args:
        logits: class logits ``[n, K]``, tensor on any device or array, n >= 1; the largest decides.
        target: wanted shares ``[K]``, all above 0 (they are divided by their sum); None is equal shares.
        least: samples that make a class covered, at least 1.

    Returns:
        (number of covered classes, 0..K; KL divergence of the shares of the samples from the target, in nats)

    Raises:
        ValueError: an argument out of its range, or values that are not finite.

    Source: Metz et al. 2017, arXiv:1611.02163 (Stacked MNIST: 1000 classes, n = 26,000 in later papers).
    """
    logits = checked(logits, "logits", least=1)
    return coverage_of_classes(torch.bincount(logits.argmax(1), minlength=logits.shape[1]), target, least)


def coverage_of_classes(counts: Tensor, target, least: int) -> tuple[int, float]:
    """What :func:`class_coverage` gives, from the number of samples [K] in each class."""
    target = torch.ones_like(counts, dtype=torch.float64) if target is None else float64(target).to(counts.device)
    if target.shape != counts.shape or not (target > 0).all():
        raise ValueError(f"target must be {len(counts)} shares above 0, not {target.tolist()}")
    if least < 1:
        raise ValueError(f"least must be at least 1, not {least}")
    shares = counts / counts.sum(dtype=torch.float64)
    kl = torch.xlogy(shares, shares / (target / target.sum())).sum()
    return int((counts >= least).sum()), float(kl)
