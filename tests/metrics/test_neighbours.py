import io
import sys

import numpy as np
import pytest
import torch
from scipy.spatial.distance import cdist
from tqdm import tqdm

from diffgan_fast.metrics import density_coverage, neighbours, prdc, precision_recall
from tests.metrics import library_values


def features(n, d, seed, scale=1.0, shift=0.0):
    return np.random.RandomState(seed).standard_normal((n, d)) * scale + shift


def by_sorting(real, fake, k, density_k):
    """The definitions on full matrices of distances."""
    own_real, own_fake, across = (np.sort(cdist(real, real)), np.sort(cdist(fake, fake)), cdist(real, fake))
    reach, dense, reach_fake = own_real[:, k], own_real[:, density_k], own_fake[:, k]  # column 0 is the sample itself
    return (
        (across <= reach[:, None]).any(0).mean(),
        (across <= reach_fake).any(1).mean(),
        (across < dense[:, None]).sum() / density_k / len(fake),
        (across.min(1) < dense).mean(),
    )


@pytest.mark.parametrize(
    "tile, n, m, k, density_k",
    [
        (1, 20, 15, 3, 5),
        (7, 64, 65, 1, 1),
        (64, 130, 100, 3, 5),
        (64, 64, 65, 1, 1),
        (1024, 130, 100, 3, 5),
        (7, 5, 4, 3, 4),
    ],
)
def test_values_are_those_of_the_definitions(monkeypatch, tile, n, m, k, density_k):
    monkeypatch.setattr(neighbours, "TILE", tile)
    real, fake = features(n, 6, 1), features(m, 6, 2, 1.2, 0.3)
    assert prdc(real, fake, k, density_k) == pytest.approx(by_sorting(real, fake, k, density_k), abs=1e-12)
    assert precision_recall(real, fake, k) == prdc(real, fake, k, density_k)[:2]
    assert density_coverage(real, fake, density_k) == prdc(real, fake, k, density_k)[2:]


@pytest.mark.parametrize("offset", [0.1, 1e4, 1e7])
def test_an_offset_of_all_features_changes_nothing(offset):
    """Against distances by differences in float64; all moved alike, so that only rounding by the offset is left."""
    real, fake = features(150, 6, 1), features(120, 6, 2, 1.2, 0.3)
    real, fake = (of + offset for of in (real, fake))
    assert prdc(real, fake) == pytest.approx(by_sorting(real, fake, 3, 5), abs=1e-12)
    around = neighbours.RealBalls(torch.from_numpy(real)).nearest.sqrt()
    np.testing.assert_allclose(around, np.sort(cdist(real, real))[:, 1:6], rtol=1e-12)
    back = (real - offset, fake - offset)  # what the rounding by the offset left of them
    assert prdc(real, fake) == prdc(*back)


@pytest.mark.parametrize("offset", [0, 3, 10**7])
def test_ties_stay_ties(offset):
    """On whole numbers many distances are equal, and the sphere itself decides: as in exact arithmetic."""
    draw = np.random.RandomState(5).randint
    real, fake = (draw(0, high, (n, 3)) + offset for high, n in ((4, 70), (5, 90)))
    squares = [np.square(a[:, None] - b).sum(2) for a, b in ((real, real), (fake, fake), (real, fake))]
    own_real, own_fake, across = np.sort(squares[0]), np.sort(squares[1]), squares[2]
    expected = (
        (across <= own_real[:, 3:4]).any(0).mean(),
        (across <= own_fake[:, 3]).any(1).mean(),
        (across < own_real[:, 5:6]).sum() / 5 / 90,
        (across.min(1) < own_real[:, 5]).mean(),
    )
    assert prdc(real, fake) == pytest.approx(expected, abs=1e-12)


def test_equal_real_features_have_balls_of_nothing():
    one = np.full((9, 3), 0.1) + 1e6
    assert prdc(one, one + 1) == (0, 0, 0, 0) and prdc(one, one)[:2] == (1, 1)


