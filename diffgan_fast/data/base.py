"""Data sets held in memory: uint8 images, or float images and points."""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from functools import cached_property
from hashlib import blake2b
from typing import Any

import numpy as np
import torch
from torch import Tensor


def to_uint8(x: Tensor) -> Tensor:
    """Images as they would be stored: round((x + 1)·127.5), clamped to 0..255.

    The one rule by which samples become pixels, for files and for metrics alike. It inverts
    ``ImageData.batch`` exactly.

    Args:
        x: float tensor of any shape, in [-1, 1] (values outside are clamped).

    Returns:
        uint8 tensor of x's shape.
    """
    return ((x.float() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)


@dataclass(frozen=True, eq=False)
class Modes:
    """The Gaussians that points are a mixture of: centres float64 ``[K, D]``, and their standard deviation."""

    centres: Tensor
    std: float


def _select(values: Tensor, index) -> Tensor:
    if isinstance(index, slice):
        return values[index]
    return values.index_select(0, torch.as_tensor(index, dtype=torch.int64, device=values.device))


class Data(ABC):
    """What every data set offers; :class:`ImageData` and :class:`FloatData` say how the values are stored.

    Attributes:
        values: all N samples, ``[N, C, H, W]`` or ``[N, D]``, as stored.
        labels: int64 ``[N]`` in 0..num_classes-1, or None.
        classes: a name for each class, or ().
        name: what the data set is called in messages and file names.
        batch_device: where batches are brought, if not where the values are; None: there.
    """

    values: Tensor
    labels: Tensor | None
    classes: tuple[str, ...]
    name: str
    batch_device: torch.device | None

    def __post_init__(self):
        if len(self.values) == 0:
            raise ValueError(f"data {self.name!r} is empty; it must hold at least one sample")
        if self.labels is None:
            return
        if self.labels.dtype != torch.int64 or self.labels.shape != (len(self),):
            found = f"{self.labels.dtype} {list(self.labels.shape)}"
            raise ValueError(f"labels must be int64 [{len(self)}], one a sample, not {found}")
        if self.labels.min() < 0 or (self.classes and self.labels.max() >= len(self.classes)):
            found = f"{int(self.labels.min())}..{int(self.labels.max())}"
            top = f"0..{len(self.classes) - 1}" if self.classes else "0 or more"
            raise ValueError(f"labels must be {top}, not {found}")

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.name!r}, {len(self)} x {self.shape}, {self.num_classes} classes)"

    def __len__(self) -> int:
        return len(self.values)

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of one sample: (C, H, W), or (D,) for points."""
        return tuple(self.values.shape[1:])

    @property
    def points(self) -> bool:
        """True for points ``[N, D]``, False for images ``[N, C, H, W]``."""
        return self.values.ndim == 2

    @cached_property
    def num_classes(self) -> int:
        """Number of classes; 0 without labels."""
        if self.labels is None:
            return 0
        return len(self.classes) or int(self.labels.max()) + 1

    @property
    def fingerprint(self) -> str:
        """BLAKE2b (32 hex digits) of type, shape, values and labels: the key for what is cached."""
        digest = blake2b(digest_size=16)
        for part in (self.values, self.labels):
            if part is not None:
                digest.update(f"{part.dtype}{list(part.shape)}".encode())
                digest.update(part.cpu().contiguous().numpy().data)
        return digest.hexdigest()

    @property
    def device(self) -> torch.device:
        """Where batches are."""
        return self.batch_device or self.values.device

    @abstractmethod
    def ready(self, stored: Tensor) -> Tensor:
        """Samples as a network takes them, of samples as they are stored, on their device."""

    def batch(self, index) -> Tensor:
        """Samples ready for a network.

        Args:
            index: int64 tensor ``[n]``, a sequence of ints, or a slice.

        Returns:
            float32 ``[n, C, H, W]`` in [-1, 1], or points ``[n, D]`` in their own units; on ``device``.
        """
        return self.ready(_select(self.values, index).to(self.device))

    def labels_of(self, index) -> Tensor:
        """Labels of the samples that ``batch(index)`` gives: int64 ``[n]``.

        Raises:
            ValueError: the data has no labels.
        """
        if self.labels is None:
            raise ValueError(f"data {self.name!r} has no labels; give them to load(..., labels=)")
        return _select(self.labels, index).to(self.device)

    def subset(self, n: int, seed: int = 0) -> "Data":
        """A fixed random choice of ``n`` samples without replacement, from NumPy's PCG64 of ``seed``.

        Raises:
            ValueError: n is not in 1..len(self).
        """
        if not 1 <= n <= len(self):
            raise ValueError(f"subset must be 1..{len(self)} samples of data {self.name!r}, not {n}")
        index = np.random.Generator(np.random.PCG64(seed)).permutation(len(self))[:n]
        labels = None if self.labels is None else _select(self.labels, index)
        return self._with(_select(self.values, index), labels, self.batch_device)

    def to(self, device) -> "Data":
        """The same data on another device."""
        labels = None if self.labels is None else self.labels.to(device)
        return self._with(self.values.to(device), labels, None)

    def with_batches_on(self, device: torch.device) -> "Data":
        """The same data where they are, of which each batch is brought to a device."""
        return self._with(self.values, self.labels, device)

    def _with(self, values: Tensor, labels: Tensor | None, batch_device: torch.device | None) -> "Data":
        kind: Any = type(self)
        return kind(values, labels, self.classes, self.name, batch_device=batch_device)


@dataclass(frozen=True, eq=False, repr=False)
class ImageData(Data):
    """Images of one size, kept as uint8.

    Args:
        images: uint8 ``[N, C, H, W]``, 0..255.
        labels: int64 ``[N]``, or None.
        classes: a name for each class, or ().
        name: what the data set is called.
        batch_device: where batches are brought; None: where the images are.

    Raises:
        ValueError: an argument has another type, shape or range, or there is no image.
    """

    images: Tensor
    labels: Tensor | None = None
    classes: tuple[str, ...] = ()
    name: str = "images"
    batch_device: torch.device | None = None

    def __post_init__(self):
        if self.images.dtype != torch.uint8 or self.images.ndim != 4:
            found = f"{self.images.dtype} {list(self.images.shape)}"
            raise ValueError(f"images must be uint8 [N, C, H, W], not {found}")
        super().__post_init__()

    @property
    def values(self) -> Tensor:  # type: ignore[override]
        return self.images

    def ready(self, stored: Tensor) -> Tensor:
        return stored.to(torch.float32).div_(127.5).sub_(1)


@dataclass(frozen=True, eq=False, repr=False)
class FloatData(Data):
    """Float images or points, kept as they are.

    Args:
        values: float32 images ``[N, C, H, W]`` in [-1, 1], or points ``[N, D]`` in any range.
        labels: int64 ``[N]``, or None.
        classes: a name for each class, or ().
        name: what the data set is called.
        modes: the Gaussians that points are a mixture of, where they are known.
        batch_device: where batches are brought; None: where the values are.

    Raises:
        ValueError: an argument has another type, shape or range, a value is not finite, or there is none.
    """

    values: Tensor
    labels: Tensor | None = None
    classes: tuple[str, ...] = ()
    name: str = "data"
    modes: Modes | None = None
    batch_device: torch.device | None = None

    def __post_init__(self):
        if self.values.dtype != torch.float32 or self.values.ndim not in (2, 4):
            found = f"{self.values.dtype} {list(self.values.shape)}"
            raise ValueError(f"values must be float32 [N, C, H, W] or [N, D], not {found}")
        super().__post_init__()
        low, high = (float(v) for v in self.values.aminmax())
        if not np.isfinite(low + high):
            raise ValueError("values must be finite; they hold NaN or infinity")
        if not self.points and (low < -1 or high > 1):
            found = f"{low:g}..{high:g}"
            raise ValueError(f"float images must lie in [-1, 1], not {found}; 0..255 belongs in uint8")

    def ready(self, stored: Tensor) -> Tensor:
        return stored

    def _with(self, values: Tensor, labels: Tensor | None, batch_device: torch.device | None) -> Data:
        return FloatData(values, labels, self.classes, self.name, self.modes, batch_device)
