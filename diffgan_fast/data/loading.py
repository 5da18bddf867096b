"""`load`: whatever a user calls data becomes a data set in memory."""

import os
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from .base import Data, FloatData, ImageData
from .registry import datasets, load_named


def load(data, *, root=None, split="train", subset=None, seed=0, labels=None, size=None) -> Data:
    """A data set in memory, from a name, files, an array or another library's loader.

    ``data`` may be

    - a registered name (see :func:`datasets`): looked for in ``root`` and in ``$DIFFGAN_FAST_DATA`` (in the
      sub-folder of the data's name, then in the folder itself), in Debian's packages, and in the user's
      cache, into which it is else downloaded (``$DIFFGAN_FAST_CACHE`` moves it);
    - a folder or zip file of images: read in the order of their names; two or more sub-folders are classes;
    - a tensor or array: uint8 images ``[N, C, H, W]``, ``[N, H, W, C]`` or ``[N, H, W]``, float images
      ``[N, C, H, W]`` in [-1, 1], or points ``[N, D]``;
    - a torch Dataset: its samples (tensor, array or PIL image), alone or as (sample, label);
    - a finite iterable: its batches or samples, alone or paired with labels, collected once;
    - a Data object: taken as it is.

    Float images are taken to lie in [-1, 1]: torchvision's ToTensor gives 0..1, which must be scaled first.

    Args:
        root: folder in which a registered data set is looked for first.
        split: ``"train"`` or ``"test"``, for names and for folders with sub-folders so called.
        subset: keep this many samples, chosen at random by ``seed``; None keeps all.
        seed: of that choice.
        labels: int64 ``[N]``, for data that brings none.
        size: crop images of a folder or zip to their central square and resize them to this many pixels. Only theirs.

    Returns:
        ImageData for uint8 images, FloatData for float images and points.

    Raises:
        ValueError: an argument that does not fit, or a broken file; the message names it.
        FileNotFoundError: the files of a registered name were neither found nor downloaded.
    """
    named = isinstance(data, str) and data in datasets()
    if size is not None and (named or not isinstance(data, str | os.PathLike)):
        given = repr(data) if named else type(data).__name__
        raise ValueError(f"size must be None for data {given}, not {size}: only a folder or zip of images is resized")
    if named:
        found = load_named(data, root, split)
    elif isinstance(data, str | os.PathLike):
        found = _from_files(data, split, size)
    elif split != "train":
        raise ValueError(f"split must be 'train' for data given as {type(data).__name__}, not {split!r}")
    elif isinstance(data, Data):
        found = data
    elif isinstance(data, Tensor | np.ndarray):
        found = _wrap(data, None)
    else:
        found = _collect(data)
    if labels is not None:
        if found.labels is not None:
            raise ValueError(f"labels must be None: data {found.name!r} brings its own")
        found = found._with(found.values, torch.as_tensor(labels).to(torch.int64), found.batch_device)
    return found if subset is None else found.subset(subset, seed)


def load_test(data, *, size=None) -> Data | None:
    """The test split of what :func:`load` would take, if it is a name, or a folder or zip file with a part ``test``.

    Raises:
        ValueError: an argument that does not fit, or a broken file; the message names it.
    """
    if not isinstance(data, str | os.PathLike):
        return None
    if str(data) not in datasets():
        from .folder import has_test_split  # Pillow only where it is needed

        if not has_test_split(_existing(data)):
            return None
    return load(data, split="test", size=size)


def _existing(path: str | os.PathLike) -> Path:
    if not Path(path).expanduser().exists():
        names = ", ".join(map(repr, datasets()))
        raise ValueError(f"data must be one of {names}, or an existing folder or zip file, not {str(path)!r}")
    return Path(path).expanduser()


def _from_files(path: str | os.PathLike, split: str, size: int | None) -> ImageData:
    from .folder import read_images  # Pillow only where it is needed

    return read_images(_existing(path), split=split, size=size)


def _wrap(values, labels: Tensor | None) -> Data:
    """A tensor or array of all samples, with the type and axes of ImageData or FloatData."""
    values = torch.as_tensor(values)
    if values.dtype == torch.uint8:
        if values.ndim == 3:
            values = values[:, None]
        elif values.ndim == 4 and values.shape[1] not in (1, 3) and values.shape[3] in (1, 3):
            values = values.permute(0, 3, 1, 2)
        return ImageData(values.contiguous(), labels, name="data")
    if not values.is_floating_point():
        raise ValueError(f"data must be uint8 or floating point, not {values.dtype}")
    return FloatData(values.to(torch.float32).contiguous(), labels)


def _collect(data) -> Data:
    """Every item of a map-style Dataset or an iterable, each a sample or a batch, with or without labels."""
    sized = hasattr(data, "__getitem__") and hasattr(data, "__len__")
    try:
        items = (data[i] for i in range(len(data))) if sized else iter(data)
    except TypeError:
        kinds = "a name, a path, a tensor, an array, a Dataset or an iterable"
        raise ValueError(f"data must be {kinds}, not {type(data).__name__}") from None
    parts, labels = [], []
    for item in items:
        sample, label = item if isinstance(item, tuple | list) and len(item) == 2 else (item, None)
        parts.append(_as_batch(sample))
        if label is not None:
            labels.append(torch.as_tensor(label).reshape(-1).to(torch.int64))
    if not parts:
        raise ValueError("data is empty; it must hold at least one sample")
    if labels and len(labels) != len(parts):
        raise ValueError(f"data must give labels with all or no items, not with {len(labels)} of {len(parts)}")
    try:
        values = torch.cat(parts)
    except RuntimeError as error:
        raise ValueError(f"data must give samples of one shape and type ({error})") from error
    return _wrap(values, torch.cat(labels) if labels else None)


def _as_batch(sample) -> Tensor:
    """One item as [n, ...]: a PIL image or a single sample becomes a batch of one."""
    if type(sample).__module__.startswith("PIL."):
        pixels = torch.tensor(np.asarray(sample))
        return pixels[None, None] if pixels.ndim == 2 else pixels.permute(2, 0, 1)[None]
    try:
        sample = torch.as_tensor(sample)
    except (TypeError, ValueError, RuntimeError) as error:
        kinds = "tensors, arrays or PIL images, alone or in pairs with labels"
        raise ValueError(f"data must give {kinds}, not {type(sample).__name__}") from error
    single_image = sample.ndim == 3 or (sample.ndim == 2 and sample.dtype == torch.uint8)
    if not single_image:
        return sample[None] if sample.ndim == 1 else sample
    return sample[None] if sample.ndim == 3 else sample[None, None]
