"""`evaluate`: all scores of a set of samples against a data set, with their floors and the names to print."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..data import Data
from .distances import fid, inception_score, kid
from .features import DomainClassifier, quantise


@dataclass(frozen=True)
class Extracted:
    """float64 features [n, d] and class logits [n, K] (None if the extractor gives none)."""

    features: np.ndarray
    logits: np.ndarray | None


@dataclass(frozen=True)
class _Metric:
    label: str
    help: str
    score: Callable[[Extracted, Extracted], float]  # (real, fake) -> value
    floor: str  # name of the value that real data gets in place of the samples
    needs_logits: bool = False


_METRICS = {
    "fid": _Metric(
        "FID",
        "Fréchet distance of features; lower is better",
        lambda r, f: fid(r.features, f.features),
        "fid_floor",
    ),
    "kid": _Metric(
        "KID",
        "kernel distance of features, unbiased; lower is better",
        lambda r, f: kid(r.features, f.features),
        "kid_floor",
    ),
    "is": _Metric(
        "IS",
        "Inception score, 1 to the number of classes; higher is better",
        lambda r, f: inception_score(f.logits)[0],
        "is_real",
        True,
    ),
}


def available() -> dict[str, str]:
    """The metrics that :func:`evaluate` knows: name -> one line of help."""
    return {name: metric.help for name, metric in _METRICS.items()}


def label(metric: str, extractor) -> str:
    """How a score is called in print: "FID" on comparable features only, else for example "FID (domain)".

    Args:
        metric: a name of :func:`available`.
        extractor: the extractor, or its entry in the result of :func:`evaluate`.

    Raises:
        ValueError: no such metric.
    """
    if metric not in _METRICS:
        raise ValueError(f"metric must be one of {', '.join(_METRICS)}, not {metric!r}")
    about = extractor if isinstance(extractor, dict) else _describe(extractor)
    return _METRICS[metric].label + ("" if about["comparable"] else f" ({about['name']})")


def _describe(extractor) -> dict:
    """An extractor's name, hash and comparability; a plain callable goes by its own name."""
    own_name = getattr(extractor, "__name__", type(extractor).__name__)
    return {
        "name": getattr(extractor, "name", own_name),
        "hash": getattr(extractor, "hash", None),
        "comparable": getattr(extractor, "comparable", False),
    }


@torch.no_grad()
def _extract(extractor, batches) -> Extracted:
    """Features of all batches, each rounded to uint8 values first, whatever the extractor."""
    features, logits = [], []
    for images in batches:
        out = extractor(quantise(images))
        f, z = out if isinstance(out, tuple) else (out, None)
        if f.ndim != 2 or len(f) != len(images):
            raise ValueError(f"extractor must give features [{len(images)}, d], not {list(f.shape)}")
        features.append(f.double().cpu().numpy())
        if z is not None:
            logits.append(z.double().cpu().numpy())
    return Extracted(np.concatenate(features), np.concatenate(logits) if logits else None)


def _part(of: Extracted, index) -> Extracted:
    return Extracted(of.features[index], None if of.logits is None else of.logits[index])


def _check(samples: Tensor, data: Data, metrics, extractor) -> None:
    if unknown := [m for m in metrics if m not in _METRICS]:
        raise ValueError(f"metrics must be among {', '.join(_METRICS)}, not {', '.join(map(repr, unknown))}")
    if data.points:
        raise ValueError(f"data {data.name!r} must be images [N, C, H, W], not points")
    if samples.ndim != 4 or tuple(samples.shape[1:]) != data.shape or len(samples) < 2:
        expected = f"[n >= 2, {', '.join(map(str, data.shape))}]"
        raise ValueError(f"samples must be {expected} as data {data.name!r} has, not {list(samples.shape)}")
    if not samples.is_floating_point():
        raise ValueError(f"samples must be floats in [-1, 1], not {samples.dtype}")
    if not torch.isfinite(samples).all():
        raise ValueError("samples must be finite; they hold NaN or infinity")
    if extractor is not None and not callable(extractor):
        raise ValueError(f"extractor must be a callable: images -> features [n, d], not {extractor!r}")


