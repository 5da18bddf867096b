import io
import zipfile

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw
from torch.utils.data import DataLoader, TensorDataset

from diffgan_fast.data import FloatData, ImageData, load, load_test

PIXELS = torch.randint(0, 256, (6, 3, 8, 10), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
LABELS = torch.tensor([0, 1, 2, 0, 1, 2])


@pytest.mark.parametrize(
    "data",
    [
        PIXELS,
        PIXELS.numpy(),
        PIXELS.permute(0, 2, 3, 1).numpy(),
        list(PIXELS),
        [PIXELS[:4], PIXELS[4:]],
        (batch for batch in PIXELS.split(4)),
        [Image.fromarray(p.permute(1, 2, 0).numpy()) for p in PIXELS],
    ],
    ids=["tensor", "array", "NHWC", "samples", "batches", "generator", "PIL"],
)
def test_uint8_images_from_anywhere(data):
    loaded = load(data, labels=LABELS)
    assert isinstance(loaded, ImageData)
    assert torch.equal(loaded.images, PIXELS) and torch.equal(loaded.labels, LABELS)


@pytest.mark.parametrize("wrap", [lambda d: d, lambda d: DataLoader(d, batch_size=4)], ids=["Dataset", "DataLoader"])
@pytest.mark.parametrize("values", [PIXELS, PIXELS / 255.0, torch.randn(6, 2) * 9], ids=["uint8", "float", "points"])
def test_torch_datasets_with_labels(values, wrap):
    loaded = load(wrap(TensorDataset(values, LABELS)))
    assert torch.equal(loaded.values, values) and torch.equal(loaded.labels, LABELS)


def test_grey_and_float64():
    assert load(PIXELS[:, 0]).shape == (1, 8, 10)
    assert load([Image.fromarray(p[0].numpy()) for p in PIXELS]).shape == (1, 8, 10)
    points = load(np.linspace(-9, 9, 20).reshape(10, 2))
    assert isinstance(points, FloatData) and points.points and points.values.dtype == torch.float32


def test_subset_and_data_object():
    data = load(PIXELS, labels=LABELS)
    assert load(data) is data
    assert torch.equal(load(PIXELS, subset=3, seed=5).images, data.subset(3, 5).images)


@pytest.mark.parametrize(
    "data, kw, message",
    [
        ("no-such-data", {}, "data must be one of 'digits'"),
        (3, {}, "data must be a name, .* not int"),
        ([], {}, "empty"),
        ("digits", {"size": 4}, "size must be None for data 'digits', not 4: only a folder or zip"),
        (PIXELS, {"size": 4}, "size must be None for data Tensor"),
        (PIXELS, {"split": "test"}, "split must be 'train'"),
        (PIXELS, {"subset": 7}, "subset must be 1..6"),
        (PIXELS.long(), {}, "data must be uint8 or floating point"),
        (PIXELS.float(), {}, r"float images must lie in \[-1, 1\]"),
        ([PIXELS[0], PIXELS[1, :, :4]], {}, "one shape"),
        (["a", "b"], {}, "tensors, arrays or PIL images"),
        ([(PIXELS[0], 1), PIXELS[1]], {}, "labels with all or no items, not with 1 of 2"),
        ("digits", {"labels": LABELS}, "brings its own"),
    ],
)
def test_what_does_not_fit_is_named(data, kw, message):
    with pytest.raises(ValueError, match=message):
        load(data, **kw)


def save(path, image):
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path)


def solid(colour, size=(20, 12), mode="RGB"):
    return Image.new(mode, size, colour)


def zipped(folder, path):
    with zipfile.ZipFile(path, "w") as archive:
        for file in folder.rglob("*.*"):
            archive.write(file, file.relative_to(folder.parent))  # one folder above everything
    return path


@pytest.fixture
def pets(tmp_path):
    folder = tmp_path / "pets"
    for i, name in enumerate(("dog/b.png", "cat/z.png", "cat/a.bmp", "dog/A.PNG")):
        save(folder / name, solid((10 * i, 50, 60)))
    (folder / "cat" / "notes.txt").write_text("not an image")
    return folder


@pytest.mark.parametrize("pack", [False, True])
def test_folders_and_zips_with_classes(pets, tmp_path, pack):
    data = load(zipped(pets, tmp_path / "pets.zip") if pack else pets)
    assert (data.shape, data.classes, data.name) == ((3, 12, 20), ("cat", "dog"), "pets")
    assert data.labels.tolist() == [0, 0, 1, 1]
    assert data.images[:, 0, 0, 0].tolist() == [20, 10, 30, 0]  # order of names: cat/a, cat/z, dog/A, dog/b


