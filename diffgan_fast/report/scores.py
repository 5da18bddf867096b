"""What `metrics.evaluate` found, as rows and sentences for a reader."""

from collections.abc import Mapping, Sequence

from ..metrics import HIGHER_IS_BETTER
from .table import is_number

SPREAD_NOTE = "± is the standard deviation over random halves of the samples."  # under tables that have that column
SCORE_COLUMNS = {"metric": "metric", "value": "samples", "spread": "±", "floor": "real data"}

_NOT_SCORES = {"n", "reference_n", "floor_n", "comparable", "step", "seed"}


def _floor_key(evaluation: Mapping, metric: str) -> str | None:
    return next((key for key in (f"{metric}_floor", f"{metric}_real") if key in evaluation), None)


def score_rows(evaluation: Mapping) -> list[dict]:
    """Rows for a table with :data:`SCORE_COLUMNS`: each metric of the samples beside that of real data.

    Args:
        evaluation: what ``metrics.evaluate`` returned, or the same from ``evaluation.json``.

    Returns:
        dicts of "metric", "value", "spread" and "floor" (None where there is no such value); labelled metrics first,
        then the other numbers under their own names.
    """
    labels = evaluation.get("labels", {})
    floors = {metric: _floor_key(evaluation, metric) for metric in evaluation}
    rest = [
        key
        for key, value in evaluation.items()
        if is_number(value) and key not in _NOT_SCORES | set(labels) | set(floors.values())
    ]
    return [
        {
            "metric": labels.get(key, key.replace("_", " ")),
            "value": evaluation.get(key),
            "spread": evaluation.get("spread", {}).get(key),
            "floor": evaluation.get(floors.get(key)),
        }
        for key in [*labels, *rest]
    ]


def compared(rows: Sequence[Mapping]) -> tuple[list[Mapping], dict, dict]:
    """A table of several runs' scores on the same data and features, with what real data score as the last row.

    Args:
        rows: for each run, "method" and what ``metrics.evaluate`` returned; "seconds" of training if known.

    Returns:
        (rows, columns, best) for :func:`table` and :func:`html_table`; the last row is a "reference".
    """
    labels = rows[0]["labels"]
    columns = {"method": "method", **labels}
    if any("seconds" in row for row in rows):
        columns["seconds"] = ("training (s)", ".1f")
    floors = {metric: rows[0].get(_floor_key(rows[0], metric)) for metric in labels}
    best = {metric: max if metric in HIGHER_IS_BETTER else min for metric in labels}
    return [*rows, {"method": "real data", **floors, "reference": True}], columns, best


def score_notes(evaluation: Mapping) -> list[str]:
    """Sentences that belong under every table of scores: numbers of samples, features, what may be compared.

    Args:
        evaluation: as for :func:`score_rows`.

    Returns:
        plain sentences; what the evaluation does not say is left out.
    """
    notes = []
    if "n" in evaluation:
        against = f" against {evaluation['reference_n']:,} real ones" if "reference_n" in evaluation else ""
        notes.append(f"Scores of {evaluation['n']:,} samples{against}.")
    if "floor_n" in evaluation:
        notes.append(f"“Real data” is the floor: what {evaluation['floor_n']:,} real samples score in their place.")
    if "kl" in evaluation.get("labels", {}):
        notes.append(
            "KL is that of real from generated points, estimated from nearest neighbours: it may be negative, and "
            "depends on both numbers of points, so compare it only where they are the same."
        )
    extractor = evaluation.get("extractor", {})
    if "name" in extractor:
        weights = f" (weights {extractor['hash']})" if extractor.get("hash") else ""
        notes.append(f"Features: {extractor['name']}{weights}.")
    if evaluation.get("comparable") is False:
        kind = "in-domain scores" if extractor.get("name") == "domain" else "scores of this set-up"
        notes.append(
            f"These are {kind}: compare them only with scores on the same features, never with published ones."
        )
    return notes + list(evaluation.get("warnings", []))


def recognisable_digits(evaluation: Mapping) -> str | None:
    """Whether samples of a ten-digit data set meet the project's bar for recognisable digits, in a sentence.

    The bar: mean top probability of the classifier 0.9 or more, every digit 3 % of the samples or more, FID at most
    three times its floor.

    Args:
        evaluation: as for :func:`score_rows`.

    Returns:
        the sentence, or None if the evaluation lacks one of the numbers.
    """
    keys = ("mean_top_probability", "smallest_class_share", "fid", "fid_floor")
    if any(evaluation.get(key) is None for key in keys):
        return None
    certain, share, fid, floor = (evaluation[key] for key in keys)
    met = certain >= 0.9 and share >= 0.03 and fid <= 3 * floor
    return (
        f"Recognisable digits: {'met' if met else 'missed'}. Mean top probability {certain:.3f} (bar 0.9), rarest "
        f"digit {share:.1%} (bar 3 %), {evaluation['labels']['fid']} {fid / floor:.1f} times its floor (bar 3)."
    )
