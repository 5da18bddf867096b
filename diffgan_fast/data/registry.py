"""The data sets known by name: what they are, where their files may lie, and where they can be fetched."""

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from .base import Data, ImageData
from .formats import Arrays, read_cifar10, read_idx_pair
from .points import POINTS, make_points

SPLITS = ("train", "test")
_DIGITS = Path(__file__).with_name("digits.npz")
_DEBIAN = Path("/usr/share/datasets")  # Debian's package dataset-fashion-mnist


def cache_dir() -> Path:
    """Folder for downloads and trained classifiers: $DIFFGAN_FAST_CACHE, or one in the user's cache."""
    if own := os.environ.get("DIFFGAN_FAST_CACHE"):
        return Path(own).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "diffgan_fast"


@dataclass(frozen=True)
class _Source:
    """A data set of files: how to recognise them in a folder, read them and download them."""

    help: str
    classes: tuple[str, ...]
    find: Callable[[Path, str], tuple[Path, ...] | None]  # (folder, split) -> files, if complete
    read: Callable[[tuple[Path, ...], str], Arrays]
    url: str
    md5: dict[str, dict[str, str]]  # split -> file name -> checksum


def _find_idx(folder: Path, split: str) -> tuple[Path, ...] | None:
    stem = "train" if split == "train" else "t10k"
    found = []
    for name in (f"{stem}-images-idx3-ubyte", f"{stem}-labels-idx1-ubyte"):
        files = [file for file in (folder / name, folder / f"{name}.gz") if file.is_file()]
        found += files[:1]
    return tuple(found) if len(found) == 2 else None


def _find_cifar10(folder: Path, split: str) -> tuple[Path, ...] | None:
    first = "data_batch_1" if split == "train" else "test_batch"
    for inner in (folder / "cifar-10-batches-bin", folder / "cifar-10-batches-py", folder):
        if (inner / f"{first}.bin").is_file() or (inner / first).is_file():
            return (inner,)
    archives = [folder / f"cifar-10-{kind}.tar.gz" for kind in ("binary", "python")]
    archives += sorted(folder.glob("cifar10*.npz"))
    return next(((file,) for file in archives if file.is_file()), None)


def _idx_md5(*sums: str) -> dict[str, dict[str, str]]:
    """Checksums of the four files: training images and labels, test images and labels."""
    train, test = ((f"{stem}-images-idx3-ubyte.gz", f"{stem}-labels-idx1-ubyte.gz") for stem in ("train", "t10k"))
    return {"train": dict(zip(train, sums[:2], strict=True)), "test": dict(zip(test, sums[2:], strict=True))}


_DIGIT_NAMES = tuple("0123456789")
_CIFAR_MD5 = {"cifar-10-binary.tar.gz": "c32a1d4ab5d03f1284b67883e8d87530"}
_SOURCES = {
    "mnist": _Source(
        "MNIST: 60,000 + 10,000 handwritten digits, 1x28x28, 10 classes",
        _DIGIT_NAMES,
        _find_idx,
        read_idx_pair,
        "https://ossci-datasets.s3.amazonaws.com/mnist/",
        _idx_md5(
            "f68b3c2dcbeaaa9fbdd348bbdeb94873",
            "d53e105ee54ea40749a09fcbcd1e9432",
            "9fb629c4189551a2d022fa330f9573f3",
            "ec29112dd5afa0611ce80d1b7f02629c",
        ),
    ),
    "fashion-mnist": _Source(
        "Fashion-MNIST: 60,000 + 10,000 pictures of clothes, 1x28x28, 10 classes",
        tuple("T-shirt,trouser,pullover,dress,coat,sandal,shirt,sneaker,bag,ankle boot".split(",")),
        _find_idx,
        read_idx_pair,
        "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/",
        _idx_md5(
            "8d4fb7e6c68d591d4c3dfef9ec88bf0d",
            "25c81989df183df01b3e8a0aad5dffbe",
            "bef4ecab320f06d8554ea6380940ec79",
            "bb300cfdad3c16e7a12a480ee83cd310",
        ),
    ),
    "cifar10": _Source(
        "CIFAR-10: 50,000 + 10,000 photographs, 3x32x32, 10 classes",
        ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"),
        _find_cifar10,
        read_cifar10,
        "https://www.cs.toronto.edu/~kriz/",
        {"train": _CIFAR_MD5, "test": _CIFAR_MD5},
    ),
}
_DIGITS_HELP = "1,797 handwritten digits, 1x8x8, 10 classes (UCI; 1,437 + 360); comes with the package"


