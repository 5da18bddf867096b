"""KL divergence between two sets of points, from distances to nearest neighbours. All arithmetic is float64."""

from functools import cached_property

import numpy as np
from scipy.spatial import cKDTree

from .checks import checked_pair


def _mean_log_distance(points: np.ndarray, among: np.ndarray, rank: int) -> float:
    """Mean natural logarithm of the Chebyshev distance from each point to the one of this rank among others."""
    distances = cKDTree(among).query(points, k=[rank], p=np.inf, workers=-1)[0]
    return float(np.log(distances).mean()) if distances.all() else -np.inf


class RealPoints:
    """Real points, float64 ``[n, d]``, and the distances within them, found once for any number of fake sets."""

    def __init__(self, real: np.ndarray, k: int = 5):
        self.real, self.k = real, k

    @cached_property
    def own_distance(self) -> float:
        """Mean natural logarithm of the distance of each to its k-th neighbour."""
        return _mean_log_distance(self.real, self.real, self.k + 1)

    def kl(self, fake: np.ndarray) -> float:
        """What :func:`knn_kl` gives for float64 ``[m, d]``."""
        (n, d), m, k = self.real.shape, len(fake), self.k
        if k not in range(1, min(n - 1, m) + 1):
            raise ValueError(f"k must be 1..{min(n - 1, m)} for {n} real and {m} fake points, not {k}")
        if not np.isfinite(self.own_distance):
            raise ValueError(
                f"real holds a point more than k = {k} times: drop its copies, add a little noise, or raise k"
            )
        other = _mean_log_distance(self.real, fake, k)
        if not np.isfinite(other):
            raise ValueError(
                f"fake holds a point of real k = {k} times or more: it must not consist of copies of real points"
            )
        return float((np.log(m / (n - 1)) + d * (other - self.own_distance)) / np.log(2))


def knn_kl(real, fake, k: int = 5) -> float:
    """KL divergence of the law of `real` from that of `fake`, in bits, estimated from k-th nearest neighbours.

    [ln(m / (n - 1)) + d (mean ln ν - mean ln ρ)] / ln 2: ρ is the distance of a real point to its k-th neighbour among
    the other real points, ν to its k-th neighbour in fake, both Chebyshev (largest difference of a coordinate). It is
    ``kldiv(real, fake, k)`` of NPEET. Its bias depends on n and m: compare only values with the same numbers of points,
    and with what real points score in fake's place. It may be negative. Points of fake apart from real count only by
    what is missing elsewhere.

    Args:
        real: points ``[n, d]``, tensor or array.
        fake: points ``[m, d]``.
        k: rank of the neighbour, 1 to min(n - 1, m).

    Returns:
        The estimate, in bits.

    Raises:
        ValueError: k out of range, different d, values that are not finite, or so many equal points that a distance is
            0 and its logarithm infinite.

    Source: Wang, Kulkarni and Verdú 2009 (doi:10.1109/TIT.2009.2016060), Eq. 5; NPEET (github.com/gregversteeg/NPEET).
    """
    real, fake = (values.cpu().numpy() for values in checked_pair(real, fake))
    return RealPoints(real, k).kl(fake)
