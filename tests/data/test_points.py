import numpy as np
import pytest
import torch

from diffgan_fast.data import FloatData, datasets, load

NAMES = ("circle", "dino", "gaussians25", "line", "moons", "ring")
# rows 0, 1 and -1, and the sums of the columns, of what the source's functions give for n = 100,000
SOURCE = {
    "circle": ([[1.3061609268188477, 2.7078216075897217], [-0.028793690726161003, 3.023280143737793],
                [2.065131664276123, -2.1217570304870605]], [1016.0224784953941, -425.93620111795815]),
    "dino": ([[-2.347043991088867, 0.7537657022476196], [0.5299329161643982, -2.4447245597839355],
              [1.0404047966003418, -3.2701096534729004]], [1617.0241816996968, -1775.5362918591418]),
    "line": ([[1.0958242416381836, 3.510985851287842], [-0.2444862425327301, 3.5809781551361084],
              [1.7232773303985596, -3.6581623554229736]], [249.97466027904716, -532.132554516691]),
}  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_splits_are_fixed_points_of_one_law(name):
    train, test = load(name), load(name, split="test")
    assert isinstance(train, FloatData) and train.points and train.name == name and train.labels is None
    assert train.values.shape == (100_000, 2) and test.values.shape == (10_000, 2)
    assert torch.equal(train.values, load(name).values)
    assert not torch.equal(train.values[:10_000], test.values)
    for moment in (torch.Tensor.mean, torch.Tensor.std):
        assert torch.allclose(moment(train.values, 0), moment(test.values, 0), atol=0.06)
    assert datasets()[name].startswith("2-D points")
    with pytest.raises(ValueError, match="split must be one of"):
        load(name, split="validation")


@pytest.mark.parametrize("name", SOURCE)
def test_points_are_those_of_the_source(name):
    values = load(name).values.numpy()
    rows, sums = SOURCE[name]
    np.testing.assert_array_equal(values[[0, 1, -1]], np.array(rows, np.float32))
    np.testing.assert_allclose(values.astype(np.float64).sum(0), sums, atol=1e-6)


def test_moons_are_those_of_scikit_learn():
    make_moons = pytest.importorskip("sklearn.datasets").make_moons
    for split, n, seed in (("train", 100_000, 42), ("test", 10_000, 43)):
        points, _ = make_moons(n, noise=0.03, random_state=seed)
        expected = np.stack((2 * (points[:, 0] + 0.3) - 1, 3 * (points[:, 1] + 0.3) - 1), 1)
        np.testing.assert_allclose(load("moons", split=split).values, expected, atol=1e-6)


def test_moons_without_scikit_learn():
    values = load("moons").values
    rows = [[1.7407301664352417, -1.5832256078720093], [2.2178232669830322, -1.4060792922973633]]
    assert torch.allclose(values[:2], torch.tensor(rows), atol=1e-6)
    assert values.double().sum(0).tolist() == pytest.approx([60011.15707593, 65020.75888098], abs=0.01)


def test_circle_is_17_blobs_of_three_masses():
    values = load("circle").values.double().numpy()
    radius = np.hypot(*values.T)
    origin = radius < 1
    assert radius[origin].max() <= 0.09 and np.abs(radius[~origin] - 3).max() <= 0.0901
    angles = np.degrees(np.arctan2(*values[~origin].T[::-1])) % 360
    found = np.round(angles / 0.1) * 0.1
    centres = np.unique(np.round(np.degrees(np.arctan2(*np.mgrid[-2:3, -2:3].reshape(2, -1)[::-1])) % 360, 6))
    centres = np.union1d(centres, [0.0])
    nearest = centres[np.abs((found[:, None] - centres + 180) % 360 - 180).argmin(1)]
    assert len(centres) == 16 and np.abs((angles - nearest + 180) % 360 - 180).max() < 1.8
    masses = np.array([np.mean(nearest == c) for c in centres]) * (1 - origin.mean())
    expected = np.where(np.isclose(centres % 45, 0), 2 / 25, 1 / 25)
    assert np.abs(masses - expected).max() < 0.004 and abs(origin.mean() - 1 / 25) < 0.004


def test_the_dino_is_the_datasaurus():
    from diffgan_fast.data.points import DINO

    centres = np.loadtxt(DINO, delimiter=",", skiprows=1)
    assert centres.shape == (142, 2)
    assert centres.mean(0).round(3).tolist() == [54.263, 47.832]
    assert centres.std(0, ddof=1).round(3).tolist() == [16.765, 26.935]
    assert np.corrcoef(centres.T)[0, 1] == pytest.approx(-0.0645, abs=5e-5)
    assert DINO.with_name("DINO_SOURCE.md").is_file()


def test_the_ring_is_round_and_thin():
    values = load("ring").values.double().numpy()
    radius, angle = np.hypot(*values.T), np.arctan2(*values.T)
    assert radius.mean() == pytest.approx(3, abs=1e-3) and radius.std() == pytest.approx(0.05, abs=1e-3)
    shares = np.histogram(angle, 36, (-np.pi, np.pi))[0] / len(angle)
    assert np.abs(shares - 1 / 36).max() < 5 * np.sqrt(1 / 36 / len(angle))


def test_line_fills_its_rectangle():
    values = load("line").values
    assert (values.abs() <= torch.tensor([2.0, 4.0])).all() and (
        values.abs().amax(0) > torch.tensor([1.99, 3.99])
    ).all()


def test_25_gaussians_on_a_grid():
    data = load("gaussians25")
    centres = np.array([(x, y) for x in range(-4, 5, 2) for y in range(-4, 5, 2)])
    values = data.values.double().numpy()
    nearest = ((values[:, None] - centres) ** 2).sum(2).argmin(1)
    offsets = values - centres[nearest]
    assert np.abs(np.bincount(nearest) / len(values) - 1 / 25).max() < 0.003
    assert np.abs(offsets.std(0) - 0.05).max() < 1e-3 and np.abs(offsets.mean(0)).max() < 1e-3
    assert np.abs(np.cov(offsets.T)[0, 1]) < 3e-5
    modes = data.subset(7).to("cpu").modes  # they go with the points
    assert modes.std == 0.05 and set(map(tuple, modes.centres.tolist())) == set(map(tuple, centres.tolist()))
    assert load("moons").modes is None