@pytest.mark.parametrize("name", ["many", "few"])
def test_values_of_the_libraries(name):
    """prdc, and torch-fidelity's precision and recall (k = 3), which it gives as float32."""
    (real, fake), stored = library_values.features(name), library_values.stored(name)
    for k in (3, 5):
        assert prdc(real, fake, k, k) == pytest.approx(stored[f"prdc: k = {k}"], rel=1e-12)
    assert precision_recall(real, fake) == pytest.approx(stored["torch-fidelity: precision, recall"], rel=1e-6)
    assert prdc(real, fake) == prdc(real, fake, 3, 3)[:2] + prdc(real, fake, 5, 5)[2:]


def test_values_of_prdc_where_it_is_installed():
    library = pytest.importorskip("prdc")
    real, fake = features(700, 20, 1), features(500, 20, 2, 0.9, 0.1)
    expected = library.compute_prdc(real, fake, 4)
    assert prdc(real, fake, 4, 4)._asdict() == pytest.approx(expected, rel=1e-12)


def test_identical_sets_and_far_apart_ones():
    x = features(200, 8, 0)
    assert precision_recall(x, x) == (1, 1) and density_coverage(x, x)[1] == 1
    assert prdc(x, x + 100) == (0, 0, 0, 0)


def test_a_missing_mode_costs_recall_and_a_stray_one_precision():
    one, two = features(200, 4, 1), np.concatenate([features(200, 4, 2), features(200, 4, 3, shift=20)])
    precision, recall = precision_recall(two, one)
    assert precision > 0.9 and 0.4 < recall < 0.55
    precision, recall = precision_recall(one, two)
    assert 0.4 < precision < 0.55 and recall > 0.9
    assert density_coverage(two, one)[1] < 0.55 < density_coverage(one, one + 0.01)[1]


def test_the_matrix_of_distances_is_never_held(monkeypatch):
    monkeypatch.setattr(neighbours, "TILE", 50)
    largest, tiles = [], neighbours._tiles

    def watched(*sets):
        for rows, columns, found in tiles(*sets):
            largest.append(found.numel())
            yield rows, columns, found

    monkeypatch.setattr(neighbours, "_tiles", watched)
    prdc(features(400, 3, 1), features(300, 3, 2))
    assert max(largest) == 2500


def test_progress_is_shown_on_a_terminal_where_it_takes_long(monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    def shown():
        monkeypatch.setattr("sys.stderr", Terminal())
        prdc(features(60, 3, 1), features(50, 3, 2))
        return sys.stderr.getvalue()

    assert shown() == ""
    monkeypatch.setattr(neighbours, "tqdm", lambda *args, delay, **options: tqdm(*args, **options))
    assert "neighbours:" in shown()


def test_tensors_are_taken_and_computed_in_float64():
    x, y = torch.randn(60, 8) + 100, torch.randn(50, 8) + 100
    assert prdc(x, y) == prdc(x.double().numpy(), y.double().numpy())


@pytest.mark.gpu
def test_values_on_a_gpu_are_those_on_the_cpu():
    x, y = torch.randn(1500, 32), torch.randn(1300, 32) * 1.1
    assert prdc(x.cuda(), y.cuda()) == pytest.approx(prdc(x, y), abs=1e-12)


X = features(10, 3, 0)


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: prdc(X, X[:, :2]), "fake must have 3 features as real has, not 2"),
        (lambda: prdc(X, X[:4], 4), "k must be 1..3 for 10 real and 4 fake samples, not 4"),
        (lambda: prdc(X, X, 0), "k must be 1..9"),
        (lambda: prdc(X, X, 2.5), "k must be 1..9 .* not 2.5"),
        (lambda: prdc(X, X, 3, 2.5), "density_k must be 1..9 .* not 2.5"),
        (lambda: density_coverage(X, X, 10), "density_k must be 1..9 for 10 real samples, not 10"),
        (lambda: prdc(X, X + np.inf), "fake must be finite"),
    ],
)
def test_what_does_not_fit_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()
