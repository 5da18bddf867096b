import pytest
import torch

from diffgan_fast.data import FloatData, ImageData, load
from diffgan_fast.metrics import DomainClassifier, features


@pytest.fixture
def blobs(monkeypatch, tmp_path):
    """300 labelled 8x8 images of three easy classes; short training, a cache of its own."""
    monkeypatch.setenv("DIFFGAN_FAST_CACHE", str(tmp_path))
    monkeypatch.setattr(features, "IMAGES_SEEN", 2000)
    labels = torch.arange(300) % 3
    pixels = torch.randint(0, 60, (300, 1, 8, 8), generator=torch.Generator().manual_seed(0))
    pixels[torch.arange(300), 0, 2 * labels] += 180
    return ImageData(pixels.to(torch.uint8), labels, name="blobs")


def test_shipped_digits_classifier():
    test = load("digits", split="test")
    net = DomainClassifier.for_data(test)
    d, logits = net(test.batch(slice(None)))
    accuracy = (logits.argmax(1) == test.labels).double().mean().item()
    assert accuracy >= 0.97 and accuracy == pytest.approx(net.accuracy, abs=0.003)
    assert d.shape == (360, 64) and not d.requires_grad and not net.training
    assert features.DIGITS_WEIGHTS.stat().st_size < 300_000
    assert len(net.hash) == 16 and net.hash == DomainClassifier.load(features.DIGITS_WEIGHTS).hash
    assert DomainClassifier.for_data(test.subset(20)).hash == net.hash


def test_images_are_rounded_to_uint8_first():
    data = load("digits", split="test", subset=50)
    net, x = DomainClassifier.for_data(data), data.batch(slice(None))
    for a, b in zip(net(x), net(x + 0.4 / 127.5 * (2 * torch.rand_like(x) - 1)), strict=True):
        assert torch.equal(a, b)
    assert not torch.equal(net(x)[0], net(x + 2 / 127.5)[0])


def test_training_is_deterministic_and_leaves_the_global_generator_alone(blobs):
    torch.manual_seed(1)
    before = torch.get_rng_state()
    net = DomainClassifier.train_on(blobs)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(2)
    assert DomainClassifier.train_on(blobs).hash == net.hash
    assert net.accuracy == 1.0


def test_cache(blobs, tmp_path, monkeypatch):
    net = DomainClassifier.for_data(blobs)
    (file,) = (tmp_path / "classifiers").iterdir()
    assert blobs.fingerprint in file.name
    monkeypatch.setattr(DomainClassifier, "train_on", None)  # the second time nothing is trained
    again = DomainClassifier.for_data(blobs)
    assert (again.hash, again.accuracy, again.shape, again.classes) == (net.hash, net.accuracy, (1, 8, 8), 3)
    for a, b in zip(net(blobs.batch([0, 1])), again(blobs.batch([0, 1])), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("shape, d", [((1, 8, 8), 64), ((3, 12, 9), 64), ((1, 28, 28), 128), ((3, 64, 48), 128)])
def test_sizes(shape, d):
    f, logits = DomainClassifier(shape, 5).eval()(torch.zeros(2, *shape))
    assert f.shape == (2, d) and logits.shape == (2, 5)


def test_what_does_not_fit_is_named(blobs):
    with pytest.raises(ValueError, match="no labels.*pass labels= .*, or another extractor"):
        DomainClassifier.for_data(ImageData(blobs.images))
    with pytest.raises(ValueError, match=r"must be images .* not points \[3, 2\]"):
        DomainClassifier.for_data(FloatData(torch.zeros(3, 2), torch.arange(3)))
    with pytest.raises(ValueError, match="must hold at least 2 images to train a classifier on, not 1"):
        DomainClassifier.for_data(blobs.subset(1))
    with pytest.raises(ValueError, match="at least 8"):
        DomainClassifier((1, 4, 8), 3)
    with pytest.raises(ValueError, match="classes must be at least 2, not 1"):
        DomainClassifier((1, 8, 8), 1)
    with pytest.raises(ValueError, match=r"images must be \[n, 1, 8, 8\], not \[2, 1, 9, 8\]"):
        DomainClassifier((1, 8, 8), 3)(torch.zeros(2, 1, 9, 8))


@pytest.mark.slow
@pytest.mark.parametrize("name, least", [("mnist", 0.97), ("cifar10", 0.5)])
def test_real_data(real_data, monkeypatch, tmp_path, name, least):
    monkeypatch.setenv("DIFFGAN_FAST_CACHE", str(tmp_path))
    assert DomainClassifier.for_data(load(name, root=real_data)).accuracy >= least