def datasets() -> dict[str, str]:
    """The registered data sets: name -> one line of help."""
    return {"digits": _DIGITS_HELP} | {name: source.help for name, source in _SOURCES.items()} | POINTS


def load_named(name: str, root: str | os.PathLike | None, split: str) -> Data:
    """A registered data set; see :func:`diffgan_fast.data.load`."""
    if split not in SPLITS:
        raise ValueError(f"split must be one of {SPLITS}, not {split!r}")
    if name == "digits":
        return _digits(split)
    if name in POINTS:
        return make_points(name, split)
    source = _SOURCES[name]
    images, labels = source.read(_locate(name, source, root, split), split)
    return ImageData(torch.tensor(images), torch.tensor(labels), source.classes, name)


def _digits(split: str) -> ImageData:
    """The carried digits. Sorted by class (stable, file order), positions 0, 5, 10, … are the test split."""
    with np.load(_DIGITS) as file:
        images, labels = file["images"], file["labels"]
    test = np.zeros(len(labels), bool)
    test[np.argsort(labels, kind="stable")[::5]] = True
    chosen = test if split == "test" else ~test
    pixels = torch.from_numpy(np.rint(images[chosen] * (255 / 16)).astype(np.uint8))[:, None]
    return ImageData(pixels, torch.from_numpy(labels[chosen].astype(np.int64)), _DIGIT_NAMES, "digits")


def is_here(name: str) -> bool:
    """Whether both splits of a data set of files lie in a folder of this machine or among the downloads."""
    source, downloads = _SOURCES[name], cache_dir() / "data" / name
    return all(
        _find(name, source, None, split)[0] or all((downloads / file).is_file() for file in source.md5[split])
        for split in SPLITS
    )


def _locate(name: str, source: _Source, root: str | os.PathLike | None, split: str) -> tuple[Path, ...]:
    """The files of one split: found in a folder, or downloaded into the user's cache."""
    files, looked = _find(name, source, root, split)
    return files or _download(name, source, split, looked)


def _find(
    name: str, source: _Source, root: str | os.PathLike | None, split: str
) -> tuple[tuple[Path, ...] | None, list[str]]:
    """The files of one split, if a folder of this machine has them; and where they were looked for."""
    places = {"root": root, "DIFFGAN_FAST_DATA": os.environ.get("DIFFGAN_FAST_DATA"), "Debian": _DEBIAN}
    looked: list[str] = []
    for place, folder in places.items():
        if not folder:
            looked.append(f"{place}: not given")
            continue
        base = Path(folder).expanduser()
        looked.append(f"{place}: {base / name} and {base}")
        if files := source.find(base / name, split):
            return files, looked
        # MNIST and Fashion-MNIST share their file names: a folder called after one does not hold the other
        if base.name not in _SOURCES.keys() - {name} and (files := source.find(base, split)):
            return files, looked
    return None, looked


def _download(name: str, source: _Source, split: str, looked: list[str]) -> tuple[Path, ...]:
    import pooch

    folder = cache_dir() / "data" / name
    try:
        return tuple(
            Path(pooch.retrieve(source.url + file, known_hash=f"md5:{md5}", fname=file, path=folder))
            for file, md5 in source.md5[split].items()
        )
    except (OSError, ValueError) as error:
        looked.append(f"download of {source.url} into {folder}: {error}")
        raise FileNotFoundError(
            f"data {name!r} ({split} split: {', '.join(source.md5[split])}) was not found. Looked in\n  "
            + "\n  ".join(looked)
            + "\nPut the files into one of these folders, or name their folder by root= or DIFFGAN_FAST_DATA."
        ) from error
