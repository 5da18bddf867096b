import numpy as np
import pytest
import torch
from scipy import linalg, special

from diffgan_fast.metrics import fid, fid_from_statistics, inception_score, kid


def features(n, d, seed, scale=1.0, shift=0.0):
    return np.random.RandomState(seed).standard_normal((n, d)) * scale + shift


def fid_by_sqrtm(x, y):
    """The textbook formula with a matrix square root, in float64."""
    c1, c2 = np.cov(x, rowvar=False), np.cov(y, rowvar=False)
    return np.square(x.mean(0) - y.mean(0)).sum() + np.trace(c1 + c2 - 2 * linalg.sqrtm(c1 @ c2).real)


def fid_by_gram(x, y):
    """The exact value for few rows: eigenvalues of the float64 Gram matrix."""
    xc, yc = x - x.mean(0), y - y.mean(0)
    gram = xc @ yc.T / np.sqrt((len(x) - 1) * (len(y) - 1))
    gram = gram if len(x) <= len(y) else gram.T
    roots = np.sqrt(np.linalg.eigvalsh(gram @ gram.T).clip(0)).sum()
    traces = np.square(xc).sum() / (len(x) - 1) + np.square(yc).sum() / (len(y) - 1)
    return np.square(x.mean(0) - y.mean(0)).sum() + traces - 2 * roots


def kid_by_double_sum(x, y):
    def k(a, b):
        return (float(np.dot(a, b)) / len(a) + 1) ** 3

    n, m = len(x), len(y)
    xx = sum(k(x[i], x[j]) for i in range(n) for j in range(n) if i != j) / (n * (n - 1))
    yy = sum(k(y[i], y[j]) for i in range(m) for j in range(m) if i != j) / (m * (m - 1))
    return xx + yy - 2 * sum(k(a, b) for a in x for b in y) / (n * m)


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


def test_fid_with_constant_features_and_of_itself():
    x, y = features(200, 10, 1), features(150, 10, 2)
    x[:, 3] = y[:, 3] = 0
    without = fid_by_sqrtm(np.delete(x, 3, 1), np.delete(y, 3, 1))
    assert fid(x, y) == pytest.approx(without, rel=1e-6)
    assert fid(x, x) == pytest.approx(0, abs=1e-5)
    assert fid(x[:5], x[:5]) == pytest.approx(0, abs=1e-10)


def test_values_of_torch_fidelity():
    """torch-fidelity 0.4.0 on these features (kid: fake first, rng_seed 2020; is: shuffle=False)."""
    r = np.random.RandomState(7)
    real, fake = r.standard_normal((400, 16)), r.standard_normal((300, 16)) * 1.2 + 0.3
    assert fid(real, fake) == pytest.approx(2.7651155948538246, rel=1e-9)
    mean, std = kid(real, fake, subsets=20, subset_size=100, seed=2020)
    assert mean == pytest.approx(0.44135022254509104, rel=1e-9)
    assert std == pytest.approx(0.07737087884229485, rel=1e-9)
    assert inception_score(fake, splits=3) == pytest.approx((1.7112140138131082, 0.03026415501109829), rel=1e-9)


def test_tensors_are_taken_and_computed_in_float64():
    x, y = torch.randn(30, 8, requires_grad=True) + 100, torch.randn(20, 8) + 100
    x64, y64 = x.detach().double().numpy(), y.double().numpy()
    assert fid(x, y) == fid(x64, y64) and kid(x, y) == kid(x64, y64)


@pytest.mark.parametrize("block", [1, 100, 1 << 22])
def test_kid_equals_the_double_sum(monkeypatch, block):
    monkeypatch.setattr("diffgan_fast.metrics.distances._BLOCK", block)
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


X, NAN = features(10, 3, 0), np.full((10, 3), np.nan)


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: fid(X[:1], X), r"real must be \[n, d\] with n >= 2 .* not \[1, 3\]"),
        (lambda: fid(X, X[:, 0]), r"fake must be .* not \[10\]"),
        (lambda: fid(X, X[:, :2]), "fake must have 3 features as real has, not 2"),
        (lambda: kid(NAN, X), "real must be finite"),
        (lambda: kid(X, X, subsets=0), "subsets must be at least 1"),
        (lambda: kid(X, X, subsets=2, subset_size=11), "subset_size must be 2..10, not 11"),
        (lambda: inception_score(X, splits=6), "splits must be 1..5, not 6"),
        (lambda: inception_score(NAN), "logits must be finite"),
        (lambda: fid_from_statistics(X[0], np.eye(3), X[0], np.eye(2)), r"cov2 must be finite and \[3, 3\]"),
    ],
)
def test_what_does_not_fit_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()
