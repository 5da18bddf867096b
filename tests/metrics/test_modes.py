import numpy as np
import pytest
from scipy import special

from diffgan_fast.metrics import class_coverage, inception_score, mode_coverage
from tests.metrics import library_values


def features(n, d, seed, scale=1.0, shift=0.0):
    return np.random.RandomState(seed).standard_normal((n, d)) * scale + shift


def test_inception_score_of_the_extremes():
    classes = 7
    one_hot = 1e4 * np.eye(classes)[np.arange(70) % classes]
    assert inception_score(one_hot) == pytest.approx((classes, 0))
    assert inception_score(one_hot, splits=10) == pytest.approx((classes, 0))
    assert inception_score(np.tile(features(1, classes, 0), (50, 1))) == pytest.approx((1, 0))


def test_inception_score_equals_its_entropies():
    p = special.softmax(features(100, 6, 3), axis=1)
    mutual = -(p.mean(0) * np.log(p.mean(0))).sum() + (p * np.log(p)).sum(1).mean()
    assert inception_score(np.log(p) + 5)[0] == pytest.approx(np.exp(mutual), rel=1e-12)


@pytest.mark.parametrize("name", ["many", "few"])
def test_values_of_torch_fidelity(name):
    """The fake features as logits, without its shuffling."""
    logits, stored = library_values.features(name)[1], library_values.stored(name)
    assert inception_score(logits, splits=3) == pytest.approx(stored["torch-fidelity: is, 3 splits"], rel=1e-9)


RING = 3 * np.stack([np.cos(np.arange(8) * np.pi / 4), np.sin(np.arange(8) * np.pi / 4)], 1)


def test_modes_that_samples_reach():
    points = np.repeat(RING[:5], [10, 5, 1, 3, 1], 0) + 0.01
    far = np.array([[0.0, 0.0], [9.0, 9.0]])
    assert mode_coverage(points, RING, 0.1) == (5, 1.0)
    assert mode_coverage(np.concatenate([points, far]), RING, 0.1) == (5, pytest.approx(20 / 22))
    assert mode_coverage(points, RING, 0.1, least=3) == (3, 1.0)
    assert mode_coverage(far, RING, 0.1) == (0, 0.0)


def test_three_standard_deviations_hold_what_a_rayleigh_law_says():
    points = np.repeat(RING, 5000, 0) + features(40000, 2, 0, 0.05)
    covered, share = mode_coverage(points, RING, 0.15)
    assert covered == 8 and share == pytest.approx(1 - np.exp(-4.5), abs=0.003)


def test_classes_that_samples_reach():
    balanced = np.eye(5)[np.arange(100) % 5]
    assert class_coverage(balanced) == (5, pytest.approx(0, abs=1e-12))
    assert class_coverage(balanced[:1]) == (1, pytest.approx(np.log(5)))
    three = np.eye(5)[np.repeat([0, 2, 4], [5, 3, 2])]
    target = np.array([4, 2, 2, 1, 1])
    expected = special.rel_entr([0.5, 0, 0.3, 0, 0.2], target / 10).sum()
    assert class_coverage(three, target, least=3) == (2, pytest.approx(expected))


X = features(10, 3, 0)


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: inception_score(X, splits=6), "splits must be 1..5, not 6"),
        (lambda: inception_score(X * np.nan), "logits must be finite"),
        (lambda: mode_coverage(X, RING, 1), "modes must have 3 columns as points have, not 2"),
        (lambda: mode_coverage(X, X, 0), "radius must be above 0, not 0"),
        (lambda: mode_coverage(X, X, 1, least=0), "least must be at least 1, not 0"),
        (lambda: class_coverage(X, [1, 2]), "target must be 3 shares above 0"),
        (lambda: class_coverage(X, [1, 0, 2]), "target must be 3 shares above 0"),
        (lambda: class_coverage(X, least=0), "least must be at least 1, not 0"),
    ],
)
def test_what_does_not_fit_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()
