"""Readers of the files that the well-known data sets come in. Nothing here executes what a file says."""

import gzip
import io
import pickle
import struct
import tarfile
import zipfile
import zlib
from math import prod
from pathlib import Path

import numpy as np

Arrays = tuple[np.ndarray, np.ndarray]  # images uint8 [N, C, H, W], labels int64 [N]


def read_idx(path: Path, ndim: int) -> np.ndarray:
    """An IDX file of unsigned bytes (MNIST and its kin), raw or gzipped.

    Args:
        path: the file; gzipped if its name ends in ``.gz``.
        ndim: number of dimensions expected: 3 for images, 1 for labels.

    Returns:
        uint8 array of the shape that the header states.

    Raises:
        ValueError: another magic number, truncated or oversized content, broken gzip; names the file.

    Source: LeCun's description of the format: magic 0x08 (unsigned byte) and ndim, big-endian sizes, data.
    """
    raw = Path(path).read_bytes()
    if str(path).endswith(".gz"):
        try:
            raw = gzip.decompress(raw)
        except (EOFError, OSError, zlib.error) as error:
            raise ValueError(f"{path}: broken or truncated gzip file ({error})") from error
    header = 4 + 4 * ndim
    magic = raw[:4].hex()
    if magic != f"000008{ndim:02x}":
        expected = f"IDX magic 000008{ndim:02x} ({ndim} dimensions)"
        raise ValueError(f"{path}: expected {expected}, found {magic or 'an empty file'}")
    if len(raw) < header:
        raise ValueError(f"{path}: expected a header of {header} bytes, found {len(raw)} bytes")
    shape = struct.unpack(f">{ndim}I", raw[4:header])
    if len(raw) - header != prod(shape):
        raise ValueError(f"{path}: expected {prod(shape)} bytes for {list(shape)}, found {len(raw) - header}")
    return np.frombuffer(raw, np.uint8, offset=header).reshape(shape)


def read_idx_pair(paths: tuple[Path, ...], split: str) -> Arrays:
    """Images and labels of one split from its two IDX files (the split is in their names).

    Raises:
        ValueError: a file is broken, or the two differ in length.
    """
    images, labels = read_idx(paths[0], 3), read_idx(paths[1], 1)
    if len(images) != len(labels):
        raise ValueError(f"{paths[1]}: expected {len(images)} labels (as {paths[0].name}), found {len(labels)}")
    return images[:, None], labels.astype(np.int64)


def read_cifar10(paths: tuple[Path, ...], split: str) -> Arrays:
    """CIFAR-10 in any of its layouts.

    Args:
        paths: one path: a folder of ``*_batch*.bin`` files or of pickled batches, a ``.tar.gz`` of either,
            or an ``.npz`` with x_train, y_train, x_test, y_test (images NHWC).
        split: ``"train"`` or ``"test"``.

    Raises:
        ValueError: a batch is missing, truncated, or holds what a CIFAR-10 batch does not; names the file.

    Source: https://www.cs.toronto.edu/~kriz/cifar.html (3073 bytes an image: label, red, green, blue planes).
    """
    path = paths[0]
    if path.suffix == ".npz":
        return _cifar_npz(path, split)
    stems = [f"data_batch_{i}" for i in range(1, 6)] if split == "train" else ["test_batch"]
    wanted = set(stems) | {f"{stem}.bin" for stem in stems}
    contents = _members(path, wanted)
    parts = []
    for stem in stems:
        where = f"{path}: {stem}"
        if f"{stem}.bin" in contents:
            parts.append(_cifar_binary(contents[f"{stem}.bin"], where))
        elif stem in contents:
            parts.append(_cifar_pickle(contents[stem], where))
        else:
            raise ValueError(f"{where} is missing; expected all of {', '.join(stems)}")
    images, labels = zip(*parts, strict=True)
    return np.concatenate(images), np.concatenate(labels)


def _members(path: Path, wanted: set[str]) -> dict[str, bytes]:
    """Contents of the wanted files of a folder or a tar file, by their names without folders."""
    if path.is_dir():
        return {file.name: file.read_bytes() for file in path.iterdir() if file.name in wanted}
    try:
        with tarfile.open(path) as tar:
            files = [(Path(m.name).name, tar.extractfile(m)) for m in tar if Path(m.name).name in wanted]
            return {name: file.read() for name, file in files if file is not None}
    except (tarfile.TarError, EOFError, OSError, zlib.error) as error:
        raise ValueError(f"{path}: broken or truncated archive ({error})") from error


def _cifar_binary(raw: bytes, where: str) -> Arrays:
    if not raw or len(raw) % 3073:
        raise ValueError(f"{where}.bin: expected a multiple of 3073 bytes, found {len(raw)}")
    rows = np.frombuffer(raw, np.uint8).reshape(-1, 3073)
    return rows[:, 1:].reshape(-1, 3, 32, 32), _cifar_labels(rows[:, 0], len(rows), where)


class _ArraysOnly(pickle.Unpickler):
    """Admits NumPy arrays of plain numbers and Python's own containers, and refuses every other name."""

    def find_class(self, module, name):
        if module in ("numpy.core.multiarray", "numpy._core.multiarray") and name == "_reconstruct":
            return np.empty(0).__reduce__()[0]  # that function, wherever this NumPy keeps it
        if (module, name) == ("numpy", "ndarray"):
            return np.ndarray
        if (module, name) == ("numpy", "dtype"):
            return np.dtype
        if (module, name) == ("_codecs", "encode"):  # how Python 3 writes bytes in protocol 2
            return lambda text, encoding: text.encode("latin1")
        raise pickle.UnpicklingError(f"it asks for {module}.{name}, which no CIFAR-10 batch needs")


def _cifar_pickle(raw: bytes, where: str) -> Arrays:
    try:
        batch = _ArraysOnly(io.BytesIO(raw), encoding="latin1").load()
        rows, labels = batch["data"], batch["labels"]
    except Exception as error:  # a broken pickle raises nearly anything
        raise ValueError(f"{where}: not a pickled CIFAR-10 batch ({error})") from error
    if not isinstance(rows, np.ndarray) or rows.dtype != np.uint8 or rows.ndim != 2 or rows.shape[1] != 3072:
        found = f"{rows.dtype} {list(rows.shape)}" if isinstance(rows, np.ndarray) else type(rows).__name__
        raise ValueError(f"{where}: expected data of uint8 [N, 3072], found {found}")
    return rows.reshape(-1, 3, 32, 32), _cifar_labels(labels, len(rows), where)


def _cifar_npz(path: Path, split: str) -> Arrays:
    try:
        with np.load(path) as file:
            images, labels = file[f"x_{split}"], file[f"y_{split}"]
    except (KeyError, ValueError, OSError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise ValueError(f"{path}: expected an .npz with x_{split} and y_{split} ({error})") from error
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[1:] != (32, 32, 3):
        found = f"{images.dtype} {list(images.shape)}"
        raise ValueError(f"{path}: expected x_{split} of uint8 [N, 32, 32, 3], found {found}")
    return np.ascontiguousarray(images.transpose(0, 3, 1, 2)), _cifar_labels(labels, len(images), str(path))


def _cifar_labels(labels, n: int, where: str) -> np.ndarray:
    labels = np.asarray(labels).ravel().astype(np.int64)
    outside = labels[(labels < 0) | (labels > 9)]
    if len(labels) != n or len(outside):
        found = f"{len(labels)}, {len(outside)} of them outside"
        raise ValueError(f"{where}: expected {n} labels of 0..9, found {found}")
    return labels
