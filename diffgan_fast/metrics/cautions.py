"""What an evaluation says of itself: which scores are of too few samples, and that samples seem to lie elsewhere."""

from __future__ import annotations

from collections.abc import Sequence

from ..data import Data
from ..data.base import Modes
from .extraction import Extracted, batches
from .reference import Reference

LEAST_OF_MODE = 20  # samples that make a mode covered


class SmallSampleWarning(UserWarning):
    """A score of so few samples that its bias outweighs what it is to tell."""


class SampleRangeWarning(UserWarning):
    """Samples that look as if they lay in another range than the data."""


def few_samples(metrics: Sequence[str], reference: Reference, fake: Extracted) -> list[str]:
    """Why scores of these samples, or against so few real ones, say too little, in sentences."""
    found, d, n = [], fake.features.shape[1], min(len(fake), len(reference.real))
    if "fid" in metrics and n < 5 * d:  # its authors ask for 10,000 of 2048 features
        found.append(
            f"FID is biased upwards where samples are few: {n:,} are for {d:,} features. Take {5 * d:,} or more, "
            "compare only scores of equal n, or ask for KID or fid_infinity."
        )
    if "is" in metrics and fake.logits is not None and len(fake) < 50 * (k := fake.logits.shape[1]):
        # Miller's correction of the entropy of the mean: up to (k - 1) / 2n
        found.append(
            f"IS is biased downwards by up to {(k - 1) / 2 / len(fake):.1%}: {len(fake):,} samples are few for {k:,} "
            f"classes. Take {50 * k:,} or more."
        )
    if "fid_infinity" in metrics and n // 10 < 2 * d:
        found.append(
            f"FID∞ is a line through FIDs of {max(2, n // 10):,} samples and more, of {d:,} features: FID's bias is "
            f"nearly linear only from about {2 * d:,} on. Take {20 * d:,} samples or more."
        )
    if "kl" in metrics and n < 1000:  # of 500 points of equal laws in 2-D: -0.04 ± 0.02 bits
        found.append(
            f"KL of {n:,} points is biased and varies, both by some hundredths of a bit: take 1,000 or more, and "
            "compare only scores of equal n."
        )
    if "modes" in metrics and reference.modes is not None and len(fake) < (least := _modes_need(reference.modes)):
        found.append(
            f"modes: {len(fake):,} samples are {len(fake) / len(reference.modes.centres):.3g} a mode on average, of "
            f"which {LEAST_OF_MODE} make it covered: some are missed by chance. Take {least:,} or more."
        )
    if n < 1000 and (shares := [name for name in metrics if name in ("precision", "recall", "density", "coverage")]):
        found.append(f"{', '.join(shares).capitalize()} of {n:,} samples are coarse: take 1,000 or more.")
    return found


def _modes_need(modes: Modes) -> int:
    """Samples of which a perfect sampler covers all modes: 40 of each, and then hardly ever fewer than 20 of one."""
    return 2 * LEAST_OF_MODE * len(modes.centres)


def out_of_range(low: float, high: float, data: Data) -> str | None:
    """A sentence if images seem to lie in [0, 1] and not in [-1, 1] as the data do."""
    if data.points or low < 0 or all(batch.min() >= 0 for batch in batches(data)):
        return None
    return (
        f"samples lie in {low:.3g}..{high:.3g}, and none is below 0 as images of "
        f"{data.name!r} are: images in [0, 1] must be scaled to [-1, 1] first, samples = 2 * samples - 1."
    )
