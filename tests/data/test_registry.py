import gzip
import hashlib
import http.server
import struct
import threading
from dataclasses import replace

import numpy as np
import pytest
import torch

from diffgan_fast.data import datasets, load, registry

MNIST_TRAIN = [5923, 6742, 5958, 6131, 5842, 5421, 5918, 6265, 5851, 5949]
MNIST_TEST = [980, 1135, 1032, 1010, 982, 892, 958, 1028, 974, 1009]


def idx(array):
    return struct.pack(f">HBB{array.ndim}I", 0, 8, array.ndim, *array.shape) + array.tobytes()


def counts(data):
    return torch.bincount(data.labels).tolist()


def test_digits_are_those_of_scikit_learn():
    sklearn_datasets = pytest.importorskip("sklearn.datasets")
    images, labels = sklearn_datasets.load_digits(return_X_y=True)
    train, test = load("digits"), load("digits", split="test")
    assert (len(train), len(test), train.shape, train.num_classes) == (1437, 360, (1, 8, 8), 10)
    in_test = np.zeros(1797, bool)
    in_test[np.argsort(labels, kind="stable")[::5]] = True
    for data, chosen in ((test, in_test), (train, ~in_test)):
        expected = np.rint(images[chosen].reshape(-1, 1, 8, 8) * 255 / 16)
        np.testing.assert_array_equal(data.images.numpy(), expected)
        np.testing.assert_array_equal(data.labels.numpy(), labels[chosen])


def test_digits_split_is_stratified():
    shares = np.array(counts(load("digits", split="test"))) / np.array(
        [178, 182, 177, 183, 181, 182, 181, 179, 174, 180]
    )
    assert abs(shares - 0.2).max() < 0.006
    assert registry._DIGITS.stat().st_size < 100_000


def test_mnist(real_data):
    train, test = load("mnist", root=real_data), load("mnist", root=real_data, split="test")
    assert counts(train) == MNIST_TRAIN and counts(test) == MNIST_TEST
    pixels = train.images.double() / 255
    assert pixels.mean().item() == pytest.approx(0.13066, abs=1e-5)
    assert pixels.std().item() == pytest.approx(0.30811, abs=1e-5)


def test_cifar10_subset(real_data):
    train, test = load("cifar10", root=real_data), load("cifar10", root=real_data, split="test")
    assert counts(train) == [396, 366, 420, 384, 422, 393, 414, 385, 407, 413]
    assert counts(test) == [103, 89, 100, 103, 90, 86, 112, 102, 106, 109]
    assert train.shape == (3, 32, 32) and train.classes[test.labels[0]] == "cat"


def write_idx(folder, value):
    folder.mkdir(parents=True, exist_ok=True)
    images, labels = np.full((4, 8, 8), value, np.uint8), np.arange(4, dtype=np.uint8)
    (folder / "train-images-idx3-ubyte").write_bytes(idx(images))
    (folder / "train-labels-idx1-ubyte.gz").write_bytes(gzip.compress(idx(labels)))


def value(name, **kw):
    return load(name, **kw).images.unique().item()


def test_search_order(offline, tmp_path, monkeypatch):
    write_idx(tmp_path / "debian" / "fashion-mnist", 1)
    assert value("fashion-mnist") == 1
    write_idx(tmp_path / "env", 2)
    monkeypatch.setenv("DIFFGAN_FAST_DATA", str(tmp_path / "env"))
    assert value("fashion-mnist") == 2 and value("mnist") == 2
    write_idx(tmp_path / "env" / "mnist", 3)
    assert value("mnist") == 3
    write_idx(tmp_path / "root", 4)
    assert value("mnist", root=tmp_path / "root") == 4
    monkeypatch.setenv("DIFFGAN_FAST_DATA", str(tmp_path / "env" / "mnist"))
    assert value("mnist") == 3
    assert value("fashion-mnist") == 1  # a folder called mnist does not hold Fashion-MNIST


@pytest.mark.parametrize("name", ["mnist", "fashion-mnist", "cifar10"])
def test_missing_data_says_where_it_looked_and_what_to_do(offline, tmp_path, name):
    with pytest.raises(FileNotFoundError) as error:
        load(name, root=tmp_path / "nowhere")
    message = str(error.value)
    for part in (
        name,
        str(tmp_path / "nowhere"),
        "DIFFGAN_FAST_DATA: not given",
        "no network for http",
        "Put the files",
    ):
        assert part in message


def test_download_is_checked_and_cached(tmp_path, monkeypatch):
    """From a server on this machine: a wrong checksum is refused, the right one is fetched once."""
    write_idx(tmp_path / "served", 9)
    images, labels = sorted((tmp_path / "served").iterdir())
    handler = type("Quiet", (http.server.SimpleHTTPRequestHandler,), {"log_message": lambda *_: None})
    server = http.server.ThreadingHTTPServer(
        ("127.0.0.1", 0), lambda *a: handler(*a, directory=str(tmp_path / "served"))
    )
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.delenv("DIFFGAN_FAST_DATA", raising=False)
    monkeypatch.setenv("DIFFGAN_FAST_CACHE", str(tmp_path / "cache"))
    md5 = {file.name: hashlib.md5(file.read_bytes()).hexdigest() for file in (images, labels)}
    source = replace(registry._SOURCES["mnist"], url=f"http://127.0.0.1:{server.server_port}/", md5={"train": md5})
    monkeypatch.setitem(registry._SOURCES, "mnist", replace(source, md5={"train": {images.name: "0" * 32}}))
    with pytest.raises(FileNotFoundError, match="hash"):
        load("mnist")
    monkeypatch.setitem(registry._SOURCES, "mnist", source)
    assert value("mnist") == 9
    server.shutdown()
    server.server_close()
    assert value("mnist") == 9


def test_names_and_splits():
    assert {"digits", "mnist", "fashion-mnist", "cifar10"} <= set(datasets())
    assert all(isinstance(line, str) and "\n" not in line for line in datasets().values())
    with pytest.raises(ValueError, match="split must be one of"):
        load("digits", split="validation")
