"""`evaluate`: all scores of a set of samples against a data set, with their floors and the names to print."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..data import Data
from .features import DomainClassifier, quantise
from .frechet import fid
from .kernel import kid
from .knn import knn_kl
from .modes import inception_score


@dataclass(frozen=True)
class Extracted:
    """float64 features [n, d] and class logits [n, K] (None if the extractor gives none). Points are features."""

    features: np.ndarray
    logits: np.ndarray | None


@dataclass(frozen=True)
class _Metric:
    label: str
    help: str
    score: Callable[[Extracted, Extracted], float]  # (real, fake) -> value
    floor: str  # name of the value that real data gets in place of the samples
    needs_logits: bool = False
    points: bool = False  # it measures points, not images


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
        needs_logits=True,
    ),
    "kl": _Metric(
        "KL (bits)",
        "points: KL divergence of real from samples, by nearest neighbours; lower is better, may be negative",
        lambda r, f: knn_kl(r.features, f.features),
        "kl_floor",
        points=True,
    ),
}


def available() -> dict[str, str]:
    """The metrics that :func:`evaluate` knows: name -> one line of help."""
    return {name: metric.help for name, metric in _METRICS.items()}


def _fitting(data: Data) -> list[str]:
    """The metrics for this kind of data."""
    return [name for name, metric in _METRICS.items() if metric.points == data.points]


def label(metric: str, extractor=None) -> str:
    """How a score is called in print: "FID" on comparable features only, else for example "FID (domain)".

    Args:
        metric: a name of :func:`available`.
        extractor: the extractor, or its entry in the result of :func:`evaluate`; metrics of points have none.

    Raises:
        ValueError: no such metric.
    """
    if metric not in _METRICS:
        raise ValueError(f"metric must be one of {', '.join(_METRICS)}, not {metric!r}")
    if _METRICS[metric].points:
        return _METRICS[metric].label
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


def _points(batches) -> Extracted:
    """Points as they are."""
    return Extracted(torch.cat(list(batches)).double().cpu().numpy(), None)


def _part(of: Extracted, index) -> Extracted:
    return Extracted(of.features[index], None if of.logits is None else of.logits[index])


def _check(samples: Tensor, data: Data, metrics, extractor) -> None:
    if unknown := [m for m in metrics if m not in _fitting(data)]:
        found = f"{', '.join(map(repr, unknown))}: data {data.name!r} holds {'points' if data.points else 'images'}"
        raise ValueError(f"metrics must be among {', '.join(_fitting(data))}, not {found}")
    if tuple(samples.shape[1:]) != data.shape or len(samples) < 2:
        expected = f"[n >= 2, {', '.join(map(str, data.shape))}]"
        raise ValueError(f"samples must be {expected} as data {data.name!r} has, not {list(samples.shape)}")
    if not samples.is_floating_point():
        raise ValueError(f"samples must be floats, not {samples.dtype}; images lie in [-1, 1]")
    if not torch.isfinite(samples).all():
        raise ValueError("samples must be finite; they hold NaN or infinity")
    if extractor is not None and data.points:
        raise ValueError(f"extractor must be None: data {data.name!r} holds points, which are measured as they are")
    if extractor is not None and not callable(extractor):
        raise ValueError(f"extractor must be a callable: images -> features [n, d], not {extractor!r}")


def _real_pair(held_out: Data | None, real: Extracted, n: int, extract) -> tuple[Extracted, Extracted]:
    """Reference and up to n real samples in place of generated ones: held out, or the other half of the reference."""
    if held_out is not None:
        return real, extract(_batches(held_out.subset(min(n, len(held_out)))))
    order = np.random.Generator(np.random.PCG64(0)).permutation(len(real.features))
    half = len(order) // 2
    return _part(real, order[half:]), _part(real, order[: min(n, half)])


def _batches(data: Data, size: int = 500):
    return (data.batch(slice(i, i + size)) for i in range(0, len(data), size))


def evaluate(
    samples: Tensor,
    data: Data,
    *,
    metrics=None,
    extractor=None,
    held_out: Data | None = None,
    max_reference: int | None = 10_000,
) -> dict:
    """Scores of samples against a data set, with what real data score in their place.

    Images, real or not, are rounded to uint8 values before features are taken; nothing is flipped. Points are measured
    as they are.

    Args:
        samples: float ``[n, C, H, W]`` in [-1, 1], or points ``[n, D]``; n >= 2.
        data: the reference, normally the training split.
        metrics: names out of :func:`available`; None is all that measure this kind of data: "fid", "kid" and "is" of
            images, "kl" of points.
        extractor: callable, images ``[n, C, H, W]`` in [-1, 1] -> features ``[n, d]``, or (features, logits
            ``[n, K]``); its attributes ``name``, ``hash`` and ``comparable`` are reported if it has them.
            None is the :class:`DomainClassifier` of ``data``. Points have none.
        held_out: real data for the floors, normally the test split; None sets one half of the reference
            against the other. The floor takes n of them, or as many as there are.
        max_reference: if there are more images in ``data``, a fixed random choice of this many is the reference; None
            takes all. Points are always all taken: the bias of "kl" depends on their number.

    Returns:
        - one value for each metric; ``fid_floor``, ``kid_floor``, ``is_real``, ``kl_floor``: the same for real data;
        - ``n``, ``reference_n``, ``floor_n``: numbers of samples, of the reference, and of real data in the floors;
        - with logits: ``mean_top_probability`` of the samples, and ``smallest_class_share``, the share of the
          samples that are of the rarest class (both 0..1);
        - of images, ``extractor``: its name, hash and ``comparable``, which is also a value of its own: whether scores
          may be compared with published ones;
        - ``labels``: how each metric is to be called in print, for example "FID (domain)".

    Raises:
        ValueError: an argument out of range, images without labels and no extractor, or "is" without logits.
    """
    metrics = _fitting(data) if metrics is None else metrics
    _check(samples, data, metrics, extractor)
    about: dict[str, Any] = {}
    extract: Callable[..., Extracted] = _points
    if not data.points:
        extractor = extractor or DomainClassifier.for_data(data)
        about, extract = _describe(extractor), partial(_extract, extractor)
        if max_reference is not None and len(data) > max_reference:
            data = data.subset(max_reference)
    fake = extract(samples.to(data.values.device).split(500))
    real = extract(_batches(data))
    if fake.logits is None and (needy := [m for m in metrics if _METRICS[m].needs_logits]):
        raise ValueError(f"metrics {needy} need an extractor that gives (features, logits)")
    pair = _real_pair(held_out, real, len(samples), extract)
    result: dict[str, Any] = {"n": len(samples), "reference_n": len(data), "floor_n": len(pair[1].features)}
    for name in metrics:
        metric = _METRICS[name]
        result[name] = metric.score(real, fake)
        result[metric.floor] = metric.score(*pair)
    if fake.logits is not None:
        probabilities = torch.from_numpy(fake.logits).softmax(1)
        counts = torch.bincount(probabilities.argmax(1), minlength=probabilities.shape[1])
        result["mean_top_probability"] = probabilities.amax(1).mean().item()
        result["smallest_class_share"] = counts.min().item() / len(samples)
    if about:
        result |= {"extractor": about, "comparable": about["comparable"]}
    return result | {"labels": {name: label(name, about) for name in metrics}}
