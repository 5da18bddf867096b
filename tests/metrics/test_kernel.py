import numpy as np
import pytest
import torch

from diffgan_fast.metrics import kernel, kid
from tests.metrics import library_values


def features(n, d, seed, scale=1.0, shift=0.0):
    return np.random.RandomState(seed).standard_normal((n, d)) * scale + shift


def kid_by_double_sum(x, y):
    def k(a, b):
        return (float(np.dot(a, b)) / len(a) + 1) ** 3

    n, m = len(x), len(y)
    xx = sum(k(x[i], x[j]) for i in range(n) for j in range(n) if i != j) / (n * (n - 1))
    yy = sum(k(y[i], y[j]) for i in range(m) for j in range(m) if i != j) / (m * (m - 1))
    return xx + yy - 2 * sum(k(a, b) for a in x for b in y) / (n * m)


@pytest.mark.parametrize("tile", [1, 7, 512])
def test_kid_equals_the_double_sum(monkeypatch, tile):
    monkeypatch.setattr(kernel, "TILE", tile)
    x, y = features(23, 5, 1), features(17, 5, 2, 1.1, 0.3)
    assert kid(x, y) == pytest.approx(kid_by_double_sum(x, y), rel=1e-11)


def test_kid_of_equal_laws_is_centred_and_has_both_signs():
    values = [kid(features(60, 4, 2 * i), features(60, 4, 2 * i + 1)) for i in range(300)]
    assert min(values) < 0 < max(values)
    assert abs(np.mean(values)) < 3 * np.std(values) / np.sqrt(len(values))
    assert kid(features(60, 4, 0), features(60, 4, 1, shift=1.0)) > 10 * np.std(values)


def test_kid_subset_of_everything_is_the_full_value():
    x, y = features(30, 5, 1), features(30, 5, 2)
    mean, std = kid(x, y, subsets=3, subset_size=30)
    assert mean == pytest.approx(kid(x, y), rel=1e-9) and std == pytest.approx(0, abs=1e-12)
    assert kid(x, y, subsets=3, subset_size=9) == kid(x, y, subsets=3, subset_size=9)
    assert kid(x, y, subsets=3, subset_size=9) != kid(x, y, subsets=3, subset_size=9, seed=1)


@pytest.mark.parametrize("n, m, tile", [(60, 50, 16), (60, 50, 512), (500, 400, 512)])
def test_both_routes_give_the_mean_over_subsets(monkeypatch, n, m, tile):
    """Kernel values shared by all subsets (60 and 50 rows), or computed for each (500 and 400): the double sum."""
    monkeypatch.setattr(kernel, "TILE", tile)
    x, y = features(n, 5, 1), features(m, 5, 2, 1.1, 0.3)
    draw = np.random.RandomState(4).choice
    values = []
    for _ in range(12):
        of_y, of_x = draw(m, 20, replace=False), draw(n, 20, replace=False)
        values.append(kid_by_double_sum(x[of_x], y[of_y]))
    mean, std = kid(x, y, subsets=12, subset_size=20, seed=4)
    assert (mean, std) == (pytest.approx(np.mean(values), rel=1e-10), pytest.approx(np.std(values), rel=1e-10))


@pytest.mark.parametrize("name", ["many", "few"])
def test_values_of_the_libraries(name):
    """torch-fidelity over subsets (fake first, rng_seed 2020), torchmetrics of all pairs of equal numbers."""
    (real, fake), stored = library_values.features(name), library_values.stored(name)
    m = len(fake)
    found = kid(real, fake, subsets=20, subset_size=m // 3, seed=2020)
    assert found == pytest.approx(stored["torch-fidelity: kid, 20 subsets"], rel=1e-9)
    assert kid(real[:m], fake) == pytest.approx(stored["torchmetrics: kid of the first"], rel=1e-9)


def test_tensors_are_taken_and_computed_in_float64():
    x, y = torch.randn(30, 8) + 100, torch.randn(20, 8) + 100
    assert kid(x, y) == kid(x.double().numpy(), y.double().numpy())


X = features(10, 3, 0)


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: kid(X * np.nan, X), "real must be finite"),
        (lambda: kid(X, X, subsets=0), "subsets must be at least 1"),
        (lambda: kid(X, X, subsets=2, subset_size=11), "subset_size must be 2..10, not 11"),
    ],
)
def test_what_does_not_fit_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()
