import numpy as np
import pytest
import torch
from scipy import linalg

from diffgan_fast.metrics import FID, Moments, fid, fid_from_statistics, fid_infinity
from tests.metrics import library_values


def features(n, d, seed, scale=1.0, shift=0.0):
    return np.random.RandomState(seed).standard_normal((n, d)) * scale + shift


def fid_by_sqrtm(x, y):
    """The textbook formula with a matrix square root, in float64."""
    c1, c2 = np.cov(x, rowvar=False), np.cov(y, rowvar=False)
    return np.square(x.mean(0) - y.mean(0)).sum() + np.trace(c1 + c2 - 2 * linalg.sqrtm(c1 @ c2).real)


def fid_by_gram(x, y):
    """The exact value for few rows: the nuclear norm of the float64 Gram matrix."""
    xc, yc = x - x.mean(0), y - y.mean(0)
    gram = xc @ yc.T / np.sqrt((len(x) - 1) * (len(y) - 1))
    roots = np.linalg.svd(gram, compute_uv=False).sum()
    traces = np.square(xc).sum() / (len(x) - 1) + np.square(yc).sum() / (len(y) - 1)
    return np.square(x.mean(0) - y.mean(0)).sum() + traces - 2 * roots


@pytest.mark.parametrize("s", [0.5, 1.0, 2.0])
def test_fid_closed_form(s):
    d, mu = 12, np.linspace(-1, 1, 12)
    expected = mu @ mu + d * (1 - s) ** 2
    assert fid_from_statistics(np.zeros(d), np.eye(d), mu, s * s * np.eye(d)) == pytest.approx(expected, abs=1e-10)
    # whitened samples have exactly mean 0 and covariance 1, so fid must give the closed form too
    x = features(50, d, 0)
    x = (x - x.mean(0)) @ np.linalg.inv(linalg.cholesky(np.cov(x, rowvar=False)))
    assert fid(x, s * x + mu) == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize("n, m", [(200, 150), (41, 500), (500, 41)])
def test_fid_equals_sqrtm_for_many_rows(n, m):
    x, y = features(n, 40, 1), features(m, 40, 2, 1.3, 0.2)
    assert fid(x, y) == pytest.approx(fid_by_sqrtm(x, y), rel=1e-6)


@pytest.mark.parametrize("n, m", [(20, 25), (20, 40), (40, 20), (20, 300), (300, 20), (40, 40)])
def test_fid_is_exact_for_few_rows(n, m):
    x, y = features(n, 40, 1), features(m, 40, 2, 1.3, 0.2)
    assert fid(x, y) == pytest.approx(fid_by_gram(x, y), rel=1e-8)
    assert fid(x, y) == pytest.approx(fid_by_sqrtm(x, y), rel=1e-5)


@pytest.mark.parametrize("power", [0.5, 1.0, 2.0])
@pytest.mark.parametrize("n, m", [(60, 80), (80, 80), (50, 50)])
def test_fid_is_exact_where_features_vary_by_orders_of_magnitude(n, m, power):
    """As those of networks do; and with copies among the samples, as collapsed generators make them."""
    decay = np.arange(1, 81) ** -power
    x, y = features(n, 80, 1) * decay, features(m, 80, 2, 1.1, 0.01) * decay
    assert fid(x, y) == pytest.approx(fid_by_gram(x, y), rel=1e-9)
    y[::2] = y[1::2]
    assert fid(x, y) == pytest.approx(fid_by_gram(x, y), rel=1e-9)


def test_fid_against_a_covariance_where_features_vary():
    decay = 1 / np.arange(1, 81)
    x, y = features(50, 80, 1) * decay, features(400, 80, 2, 1.1, 0.01) * decay
    rows, root = (x - x.mean(0)) / 7, linalg.cholesky(np.cov(y, rowvar=False), lower=True)
    traces = np.cov(x, rowvar=False).trace() + np.cov(y, rowvar=False).trace()
    norm = np.linalg.svd(rows @ root, compute_uv=False).sum()
    want = np.square(x.mean(0) - y.mean(0)).sum() + traces - 2 * norm
    assert fid(x, y) == pytest.approx(want, rel=1e-6)


def test_fid_with_constant_features_and_of_itself():
    x, y = features(200, 10, 1), features(150, 10, 2)
    x[:, 3] = y[:, 3] = 0
    without = fid_by_sqrtm(np.delete(x, 3, 1), np.delete(y, 3, 1))
    assert fid(x, y) == pytest.approx(without, rel=1e-6)
    assert fid(x, x) == pytest.approx(0, abs=1e-5)
    assert fid(x[:5], x[:5]) == pytest.approx(0, abs=1e-10)


