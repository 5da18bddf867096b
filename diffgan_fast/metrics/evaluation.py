"""`evaluate`: all scores of a set of samples against a data set, with their floors and the names to print."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..data import Data
from .cautions import LEAST_OF_MODE, SampleRangeWarning, SmallSampleWarning, few_samples, out_of_range
from .checks import NotFinite, float64
from .extraction import Extracted, Kept, Seen, describe, features_of, kept_of, see
from .extractors import chosen_extractor
from .frechet import fid, fid_infinity
from .kernel import mmd2
from .modes import inception_score, mode_coverage
from .reference import Reference, order

HIGHER_IS_BETTER = frozenset(
    ("is", "precision", "recall", "density", "coverage", "modes", "high_quality")
)  # else lower is
LEAST_TO_COMPARE = 10_000  # samples, with which papers measure
LEAST_FOR_SPREAD = 20  # samples, below which halves say nothing
MAX_REFERENCE = 10_000  # real images, unless more are asked for
MODE_RADIUS = 3  # standard deviations that count as near


def _fid(reference: Reference, fake: Extracted) -> dict[str, float]:
    return {"fid": fid(reference.moments, fake.features)}


def _fid_infinity(reference: Reference, fake: Extracted) -> dict[str, float]:
    return {"fid_infinity": fid_infinity(reference.moments, fake.features)}


def _beside(reference: Reference, fake: Extracted) -> Tensor:
    """Features as float64 where the reference is."""
    return float64(fake.features).to(reference.features.device)


def _kid(reference: Reference, fake: Extracted) -> dict[str, float]:
    return {"kid": mmd2(reference.features, _beside(reference, fake), reference.kernel)}


def _is(reference: Reference, fake: Extracted) -> dict[str, float]:
    return {"is": inception_score(fake.logits)[0]}


def _prdc(reference: Reference, fake: Extracted) -> dict[str, float]:
    """On as many real samples as fake ones, since all four depend on both numbers."""
    n = min(len(reference.real), len(fake))
    return reference.balls(n).prdc(_beside(reference, fake.part(order(len(fake))[:n])))._asdict()


def _kl(reference: Reference, fake: Extracted) -> dict[str, float]:
    return {"kl": reference.points.kl(float64(fake.features).cpu().numpy())}


def _modes(reference: Reference, fake: Extracted) -> dict[str, float]:
    assert reference.modes is not None  # else the metric does not fit the data
    radius = MODE_RADIUS * reference.modes.std
    found, near = mode_coverage(fake.features, reference.modes.centres, radius, least=LEAST_OF_MODE)
    return {"modes": found, "high_quality": near}


@dataclass(frozen=True)
class _Metric:
    """score: gives this metric, and others of the same pass over the features.

    floor: name of the value that real data get in place of the samples. published_on: the features of published values.
    needs_modes: it measures points whose modes are known. unlike_published: what is done otherwise than in papers.
    """

    label: str
    help: str
    score: Callable[[Reference, Extracted], dict[str, float]]
    floor: str
    published_on: str | None = "inception"  # None: it measures points
    needs_logits: bool = False
    default: bool = True
    needs_modes: bool = False
    unlike_published: str = ""

    @property
    def points(self) -> bool:
        return self.published_on is None


_METRICS = {
    "fid": _Metric("FID", "Fréchet distance of features; lower is better", _fid, "fid_floor"),
    "fid_infinity": _Metric(
        "FID∞", "FID extrapolated to infinitely many samples; by name only", _fid_infinity, "fid_infinity_floor",
        default=False,
    ),
    "kid": _Metric("KID", "kernel distance of features, unbiased; lower is better", _kid, "kid_floor"),
    "is": _Metric(
        "IS", "Inception score, 1 to the number of classes; higher is better", _is, "is_real", needs_logits=True,
        unlike_published="1 split",
    ),
    "precision": _Metric(
        "precision", "share of samples among real ones, k = 3; higher is better", _prdc, "precision_real", "vgg16"
    ),
    "recall": _Metric(
        "recall", "share of real data among samples, k = 3; higher is better", _prdc, "recall_real", "vgg16"
    ),
    "density": _Metric(
        "density", "how densely real data surround samples, k = 5; higher is better", _prdc, "density_real", "vgg16"
    ),
    "coverage": _Metric(
        "coverage", "share of real data with a sample nearby, k = 5; higher is better", _prdc, "coverage_real", "vgg16"
    ),
    "kl": _Metric(
        "KL (bits)",
        "points: KL divergence of real from samples, by nearest neighbours; lower is better, may be negative",
        _kl,
        "kl_floor",
        published_on=None,
    ),
    "modes": _Metric(
        "modes", "points of known modes: how many have 20 samples within 3 standard deviations; higher is better",
        _modes, "modes_real", published_on=None, needs_modes=True,
    ),
    "high_quality": _Metric(
        "high quality", "points of known modes: share of samples within 3 standard deviations of one; higher is better",
        _modes, "high_quality_real", published_on=None, needs_modes=True,
    ),
}  # fmt: skip


def available(data: Data | None = None) -> dict[str, str]:
    """The metrics that :func:`evaluate` knows, or those for this kind of data: name -> one line of help."""
    known = getattr(data, "modes", None) is not None
    return {
        name: m.help
        for name, m in _METRICS.items()
        if data is None or m.points == data.points and (known or not m.needs_modes)
    }


def usual(data: Data) -> list[str]:
    """The metrics that :func:`evaluate` takes by default for this kind of data."""
    return [name for name in available(data) if _METRICS[name].default]


def label(metric: str, extractor=None) -> str:
    """How a score is called in print: "FID" on the features of published values only, else for example "FID (domain)".

    Published IS is the mean over ten splits, nearly always; here it is that of all samples, "IS (1 split)".

    Args:
        metric: a name of :func:`available`.
        extractor: the extractor, or its entry in the result of :func:`evaluate`; metrics of points have none.

    Raises:
        ValueError: no such metric.
    """
    if metric not in _METRICS:
        raise ValueError(f"metric must be one of {', '.join(_METRICS)}, not {metric!r}")
    found = _METRICS[metric]
    if found.points:
        return found.label
    about = extractor if isinstance(extractor, dict) else describe(extractor)
    if about["name"] == "effl0" and found.label.startswith("FID"):
        return f"{found.label.replace('FID', 'FD')}-effl0"
    comparable = about["comparable"] and about["name"] == found.published_on
    aside = found.unlike_published if comparable else about["name"]
    return f"{found.label} ({aside})" if aside else found.label


def _scores(metrics: Sequence[str], reference: Reference, fake: Extracted) -> dict[str, float]:
    """Every metric, each pass over the features once."""
    found: dict[str, float] = {}
    for score in _passes(metrics):
        found |= score(reference, fake)
    return {name: found[name] for name in metrics}


def _passes(metrics: Sequence[str]) -> list[Callable]:
    return list(dict.fromkeys(_METRICS[name].score for name in metrics))


def _spread(metrics: Sequence[str], reference: Reference, fake: Extracted, halves: int) -> dict[str, float]:
    """Standard deviation over random halves. For a mean it is the standard error of the mean of all: n/2 out of n drawn
    without replacement vary by σ²(2/n)(1 - 1/2)."""
    n, metrics = len(fake), [name for name in metrics if name != "modes"]  # a half has half as many of each mode
    values = [_scores(metrics, reference, fake.part(order(n, seed + 1)[: n // 2])) for seed in range(halves)]
    return {name: float(np.std([value[name] for value in values], ddof=1)) for name in metrics}


def _check_samples(samples: Tensor | Seen, data: Data) -> None:
    if not isinstance(samples, Tensor | Seen):
        raise ValueError(f"samples must be a tensor, not {type(samples).__name__}")
    shape = (len(samples), *data.shape) if isinstance(samples, Seen) else tuple(samples.shape)
    if shape[1:] != data.shape or shape[0] < 2:
        expected = f"[n >= 2, {', '.join(map(str, data.shape))}]"
        raise ValueError(f"samples must be {expected} as data {data.name!r} has, not {list(shape)}")
    if isinstance(samples, Tensor) and not samples.is_floating_point():
        raise ValueError(f"samples must be floats, not {samples.dtype}; images lie in [-1, 1]")
    low, high = (samples.low, samples.high) if isinstance(samples, Seen) else map(float, samples.aminmax())
    if not np.isfinite(low + high):
        raise NotFinite("samples must be finite; they hold NaN or infinity")
    if not data.points and (largest := max(-low, high)) > 2:
        raise ValueError(f"samples must lie in [-1, 1], as images do here; they reach {largest:g}")


def _check(data: Data, held_out: Data | None, metrics, halves: int, max_reference: int | None) -> None:
    if held_out is not None and held_out.shape != data.shape:
        theirs, ours = list(held_out.shape), list(data.shape)
        raise ValueError(f"held_out must hold samples {ours} as data {data.name!r} does, not {theirs}")
    if isinstance(metrics, str):
        raise ValueError(f"metrics must be a sequence of names, not {metrics!r}")
    if unknown := [m for m in metrics if m not in available(data)]:
        found = f"{', '.join(map(repr, unknown))}: data {data.name!r} holds {'points' if data.points else 'images'}"
        raise ValueError(f"metrics must be among {', '.join(available(data))}, not {found}")
    if max_reference is not None and max_reference < 2:
        raise ValueError(f"max_reference must be at least 2, or None for all, not {max_reference}")
    if halves < 0 or halves == 1:
        raise ValueError(f"halves must be 0 or at least 2, not {halves}")


def _extracted(extractor, data: Data) -> tuple[Extracted, Kept]:
    """Features of real data, and where what follows from them is kept. Points are their own features."""
    kept = kept_of(extractor, data)
    return (Extracted(data.batch(slice(None))) if data.points else features_of(extractor, data, kept)), kept


def _floors(metrics: Sequence[str], held_out: Data | None, reference: Reference, n: int, extractor) -> dict[str, Any]:
    """Scores of up to n real samples in place of generated ones: held out, or the other half of the reference."""
    most = len(reference.real) // 2 if held_out is None else len(held_out)
    n, against = min(n, most), "half" if held_out is None else held_out.fingerprint

    @cache
    def pair() -> tuple[Reference, Extracted]:
        if held_out is not None:
            found, _ = _extracted(extractor, held_out)  # all of it, so that it is kept once
            return reference, found.part(order(len(found))[:n])
        shuffled = order(len(reference.real))
        other = Reference(reference.real.part(shuffled[most:]), Kept(), reference.modes)
        return other, reference.real.part(shuffled[:n])

    def measured(score) -> dict[str, Tensor]:
        return {name: torch.tensor(value, dtype=torch.float64) for name, value in score(*pair()).items()}

    real: dict[str, Tensor] = {}
    for score in _passes(metrics):
        compute = partial(measured, score)
        try:  # modes are no part of a fingerprint
            real |= compute() if score is _modes else reference.keep(f"floor{score.__name__}-{against}-{n}", compute)
        except ValueError as error:
            source = "half of data" if held_out is None else "held_out"
            raise ValueError(f"the floors cannot be measured on {n} samples of {source}: {error}") from error
    return {"floor_n": n, **{_METRICS[name].floor: float(real[name]) for name in metrics}}


def evaluate(
    samples: Tensor | Seen,
    data: Data,
    *,
    metrics: Sequence[str] | None = None,
    extractor=None,
    held_out: Data | None = None,
    floors: bool = True,
    max_reference: int | None = MAX_REFERENCE,
    halves: int = 10,
) -> dict[str, Any]:
    """Scores of samples against a data set, with what real data score in their place.

    Images, real or not, are rounded to uint8 values before features are taken; nothing is flipped. Points are measured
    as they are. Features of real images, statistics of real data and their own scores are kept in the user's cache
    (``$DIFFGAN_FAST_CACHE`` moves it), those of images if the extractor has a ``hash``, so that a second evaluation
    costs the samples only.

    Args:
        samples: float ``[n, C, H, W]`` in [-1, 1], or points ``[n, D]``; n >= 2 (precision, recall, density and
            coverage need 6). Or what has been seen of them already.
        data: the reference, normally the training split.
        metrics: names out of :func:`available`; None is all that measure this kind of data, but "fid_infinity".
        extractor: a name out of :func:`extractors`, or a callable, images ``[n, C, H, W]`` in [-1, 1] -> features
            ``[n, d]``, or (features, logits ``[n, K]``); its attributes ``name``, ``hash`` (of weights and
            preprocessing) and ``comparable`` are reported if it has them. None is "domain", the
            :class:`DomainClassifier` of ``data``. Points have none.
        held_out: real data for the floors, normally the test split; None sets one half of the reference
            against the other. The floor takes n of them, or as many as there are.
        floors: whether real data are measured too.
        max_reference: if there are more images in ``data``, a fixed random choice of this many is the reference; None
            takes all. Points are always all taken: the bias of "kl" depends on their number. Precision, recall, density
            and coverage take as many real samples as there are samples, or the other way round.
        halves: on how many random halves of the samples the spread is measured; 0 leaves it out.

    Returns:
        - one value for each metric; ``fid_floor``, ``kid_floor``, ``is_real``, ``precision_real``, …, ``kl_floor``: the
          same for real data;
        - ``spread``: for each metric the standard deviation over halves of the samples, drawn without replacement. It
          is about the standard error at n; of "fid" and "kid" up to twice it near their floors. Not there below n = 20,
          nor of "modes", of which halves have too few samples;
        - ``n``, ``reference_n``, ``floor_n``: numbers of samples, of the reference, and of real data in the floors;
        - with logits: ``mean_top_probability`` of the samples, ``smallest_class_share``, the share of the samples that
          are of the rarest class (both 0..1), and ``classes_covered``;
        - of images, ``extractor``: its name, hash and ``comparable``, which is also a value of its own: whether scores
          may be compared with published ones, for which the weights must be the public ones, the reference all of
          ``data`` (a whole training split), and the samples 10,000 or more;
        - ``labels``: how each metric is to be called in print, for example "FID (domain)";
        - ``warnings``: sentences that say which scores are of too few samples, and why, given as
          :class:`SmallSampleWarning` too; and, as :class:`SampleRangeWarning`, that images seem to lie in [0, 1].

    Raises:
        ValueError: an argument out of range, images without labels and no extractor, or "is" without logits.
        FileNotFoundError: the named extractor's weights are not there; the message says where to put them.
    """
    if not isinstance(data, Data):
        raise ValueError(f"data must be a data set (see data.load), not {type(data).__name__}")
    if metrics is None:
        metrics = usual(data)
    _check_samples(samples, data)
    _check(data, held_out, metrics, halves, max_reference)
    extractor, about = chosen_extractor(extractor, data), {}
    if not data.points:
        about = describe(extractor)
        if max_reference is not None and len(data) > max_reference:
            data, about["comparable"] = data.subset(max_reference), False
        about["comparable"] &= len(samples) >= LEAST_TO_COMPARE
    device = data.device
    seen = samples.to(device) if isinstance(samples, Seen) else see(samples.to(device), data, extractor)
    fake = seen.extracted
    if fake.logits is None and (needy := [m for m in metrics if _METRICS[m].needs_logits]):
        raise ValueError(f"metrics {needy} need an extractor that gives (features, logits)")
    reference = Reference(*_extracted(extractor, data), getattr(data, "modes", None))
    result: dict[str, Any] = {"n": len(fake), "reference_n": len(data), **_scores(metrics, reference, fake)}
    if floors:
        result |= _floors(metrics, held_out, reference, len(fake), extractor)
    if halves and len(fake) >= LEAST_FOR_SPREAD:
        result["spread"] = _spread(metrics, reference, fake, halves)
    if fake.logits is not None:
        probabilities = fake.logits.double().softmax(1)
        counts = torch.bincount(probabilities.argmax(1), minlength=probabilities.shape[1])
        result["mean_top_probability"] = probabilities.amax(1).mean().item()
        result["smallest_class_share"] = counts.min().item() / len(fake)
        result["classes_covered"] = int((counts > 0).sum())
    if about:
        result |= {"extractor": about, "comparable": about["comparable"]}
    cautions = few_samples(metrics, reference, fake)
    for caution in cautions:
        warnings.warn(caution, SmallSampleWarning, stacklevel=2)
    if range_caution := out_of_range(seen.low, seen.high, data):
        warnings.warn(range_caution, SampleRangeWarning, stacklevel=2)
        cautions.append(range_caution)
    return result | {"labels": {name: label(name, about) for name in metrics}, "warnings": cautions}
