import numpy as np
import pytest
import torch

from diffgan_fast.data import load
from diffgan_fast.metrics import knn_kl


def normal(n, d, seed, scale=1.0, shift=0.0):
    return np.random.RandomState(seed).standard_normal((n, d)) * scale + shift


def by_sorting(real, fake, k):
    """All distances, sorted, in float64."""
    (n, d), m = real.shape, len(fake)
    own = np.sort(np.abs(real[:, None] - real).max(2), 1)[:, k]  # column 0 is the point itself
    other = np.sort(np.abs(real[:, None] - fake).max(2), 1)[:, k - 1]
    return np.log2(m / (n - 1)) + d * np.mean(np.log2(other) - np.log2(own))


@pytest.mark.parametrize(
    "n, m, d, k", [(300, 200, 2, 5), (200, 300, 2, 1), (150, 90, 1, 5), (90, 150, 5, 3), (6, 5, 2, 5)]
)
def test_value_is_that_of_sorted_distances(n, m, d, k):
    real, fake = normal(n, d, 1), normal(m, d, 2, 1.3, 0.2)
    assert knn_kl(real, fake, k) == pytest.approx(by_sorting(real, fake, k), rel=1e-9, abs=1e-12)


def test_value_is_that_of_npeet():
    """NPEET's formula and its trees (scikit-learn's), on the source's data and their float32 coordinates."""
    tree = pytest.importorskip("sklearn.neighbors").KDTree
    real, fake = load("moons", subset=3000).values.numpy(), load("moons", split="test", subset=2000).values.numpy()
    own = tree(real, metric="chebyshev").query(real, k=6)[0][:, 5]
    other = tree(fake, metric="chebyshev").query(real, k=5)[0][:, 4]
    expected = (np.log(2000) - np.log(2999) + 2 * (np.log(other).mean() - np.log(own).mean())) / np.log(2)
    assert knn_kl(real, fake) == pytest.approx(expected, abs=1e-9)
    assert knn_kl(torch.from_numpy(real), torch.from_numpy(fake)) == knn_kl(real, fake)


def test_value_of_gaussians_in_closed_form():
    scale, shift = 1.5, np.array([0.5, -0.3])
    exact = (2 * np.log(scale) + (2 + shift @ shift) / (2 * scale**2) - 1) / np.log(2)
    values = [knn_kl(normal(4000, 2, 2 * i), normal(4000, 2, 2 * i + 1, scale, shift)) for i in range(6)]
    assert abs(np.mean(values) - exact) < 4 * np.std(values) / np.sqrt(6) + 0.01


def test_equal_laws_score_near_zero_with_both_signs():
    values = [knn_kl(normal(500, 2, 2 * i), normal(500, 2, 2 * i + 1)) for i in range(40)]
    assert min(values) < 0 < max(values) and abs(np.mean(values)) < 0.05


def test_translation_scale_and_order_do_not_matter():
    real, fake = normal(200, 2, 1), normal(150, 2, 2, 1.2)
    value = knn_kl(real, fake)
    assert knn_kl(real * 8 + 3, fake * 8 + 3) == pytest.approx(value, abs=1e-9)
    assert knn_kl(real[::-1], np.random.RandomState(0).permutation(fake)) == pytest.approx(value, abs=1e-12)


def test_a_perfect_sampler_of_the_source_scores_as_measured():
    """All 100,000 real points against 10,000 fresh ones; the bands of three other draws, a little wider."""
    for name, low, high in (
        ("circle", 0.01, 0.04),
        ("dino", -0.10, -0.06),
        ("line", 0.0, 0.025),
        ("moons", -0.04, -0.015),
    ):
        assert low < knn_kl(load(name).values, load(name, split="test").values) < high, name


X = normal(20, 2, 0)


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: knn_kl(X, X[:, 0]), r"fake must be \[n, d\] .* not \[20\]"),
        (lambda: knn_kl(X[:1], X), "real must be .* n >= 2"),
        (lambda: knn_kl(X, normal(20, 3, 0)), "fake must have 2 features as real has, not 3"),
        (lambda: knn_kl(X, X * np.nan), "fake must be finite"),
        (lambda: knn_kl(X, X, 0), r"k must be 1..19 for 20 real and 20 fake points, not 0"),
        (lambda: knn_kl(X, X + 1, 2.5), r"k must be 1..19 .* not 2.5"),
        (lambda: knn_kl(X, X[:4] + 1), r"k must be 1..4 .* not 5"),
        (lambda: knn_kl(X[:5], X + 1), r"k must be 1..4 .* not 5"),
        (lambda: knn_kl(np.repeat(X, 6, 0), X + 1), "real holds a point more than k = 5 times: drop its copies"),
        (lambda: knn_kl(X, np.repeat(X[:2], 5, 0)), "fake holds a point of real k = 5 times or more"),
    ],
)
def test_what_does_not_fit_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_copies_up_to_k_are_allowed():
    assert np.isfinite(knn_kl(np.repeat(X, 5, 0), np.repeat(X + 0.1, 5, 0)))
    assert np.isfinite(knn_kl(X, np.repeat(X, 4, 0)))
