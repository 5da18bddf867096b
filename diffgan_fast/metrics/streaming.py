"""The metrics as objects that are fed batch by batch, on one process or many."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from . import modes, neighbours
from .checks import checked, float64
from .frechet import Moments, fid
from .kernel import kid
from .knn import knn_kl

if TYPE_CHECKING:
    from typing_extensions import Self


class Streaming(ABC):
    """What all of them share: ``update`` with a batch, ``compute`` at any time, ``merge`` with what others gathered."""

    def merge(self, other: Self) -> Self:
        """Adds what another object of the same kind and options has gathered, which stays as it is. Returns self."""
        if type(other) is not type(self):
            raise ValueError(f"other must be a {type(self).__name__}, not a {type(other).__name__}")
        self._merge(other)
        return self

    @abstractmethod
    def _merge(self, other: Self) -> None: ...

    @abstractmethod
    def compute(self) -> Any:
        """The value for all batches so far. ValueError if there are too few."""

    def gather(self, group=None) -> Self:
        """Merges, in the order of ranks, what the processes of a ``torch.distributed`` group have gathered.

        Every process must call it, and gets the same object, on the CPU or device of the batches; self stays as it is.
        """
        found: list[Any] = [None] * torch.distributed.get_world_size(group)
        torch.distributed.all_gather_object(found, self, group)
        for other in found[1:]:
            found[0].merge(other)
        return found[0]


class FID(Streaming):
    """:func:`fid` in constant memory: means and covariances in float64.

    Args:
        reference: :class:`Moments` of the real features, if they are known already; more may be added.
    """

    def __init__(self, reference: Moments | None = None):
        self.real, self.fake = Moments(), Moments()
        if reference is not None:
            self.real.merge(reference)

    def update(self, real=None, fake=None) -> Self:
        """Adds features ``[n, d]`` of either kind. Returns self."""
        for moments, features in ((self.real, real), (self.fake, fake)):
            if features is not None:
                moments.update(features)
        return self

    def _merge(self, other: Self) -> None:
        self.real.merge(other.real)
        self.fake.merge(other.fake)

    def compute(self) -> float:
        return fid(self.real, self.fake)


class _Collected(Streaming):
    """Of a metric that needs all features at once: they are kept as they come, on their device."""

    def __init__(self, score: Callable[[Tensor, Tensor], Any]):
        self._score = score
        self._real: list[Tensor] = []
        self._fake: list[Tensor] = []

    def update(self, real=None, fake=None) -> Self:
        """Adds features ``[n, d]`` of either kind. Returns self."""
        for name, kept, features in (("real", self._real, real), ("fake", self._fake, fake)):
            if features is not None:
                checked(features, name, least=1)
                self._keep(name, kept, torch.as_tensor(features).detach().clone())  # its buffer may be filled again
        return self

    @staticmethod
    def _keep(name: str, kept: list[Tensor], features: Tensor) -> None:
        if kept and kept[0].shape[1] != features.shape[1]:
            raise ValueError(f"{name} must have {kept[0].shape[1]} columns as before, not {features.shape[1]}")
        kept.append(features)

    def _merge(self, other: Self) -> None:
        for name, kept, theirs in (("real", self._real, other._real), ("fake", self._fake, other._fake)):
            for features in tuple(theirs):  # other may be self
                self._keep(name, kept, features)

    def compute(self) -> Any:
        if not self._real or not self._fake:
            raise ValueError("both real and fake features are needed: call update first")
        device = self._real[0].device
        return self._score(*(torch.cat([x.to(device) for x in kept]) for kept in (self._real, self._fake)))


class KID(_Collected):
    """:func:`kid` with its options. It keeps all features."""

    def __init__(self, *, subsets: int | None = None, subset_size: int = 1000, seed: int = 0):
        # the stubs' two forms, one a value and one a pair, cannot be told apart here
        super().__init__(partial(kid, subsets=subsets, subset_size=subset_size, seed=seed))  # type: ignore[call-overload]


class PrecisionRecallDensityCoverage(_Collected):
    """:func:`prdc` with its options. It keeps all features."""

    def __init__(self, k: int = 3, density_k: int = 5):
        super().__init__(partial(neighbours.prdc, k=k, density_k=density_k))


class KnnKL(_Collected):
    """:func:`knn_kl`. It keeps all points."""

    def __init__(self, k: int = 5):
        super().__init__(partial(knn_kl, k=k))


class _Summed(Streaming):
    """Of a metric that is a function of sums over samples."""

    def __init__(self) -> None:
        self._sums: tuple[Tensor, ...] | None = None

    @abstractmethod
    def _sums_of(self, fake) -> tuple[Tensor, ...]: ...

    def _add(self, sums: tuple[Tensor, ...]) -> None:
        if self._sums is not None:
            if sums[0].shape != self._sums[0].shape:
                raise ValueError(f"fake must have {len(self._sums[0])} classes as before, not {len(sums[0])}")
            sums = tuple(a + b.to(a.device) for a, b in zip(self._sums, sums, strict=True))
        self._sums = sums

    def update(self, fake) -> Self:
        """Adds a batch of samples, as the function of this metric takes them. Returns self."""
        self._add(self._sums_of(fake))
        return self

    def _merge(self, other: Self) -> None:
        if other._sums is not None:
            self._add(other._sums)

    def _known(self) -> tuple[Tensor, ...]:
        if self._sums is None:
            raise ValueError("there are no samples yet: call update first")
        return self._sums


class InceptionScore(_Summed):
    """:func:`inception_score` of all batches as one split, in constant memory; ``compute`` gives a float."""

    def _sums_of(self, fake) -> tuple[Tensor, ...]:
        p = checked(fake, "logits", least=1).softmax(1)
        return p.sum(0), torch.xlogy(p, p).sum(), torch.tensor(len(p), device=p.device)

    def compute(self) -> float:
        total, negative_entropy, n = self._known()
        return float(modes.information(total / n, negative_entropy / n).exp())


class ModeCoverage(_Summed):
    """:func:`mode_coverage` with its options, in constant memory; ``update`` takes points ``[n, d]``."""

    def __init__(self, modes, radius: float, *, least: int = 1):
        super().__init__()
        self.modes, self.radius, self.least = modes, radius, least

    def _sums_of(self, fake) -> tuple[Tensor, ...]:
        return (modes.nearest_modes(fake, self.modes, self.radius),)

    def _merge(self, other: Self) -> None:
        if self.radius != other.radius or not torch.equal(float64(self.modes), float64(other.modes)):
            raise ValueError("other must have the same modes and radius: its samples were counted by those")
        super()._merge(other)

    def compute(self) -> tuple[int, float]:
        return modes.coverage_of_modes(self._known()[0], self.least)


class ClassCoverage(_Summed):
    """:func:`class_coverage` with its options, in constant memory; ``update`` takes logits ``[n, K]``."""

    def __init__(self, target=None, *, least: int = 1):
        super().__init__()
        self.target, self.least = target, least

    def _sums_of(self, fake) -> tuple[Tensor, ...]:
        logits = checked(fake, "logits", least=1)
        return (torch.bincount(logits.argmax(1), minlength=logits.shape[1]),)

    def compute(self) -> tuple[int, float]:
        return modes.coverage_of_classes(self._known()[0], self.target, self.least)
