"""Images from a folder or a zip file: STL-10, CelebA, LSUN, AFHQ, FFHQ, or anybody's own."""

import io
import os
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path, PurePosixPath

import numpy as np
import torch
from PIL import Image

from .base import ImageData
from .registry import SPLITS

EXTENSIONS = {".png", ".jpg", ".jpeg", ".bmp", ".gif", ".ppm", ".pgm", ".tif", ".tiff", ".webp"}
_GREY, _DEEP = {"1", "L", "LA"}, {"I", "F", "I;16", "I;16B", "I;16L"}


class _Files:
    """The image files of a folder or zip, sorted by name, with paths relative to it."""

    def __init__(self, path: Path):
        self.path = path
        self.zip = None
        if path.is_dir():
            names = [file.relative_to(path).as_posix() for file in path.rglob("*") if file.is_file()]
        elif zipfile.is_zipfile(path):
            self.zip = zipfile.ZipFile(path)
            names = [name for name in self.zip.namelist() if not name.startswith("__MACOSX/")]
        else:
            raise ValueError(f"data must be a folder or a zip file of images, which {str(path)!r} is not")
        self.names = sorted(n for n in names if PurePosixPath(n).suffix.lower() in EXTENSIONS)

    def open(self, name: str) -> Image.Image:
        try:
            return Image.open(io.BytesIO(self.zip.read(name)) if self.zip else self.path / name)
        except (OSError, zipfile.BadZipFile) as error:
            raise ValueError(f"{self.path}: {name} is not a readable image ({error})") from error

    def pixels(self, name: str, mode: str, size: int | None) -> np.ndarray:
        """uint8 [C, H, W], cropped and resized to size x size if a size is given."""
        with self.open(name) as image:
            try:
                image = image.convert(mode)
            except OSError as error:
                raise ValueError(f"{self.path}: {name} is broken or truncated ({error})") from error
            if size is not None:
                side = min(image.size)
                left, top = (image.width - side) // 2, (image.height - side) // 2
                square = image.crop((left, top, left + side, top + side))  # resize's box= would look beyond it
                image = square.resize((size, size), Image.Resampling.LANCZOS)
            return np.asarray(image).reshape(image.height, image.width, -1).transpose(2, 0, 1)


def read_images(path: str | os.PathLike, *, split: str = "train", size: int | None = None) -> ImageData:
    """All images below a folder or inside a zip file, in the order of their names.

    With ``size``, images are cropped to their central square and resized with Lanczos' filter. They are grey
    if every file is, RGB otherwise. If they lie in two or more sub-folders, these are the classes. Nothing is
    flipped.

    Args:
        path: the folder or zip file.
        split: ``"train"`` or ``"test"``: what lies in a folder of that name. Without a folder ``train``, that is all
            that lies outside ``test``; in a folder of nothing but ``test``, all.
        size: pixels of the square result; None if the files have one size already.

    Returns:
        ImageData of uint8 ``[N, 1 or 3, H, W]``, named after the path.

    Raises:
        ValueError: no image, a broken or 16-bit one, different sizes without ``size``, no such split.
    """
    files = _Files(Path(path))
    names = _split(files.names, split)
    if not names and split != "train":
        raise ValueError(f"split {split!r}: {path} has no folder of that name with images")
    if not names:
        raise ValueError(f"data {str(path)!r} holds no image; known are {', '.join(sorted(EXTENSIONS))}")
    modes: set[str] = set()
    sizes: dict[tuple[int, int], str] = {}  # size -> the first file that has it
    for name in names:
        with files.open(name) as image:  # reads the header only
            if image.mode in _DEEP:
                raise ValueError(f"{path}: {name} has mode {image.mode!r}; expected 8 bits a channel")
            modes.add(image.mode)
            sizes.setdefault(image.size, name)
    if size is None and len(sizes) > 1:
        some = ", ".join(f"{w}x{h} ({name})" for (w, h), name in list(sizes.items())[:3])
        raise ValueError(f"{path}: the images differ in size: {some}; pass size= (--size) to crop and resize them")
    mode = "L" if modes <= _GREY else "RGB"
    width, height = (size, size) if size is not None else next(iter(sizes))
    out = np.empty((len(names), len(mode), height, width), np.uint8)

    def decode(i: int) -> None:
        out[i] = files.pixels(names[i], mode, size)

    with ThreadPoolExecutor() as pool:
        list(pool.map(decode, range(len(names))))  # list() so that an error is raised
    labels, classes = _classes(names)
    return ImageData(torch.from_numpy(out), labels, classes, Path(path).stem)


def has_test_split(path: str | os.PathLike) -> bool:
    """Whether a folder or zip file of images holds a part ``test`` beside what is trained on."""
    names = _Files(Path(path)).names
    test = _split(names, "test")
    return bool(test) and test != _split(names, "train")


def _split(names: list[str], split: str) -> list[str]:
    """The files of a split; the topmost folder called after one decides."""
    of = {name: next((part for part in PurePosixPath(name).parts[:-1] if part in SPLITS), None) for name in names}
    found = [name for name in names if of[name] == split]
    if split == "train" and not found:
        found = [name for name in names if of[name] is None] or names
    return found


def _classes(names: list[str]) -> tuple[torch.Tensor | None, tuple[str, ...]]:
    """Labels from the first folder in which the paths differ, if every image lies in one."""
    folders = [PurePosixPath(name).parts[:-1] for name in names]
    shared = len(os.path.commonprefix(folders))
    if any(len(folder) == shared for folder in folders):
        return None, ()
    classes = sorted({folder[shared] for folder in folders})
    return torch.tensor([classes.index(folder[shared]) for folder in folders]), tuple(classes)