def test_centre_crop_and_lanczos(tmp_path):
    wide = solid((0, 0, 0), (60, 20))
    ImageDraw.Draw(wide).rectangle((20, 0, 39, 19), fill=(255, 100, 7))
    save(tmp_path / "a.png", wide)
    save(tmp_path / "b.png", solid((255, 100, 7), (33, 47)))
    data = load(tmp_path, size=10)
    assert data.shape == (3, 10, 10) and data.labels is None
    assert (data.images == torch.tensor([255, 100, 7], dtype=torch.uint8).view(3, 1, 1)).all()
    photo = Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 40, 3), dtype=np.uint8))
    save(tmp_path / "one" / "photo.png", photo)
    expected = np.asarray(photo.resize((10, 10), Image.Resampling.LANCZOS)).transpose(2, 0, 1)
    np.testing.assert_array_equal(load(tmp_path / "one", size=10).images[0], expected)


def test_grey_files_stay_grey_unless_one_is_coloured(tmp_path):
    save(tmp_path / "a.png", solid(7, mode="L"))
    assert load(tmp_path).shape == (1, 12, 20)
    save(tmp_path / "b.png", solid((1, 2, 3)))
    assert load(tmp_path).images[:, :, 0, 0].tolist() == [[7, 7, 7], [1, 2, 3]]


def test_train_and_test_folders(tmp_path):
    for i, name in enumerate(("train/cat/a.png", "train/dog/b.png", "test/cat/c.png")):
        save(tmp_path / name, solid((i, 0, 0)))
    assert load(tmp_path).images[:, 0, 0, 0].tolist() == [0, 1]
    assert load(tmp_path).labels.tolist() == [0, 1]
    assert load(tmp_path, split="test").images[:, 0, 0, 0].tolist() == [2]
    assert load_test(tmp_path).images[:, 0, 0, 0].tolist() == [2]
    with pytest.raises(ValueError, match="split 'val'"):
        load(tmp_path, split="val")


@pytest.mark.parametrize(
    "names, train, test",
    [
        (["a.png", "test/b.png", "x/c.png"], [0, 2], [1]),  # what is not for testing is trained on
        (["test/a.png", "test/b.png"], [0, 1], None),  # samples in a folder that happens to be called so
        (["a.png", "b.png"], [0, 1], None),
        (["train/test/a.png", "test/train/b.png"], [0], [1]),  # the topmost folder decides
        (["train/a.png", "b.png"], [0], None),
    ],
)
@pytest.mark.parametrize("pack", [False, True])
def test_what_is_a_test_split(tmp_path, names, train, test, pack):
    for i, name in enumerate(names):
        save(tmp_path / "f" / name, solid((i, 0, 0)))
    path = zipped(tmp_path / "f", tmp_path / "f.zip") if pack else tmp_path / "f"
    assert load(path).images[:, 0, 0, 0].tolist() == train
    found = load_test(path)
    assert (None if found is None else found.images[:, 0, 0, 0].tolist()) == test


def test_test_splits_of_other_data():
    assert len(load_test("digits")) == 360 and load_test(PIXELS) is None
    with pytest.raises(ValueError, match="data must be one of 'digits'"):
        load_test("no-such-data")


def test_broken_folders_are_named(tmp_path):
    with pytest.raises(ValueError, match="holds no image"):
        load(tmp_path)
    (tmp_path / "note.txt").write_text("x")
    with pytest.raises(ValueError, match="folder or a zip"):
        load(tmp_path / "note.txt")
    save(tmp_path / "a.png", solid((1, 2, 3)))
    save(tmp_path / "b.png", solid((1, 2, 3), (8, 8)))
    with pytest.raises(ValueError, match=r"differ in size: 20x12 \(a.png\), 8x8 \(b.png\); pass size="):
        load(tmp_path)
    content = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)).save(content, "png")
    (tmp_path / "b.png").write_bytes(content.getvalue()[:2000])
    with pytest.raises(ValueError, match="b.png is broken or truncated"):
        load(tmp_path, size=8)
    (tmp_path / "b.png").write_bytes(b"nothing")
    with pytest.raises(ValueError, match="b.png is not a readable image"):
        load(tmp_path, size=8)
    save(tmp_path / "b.png", Image.fromarray(np.zeros((8, 8), np.uint16)))
    with pytest.raises(ValueError, match="expected 8 bits"):
        load(tmp_path, size=8)
