import numpy as np
import pytest
import torch

from diffgan_fast.data import FloatData, ImageData, to_uint8


def images(n=20, labels=None, **kw):
    pixels = torch.arange(n * 3 * 2 * 2) % 256
    return ImageData(pixels.to(torch.uint8).reshape(n, 3, 2, 2), labels, **kw)


def test_batch_is_the_exact_float_formula_and_to_uint8_inverts_it():
    every = ImageData(torch.arange(256, dtype=torch.uint8).reshape(-1, 1, 1, 1))
    x = every.batch(slice(None))
    exact = np.arange(256, dtype=np.float64) / 127.5 - 1
    assert x.dtype == torch.float32 and x.shape == (256, 1, 1, 1)
    np.testing.assert_allclose(x.flatten().numpy(), exact, atol=1e-7)
    assert x.min() == -1 and x.max() == 1
    assert torch.equal(to_uint8(x), every.images)


def test_to_uint8_rounds_and_clamps():
    assert to_uint8(torch.tensor([-9.0, -1, -0.99, 0.0, 0.003, 1, 9])).tolist() == [
        0,
        0,
        1,
        128,
        128,
        255,
        255,
    ]


@pytest.mark.parametrize("index", [torch.tensor([3, 0, 3]), [3, 0, 3], np.array([3, 0, 3])])
def test_indices_of_any_kind(index):
    data = images(labels=torch.arange(20))
    assert torch.equal(to_uint8(data.batch(index)), data.images[[3, 0, 3]])
    assert data.labels_of(index).tolist() == [3, 0, 3]


def test_sizes_and_classes():
    data = images(labels=torch.arange(20) % 4)
    assert (len(data), data.shape, data.num_classes, data.points) == (20, (3, 2, 2), 4, False)
    assert images(labels=torch.zeros(20, dtype=torch.int64), classes=("a", "b")).num_classes == 2
    assert images().num_classes == 0
    points = FloatData(torch.randn(5, 2) * 100)
    assert points.points and points.shape == (2,)
    assert torch.equal(points.batch([4, 1]), points.values[[4, 1]])


def test_batches_may_be_on_another_device():
    """The meta device stands in for one."""
    meta = torch.device("meta")
    there = images(labels=torch.arange(20)).with_batches_on(meta)
    for data in (there, there.subset(7)):
        assert data.device == meta and data.values.device.type == "cpu"
        assert data.batch([1, 2]).device == data.labels_of([1, 2]).device == meta
        assert data.batch([1, 2]).shape == (2, 3, 2, 2) and data.batch([1, 2]).dtype == torch.float32
    assert there.to("cpu").device.type == "cpu" and images().device.type == "cpu"
    points = FloatData(torch.randn(5, 2)).with_batches_on(meta)
    assert points.batch(slice(None)).device == points.subset(2).device == meta


def test_subset_is_fixed_seeded_and_without_replacement():
    data = images(labels=torch.arange(20))
    first, again, other = data.subset(7), data.subset(7), data.subset(7, seed=1)
    assert torch.equal(first.labels, again.labels) and not torch.equal(first.labels, other.labels)
    assert len(set(first.labels.tolist())) == 7
    assert torch.equal(first.images, data.images[first.labels])
    assert sorted(data.subset(20).labels.tolist()) == list(range(20))
    with pytest.raises(ValueError, match=r"subset must be 1..20 .*not 21"):
        data.subset(21)


def test_fingerprint_tells_content_shape_and_labels_apart():
    data = images()
    variants = [
        data,
        ImageData(data.images.reshape(20, 1, 4, 3)),
        ImageData(data.images.flip(0)),
        images(labels=torch.zeros(20, dtype=torch.int64)),
        images(labels=torch.ones(20, dtype=torch.int64)),
    ]
    assert len({v.fingerprint for v in variants}) == len(variants)
    assert images(name="other").fingerprint == data.fingerprint
    assert data.to("cpu").fingerprint == data.fingerprint


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: ImageData(torch.zeros(2, 1, 4, 4)), "images must be uint8"),
        (lambda: ImageData(torch.zeros(0, 1, 4, 4, dtype=torch.uint8)), "empty"),
        (lambda: images(labels=torch.zeros(20)), "labels must be int64"),
        (lambda: images(labels=torch.zeros(19, dtype=torch.int64)), r"labels must be int64 \[20\]"),
        (lambda: images(labels=torch.full((20,), 2), classes=("a", "b")), r"labels must be 0..1, not 2..2"),
        (lambda: FloatData(torch.zeros(3, 4, 4)), "values must be float32"),
        (lambda: FloatData(torch.full((2, 2), torch.nan)), "finite"),
        (lambda: FloatData(torch.full((2, 1, 4, 4), 255.0)), r"\[-1, 1\], not 255..255"),
        (lambda: images().labels_of([0]), "no labels"),
    ],
)
def test_what_does_not_fit_is_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()
