"""From images to features: one rule for all extractors, and a cache for the features of real data."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save
from torch import Tensor
from tqdm import tqdm

from .. import files
from ..data import Data
from ..data.registry import cache_dir
from .features import quantise

BATCH = 500  # images at a time
RULE = 2  # part of the cache's names: raise it when what happens to images before an extractor changes


@dataclass(frozen=True)
class Extracted:
    """Features [n, d] and class logits [n, K] (None if the extractor gives none). Points are their own features."""

    features: Tensor
    logits: Tensor | None = None

    def __len__(self) -> int:
        return len(self.features)

    def part(self, index: Tensor) -> Extracted:
        index = index.to(self.features.device)
        return Extracted(self.features[index], None if self.logits is None else self.logits[index])

    def to(self, device: torch.device | str) -> Extracted:
        return Extracted(self.features.to(device), None if self.logits is None else self.logits.to(device))


@dataclass(frozen=True)
class Seen:
    """What an evaluation takes of samples: their features, and their least and greatest value (NaN if one is)."""

    extracted: Extracted
    low: float
    high: float

    def __len__(self) -> int:
        return len(self.extracted)

    @classmethod
    def joined(cls, parts: Sequence[Seen]) -> Seen:
        """All samples, of which these are parts on one device, in their order."""
        features = torch.cat([part.extracted.features for part in parts])
        logits = [part.extracted.logits for part in parts if part.extracted.logits is not None]
        low, high = (torch.tensor(values) for values in zip(*((p.low, p.high) for p in parts), strict=True))
        return cls(Extracted(features, torch.cat(logits) if logits else None), float(low.min()), float(high.max()))

    def to(self, device: torch.device | str) -> Seen:
        return Seen(self.extracted.to(device), self.low, self.high)


def describe(extractor) -> dict:
    """An extractor's name, hash and comparability; a plain callable goes by its own name."""
    own_name = getattr(extractor, "__name__", type(extractor).__name__)
    return {
        "name": getattr(extractor, "name", own_name),
        "hash": getattr(extractor, "hash", None),
        "comparable": getattr(extractor, "comparable", False),
    }


def batches(data: Data) -> Iterable[Tensor]:
    """All samples, in order."""
    return (data.batch(slice(i, i + BATCH)) for i in range(0, len(data), BATCH))


def see(samples: Tensor, data: Data, extractor, *, progress: bool = True) -> Seen:
    """What an evaluation against ``data`` takes of samples, at least one. Points are their own features."""
    low, high = (float(value) for value in samples.aminmax())
    if data.points:
        return Seen(Extracted(samples), low, high)
    return Seen(extract(extractor, samples.split(BATCH), len(samples), progress=progress), low, high)


@torch.no_grad()
def extract(extractor, images: Iterable[Tensor], n: int, *, progress: bool = True) -> Extracted:
    """Features of n images in batches, each rounded to uint8 values first, whatever the extractor.

    Raises:
        ValueError: what it gives are not features ``[n, d]``.
    """
    features, logits, what = [], [], f"{describe(extractor)['name']} features"
    with tqdm(total=n, desc=what, unit="image", disable=None if progress else True) as bar:
        for batch in images:
            out = extractor(quantise(batch))
            f, z = out if isinstance(out, tuple) else (out, None)
            if not isinstance(f, Tensor) or not (z is None or isinstance(z, Tensor)):
                raise ValueError("extractor must give a tensor of features, or (features, logits)")
            if f.ndim != 2 or len(f) != len(batch):
                raise ValueError(f"extractor must give features [{len(batch)}, d], not {list(f.shape)}")
            features.append(f)
            if z is not None and (z.ndim != 2 or len(z) != len(batch)):
                raise ValueError(f"extractor must give logits [{len(batch)}, K], not {list(z.shape)}")
            logits += [] if z is None else [z]
            bar.update(len(batch))
    return Extracted(torch.cat(features), torch.cat(logits) if logits else None)


@dataclass(frozen=True)
class Kept:
    """What is computed from one data set, each thing by its name in a file of a folder; without a folder, anew."""

    folder: Path | None = None

    def __call__(self, what: str, compute: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
        if self.folder is None:
            return compute()
        path = self.folder / f"{what}.safetensors"
        if not path.exists():
            files.write(path, save({name: part.cpu().contiguous() for name, part in compute().items()}))
        return load_file(path)  # at the first time too, so that every time gives the same


def kept_of(extractor, data: Data) -> Kept:
    """What follows from features of a data set, in the user's cache: of points, or if the extractor has a hash."""
    about = describe(extractor)
    if not data.points and about["hash"] is None:
        return Kept()
    kind = "points" if data.points else f"{about['name']}-{about['hash']}"
    return Kept(cache_dir() / "features" / f"{kind}-{RULE}" / data.fingerprint)


def features_of(extractor, data: Data, kept: Kept) -> Extracted:
    """Features of a data set, extracted where they are not kept."""

    def compute() -> dict[str, Tensor]:
        found = extract(extractor, batches(data), len(data))
        return {"features": found.features} | ({} if found.logits is None else {"logits": found.logits})

    return Extracted(**{name: part.to(data.device) for name, part in kept("features", compute).items()})
