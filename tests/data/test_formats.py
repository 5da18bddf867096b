import gzip
import io
import os
import pickle
import struct
import tarfile

import numpy as np
import pytest

from diffgan_fast.data.formats import read_cifar10, read_idx, read_idx_pair

RNG = np.random.default_rng(0)
PIXELS = RNG.integers(0, 256, (10, 3072), dtype=np.uint8)
LABELS = np.arange(10, dtype=np.uint8)
BATCHES = [f"data_batch_{i}" for i in range(1, 6)] + ["test_batch"]


def idx(array):
    return struct.pack(f">HBB{array.ndim}I", 0, 8, array.ndim, *array.shape) + array.tobytes()


@pytest.mark.parametrize("packed", [False, True])
def test_idx_round_trip(tmp_path, packed):
    images = RNG.integers(0, 256, (7, 5, 3), dtype=np.uint8)
    paths = tuple(tmp_path / f"{name}{'.gz' if packed else ''}" for name in ("images", "labels"))
    for path, array in zip(paths, (images, LABELS[:7]), strict=True):
        path.write_bytes(gzip.compress(idx(array)) if packed else idx(array))
    got, labels = read_idx_pair(paths, "train")
    np.testing.assert_array_equal(got, images[:, None])
    assert labels.dtype == np.int64 and labels.tolist() == list(range(7))


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("a", idx(LABELS), r"expected IDX magic 00000803 .*found 00000801"),
        ("a", b"", "found an empty file"),
        ("a", idx(PIXELS[:, :, None])[:9], "header of 16 bytes, found 9"),
        ("a", idx(PIXELS[:, :, None])[:-1], r"expected 30720 bytes .*found 30719"),
        ("a.gz", gzip.compress(idx(PIXELS[:, :, None]))[:-100], "broken or truncated gzip"),
        ("a.gz", idx(PIXELS[:, :, None]), "broken or truncated gzip"),
    ],
)
def test_broken_idx_is_named(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message) as error:
        read_idx(tmp_path / name, 3)
    assert str(tmp_path / name) in str(error.value)


def test_idx_pair_of_different_lengths(tmp_path):
    (tmp_path / "i").write_bytes(idx(PIXELS[:, :, None]))
    (tmp_path / "l").write_bytes(idx(LABELS[:9]))
    with pytest.raises(ValueError, match="expected 10 labels"):
        read_idx_pair((tmp_path / "i", tmp_path / "l"), "train")


def binary(i):
    return np.concatenate([(LABELS + i)[:, None] % 10, PIXELS], 1).astype(np.uint8).tobytes()


def pickled(i):
    batch = {"data": PIXELS, "labels": ((LABELS + i) % 10).tolist(), "batch_label": f"batch {i}"}
    return pickle.dumps(batch, protocol=2)


def write_cifar(folder, layout):
    if layout == "npz":
        images = PIXELS.reshape(10, 3, 32, 32).transpose(0, 2, 3, 1)
        path = folder / "cifar10.npz"
        labels = np.concatenate([(LABELS + i) % 10 for i in range(6)])
        train = np.tile(images, (5, 1, 1, 1))
        np.savez(path, x_train=train, y_train=labels[:50], x_test=images, y_test=labels[50:])
        return path
    files = {f"{b}.bin": binary(i) for i, b in enumerate(BATCHES)}
    if layout.startswith("pickle"):
        files = {b: pickled(i) for i, b in enumerate(BATCHES)}
    if not layout.endswith("tar"):
        for name, content in files.items():
            (folder / name).write_bytes(content)
        return folder
    path = folder / "cifar.tar.gz"
    with tarfile.open(path, "w:gz") as tar:
        for name, content in files.items():
            member = tarfile.TarInfo(f"cifar-10/{name}")
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return path


@pytest.mark.parametrize("layout", ["binary", "binary tar", "pickle", "pickle tar", "npz"])
def test_every_cifar_layout_gives_the_same(tmp_path, layout):
    path = write_cifar(tmp_path, layout)
    images, labels = read_cifar10((path,), "test")
    np.testing.assert_array_equal(images, PIXELS.reshape(10, 3, 32, 32))
    assert labels.dtype == np.int64 and labels.tolist() == [5, 6, 7, 8, 9, 0, 1, 2, 3, 4]
    images, labels = read_cifar10((path,), "train")
    assert images.shape == (50, 3, 32, 32) and labels[10:13].tolist() == [1, 2, 3]


class Evil:
    def __reduce__(self):
        return os.system, ("echo unpickled",)


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("test_batch", pickle.dumps({"data": Evil(), "labels": []}), r"it asks for \w+.system"),
        ("test_batch", pickled(0)[:-50], "not a pickled CIFAR-10 batch"),
        (
            "test_batch",
            pickle.dumps({"data": 1, "labels": []}),
            r"expected data of uint8 \[N, 3072\], found int",
        ),
        ("test_batch", pickle.dumps([1]), "not a pickled CIFAR-10 batch"),
        ("test_batch.bin", binary(0)[:-1], "multiple of 3073 bytes, found 30729"),
        ("test_batch.bin", bytes([99]) + binary(0)[1:], "10 labels of 0..9, found 10, 1 of them outside"),
        ("other", b"", "test_batch is missing"),
    ],
)
def test_broken_or_malicious_cifar_is_refused(tmp_path, capfd, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message) as error:
        read_cifar10((tmp_path,), "test")
    assert str(tmp_path) in str(error.value)
    assert "unpickled" not in capfd.readouterr().out


def test_truncated_tar_and_wrong_npz(tmp_path):
    path = write_cifar(tmp_path, "binary tar")
    path.write_bytes(path.read_bytes()[:-5000])
    with pytest.raises(ValueError, match="broken or truncated archive"):
        read_cifar10((path,), "test")
    np.savez(tmp_path / "a.npz", x_test=PIXELS, y_test=LABELS)
    with pytest.raises(ValueError, match="expected x_test of uint8"):
        read_cifar10((tmp_path / "a.npz",), "test")
    with pytest.raises(ValueError, match="x_train and y_train"):
        read_cifar10((tmp_path / "a.npz",), "train")