@pytest.mark.parametrize("n, m", [(400, 300), (10, 300), (400, 12), (9, 8)])
def test_fid_of_moments_is_that_of_features(n, m):
    """The cached route: means and covariances, or few rows, of either side; also gathered in batches and merged."""
    x, y = features(n, 16, 7), features(m, 16, 8, 1.2, 0.3)
    expected = fid_by_gram(x, y) if min(n, m) <= 16 else fid_by_sqrtm(x, y)
    known = Moments.from_statistics(x.mean(0), np.cov(x, rowvar=False), n)
    assert fid(Moments(x), y) == pytest.approx(expected, rel=1e-8)
    assert fid(x, Moments(y)) == pytest.approx(expected, rel=1e-8)
    if n > 16:
        assert fid(known, y) == pytest.approx(expected, rel=1e-8)
    streamed = FID()
    for part in np.array_split(x, 5):
        streamed.update(real=part)
    for part in np.array_split(y, 3):
        streamed.update(fake=torch.from_numpy(part))
    assert streamed.compute() == pytest.approx(fid(x, y), rel=1e-10)


def test_moments_are_exact_far_from_zero_in_any_order_and_bounded_in_memory():
    x = features(301, 6, 1) + 1e6
    many, late = Moments(), Moments(x[:4])
    for part in np.array_split(x, 70):
        many.update(part)
    late.merge(Moments(x[4:]))
    early = Moments(x[4:]).merge(Moments(x[:4]))
    for moments in (many, late, early):
        assert moments.n == 301 and moments.rows is None
        np.testing.assert_allclose(moments.mean, x.mean(0), rtol=1e-14)
        np.testing.assert_allclose(moments.covariance, np.cov(x, rowvar=False), atol=1e-8)
    few = Moments(x[:3]).merge(Moments(x[3:6]))
    np.testing.assert_allclose(few.rows.T @ few.rows, np.cov(x[:6], rowvar=False), atol=1e-8)
    np.testing.assert_allclose(few.covariance, np.cov(x[:6], rowvar=False), atol=1e-8)


@pytest.mark.parametrize("library", ["torch-fidelity", "pytorch-fid", "torchmetrics"])
@pytest.mark.parametrize("name, rel", [("many", 1e-9), ("few", 1e-5)])
def test_values_of_the_libraries(library, name, rel):
    """Of few samples the libraries root a singular product; the float64 Gram matrix has the exact value."""
    real, fake = library_values.features(name)
    assert fid(real, fake) == pytest.approx(library_values.stored(name)[f"{library}: fid"], rel=rel)
    if name == "few":
        assert fid(real, fake) == pytest.approx(fid_by_gram(real, fake), rel=1e-8)


def test_tensors_are_taken_and_computed_in_float64():
    x, y = torch.randn(30, 8, requires_grad=True) + 100, torch.randn(20, 8) + 100
    assert fid(x, y) == fid(x.detach().double().numpy(), y.double().numpy())


def test_extrapolation_removes_the_bias_of_few_samples():
    d, shift = 16, 0.25
    exact, x = d * shift**2, Moments.from_statistics(np.zeros(d), np.eye(d), 10**6)
    plain, extrapolated = (
        np.mean([score(x, features(200, d, seed, shift=shift)) for seed in range(20)]) for score in (fid, fid_infinity)
    )
    assert plain - exact > 0.1 and abs(extrapolated - exact) < 0.3 * (plain - exact)


def test_extrapolation_is_a_line_in_one_over_the_number():
    x, y = features(300, 5, 1), features(100, 5, 2, 1.2)
    order = np.random.Generator(np.random.PCG64(3))
    sizes = np.array([20, 60, 100])
    values = [fid_by_sqrtm(x, y[order.permutation(100)[:size]]) for size in sizes]
    expected = np.polyfit(1 / sizes, values, 1)[1]
    assert fid_infinity(x, y, points=3, least=20, seed=3) == pytest.approx(expected, rel=1e-6)


X = features(10, 3, 0)


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: fid(X[:1], X), r"real must be \[n, d\] with n >= 2 .* not \[1, 3\]"),
        (lambda: fid(X, X[:, 0]), r"fake must be .* not \[10\]"),
        (lambda: fid(X, X[:, :2]), "fake must have 3 features as real has, not 2"),
        (lambda: fid(X, Moments(X[:1])), "at least 2 vectors, not 1"),
        (lambda: fid(X, Moments()), "no features yet"),
        (lambda: fid_infinity(X, X, points=1), "points must be at least 2, not 1"),
        (lambda: fid_infinity(X, X, least=10), "least must be 2..9, not 10"),
        (lambda: Moments(X).update(X[:, :2]), "features must have 3 columns as before, not 2"),
        (lambda: Moments(X).merge(Moments(X[:, :2])), "features must have 3 columns as before, not 2"),
        (lambda: Moments(X * np.nan), "features must be finite"),
        (lambda: Moments.from_statistics(X[0], np.eye(2), 9), r"covariance must be finite and \[3, 3\]"),
        (lambda: Moments.from_statistics(X[0], np.eye(3), 1), "n must be at least 2, not 1"),
        (lambda: fid_from_statistics(X[0], -np.eye(3), X[0], np.eye(3)), "cov1 must be a covariance"),
        (lambda: fid_from_statistics(X[0], np.eye(3), X[0], np.eye(3) + np.eye(3, k=1)), "cov2 must be a covariance"),
        (lambda: fid_from_statistics(X[0], np.eye(3), X[0], np.eye(2)), r"cov2 must be finite and \[3, 3\]"),
    ],
)
def test_what_does_not_fit_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()