def _real_pair(data: Data, held_out: Data | None, real: Extracted, n: int, extractor) -> tuple[Extracted, Extracted]:
    """Reference and up to n real images in place of samples: held out, or the other half of the reference."""
    if held_out is not None:
        chosen = held_out.subset(min(n, len(held_out)))
        return real, _extract(extractor, _batches(chosen))
    order = np.random.Generator(np.random.PCG64(0)).permutation(len(real.features))
    half = len(order) // 2
    return _part(real, order[half:]), _part(real, order[: min(n, half)])


def _batches(data: Data, size: int = 500):
    return (data.batch(slice(i, i + size)) for i in range(0, len(data), size))


def evaluate(
    samples: Tensor,
    data: Data,
    *,
    metrics=("fid", "kid", "is"),
    extractor=None,
    held_out: Data | None = None,
    max_reference: int | None = 10_000,
) -> dict:
    """Scores of samples against a data set, with what real images score in their place.

    Everything, real or not, is rounded to uint8 values before features are taken; nothing is flipped.

    Args:
        samples: float ``[n, C, H, W]`` in [-1, 1], n >= 2.
        data: the reference images, normally the training split.
        metrics: names out of :func:`available`.
        extractor: callable, images ``[n, C, H, W]`` in [-1, 1] -> features ``[n, d]``, or (features, logits
            ``[n, K]``); its attributes ``name``, ``hash`` and ``comparable`` are reported if it has them.
            None is the :class:`DomainClassifier` of ``data``.
        held_out: real images for the floors, normally the test split; None sets one half of the reference
            against the other. The floor takes n of them, or as many as there are.
        max_reference: if ``data`` is larger, a fixed random choice of this many is the reference; None takes
            all.

    Returns:
        - one value for each metric; ``fid_floor``, ``kid_floor`` and ``is_real``: the same for real images;
        - ``n``, ``floor_n``: numbers of samples and of real images in the floors;
        - with logits: ``mean_top_probability`` of the samples, and ``smallest_class_share``, the share of the
          samples that are of the rarest class (both 0..1);
        - ``extractor``: its name, hash and ``comparable``, which is also a value of its own: whether scores
          may be compared with published ones;
        - ``labels``: how each metric is to be called in print, for example "FID (domain)".

    Raises:
        ValueError: an argument out of range, data without labels and no extractor, or "is" without logits.
    """
    _check(samples, data, metrics, extractor)
    extractor = extractor or DomainClassifier.for_data(data)
    if max_reference is not None and len(data) > max_reference:
        data = data.subset(max_reference)
    fake = _extract(extractor, samples.to(data.values.device).split(500))
    real = _extract(extractor, _batches(data))
    if fake.logits is None and (needy := [m for m in metrics if _METRICS[m].needs_logits]):
        raise ValueError(f"metrics {needy} need an extractor that gives (features, logits)")
    pair = _real_pair(data, held_out, real, len(samples), extractor)
    about = _describe(extractor)
    result: dict[str, Any] = {"n": len(samples), "floor_n": len(pair[1].features)}
    for name in metrics:
        metric = _METRICS[name]
        result[name] = metric.score(real, fake)
        result[metric.floor] = metric.score(*pair)
    if fake.logits is not None:
        probabilities = torch.from_numpy(fake.logits).softmax(1)
        counts = torch.bincount(probabilities.argmax(1), minlength=probabilities.shape[1])
        result["mean_top_probability"] = probabilities.amax(1).mean().item()
        result["smallest_class_share"] = counts.min().item() / len(samples)
    labels = {name: label(name, about) for name in metrics}
    return result | {"extractor": about, "comparable": about["comparable"], "labels": labels}
