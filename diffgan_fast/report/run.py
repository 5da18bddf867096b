"""The page of one run, written from what lies in its directory."""

import json
import os
import re
from html import escape
from pathlib import Path

from .. import files
from .html import Section, block, page, paragraph, picture, settings, tiles
from .plots import curves, levels
from .scores import SCORE_COLUMNS, SPREAD_NOTE, recognisable_digits, score_notes, score_rows
from .table import MISSING, html_table, is_number, number

PRIOR_LIMIT = 0.05  # of sqrt(abar_T): above it a reader is warned
EARLIER_GRIDS = 4
STRIPS = {"noising": "Noising", "denoising": "Denoising"}
LEVELS = {"mse": "Error of the predicted noise (MSE)", "log_var_eps": "Log variance of the predicted noise"}

_CLOCK = ("step", "images_seen", "seconds")
_TITLES = LEVELS | {"lr": "Learning rate", "T": "Largest noise level T"}


def _json(path: Path) -> dict:
    return json.loads(path.read_text()) if path.is_file() else {}


def _history(path: Path) -> list[dict]:
    """All whole rows; a run that was killed may have left half a line at the end."""
    lines = path.read_text().splitlines(keepends=True) if path.is_file() else []
    if lines and not lines[-1].endswith("\n"):
        lines.pop()
    return [json.loads(line) for line in lines if line.strip()]


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.1f} s"
    hours, minutes = divmod(round(seconds / 60), 60)
    return f"{hours} h {minutes:02} min" if hours else f"{minutes} min"


def _summary(history: list[dict], evaluation: dict, kind: str) -> str:
    clock = {key: max(seen) for key in _CLOCK if (seen := [row[key] for row in history if key in row])}
    found = {}
    if "step" in clock:
        found["steps"] = number(clock["step"])
    if "images_seen" in clock:
        found[f"{kind} seen"] = number(clock["images_seen"])
    if "seconds" in clock:
        found["training time"] = _duration(clock["seconds"])
    if clock.get("seconds") and "images_seen" in clock:
        found[f"{kind} / s"] = number(round(clock["images_seen"] / clock["seconds"]))
    if joules := [row["gpu"]["joules_per_image"] for row in history if "joules_per_image" in row.get("gpu", {})]:
        found[f"J / {kind.removesuffix('s')}"] = number(sum(joules) / len(joules))
    labels = evaluation.get("labels", {})
    found |= {labels[key]: number(evaluation[key]) for key in labels if is_number(evaluation.get(key))}
    return tiles(found) if found else ""


def _gpu(history: list[dict]) -> list[Section]:
    """What the GPU did at the logged steps: its name, the range of each reading, and every throttle reason seen."""
    states = [row["gpu"] for row in history if row.get("gpu")]
    shown = {}
    for key in dict.fromkeys(k for state in states for k in state):
        seen = [state[key] for state in states if key in state]
        if all(is_number(v) for v in seen):
            low, high = number(min(seen)), number(max(seen))
            shown[key] = low if low == high else f"{low} to {high}"
        else:
            shown[key] = ", ".join(dict.fromkeys(map(str, seen)))
    return [("GPU", settings(shown))] if shown else []


def _prior_warning(config: dict) -> str:
    mismatch = config.get("schedule", {}).get("prior_mismatch", 0)
    if mismatch <= PRIOR_LIMIT:
        return ""
    return paragraph(
        f"The noise schedule stops early: √ᾱ_T = {mismatch:.3f}, so noised data still show {mismatch:.0%} of the data "
        "at t = T, while sampling starts from pure noise. Expect samples to suffer; a schedule that reaches "
        f"√ᾱ_T ≤ {PRIOR_LIMIT} avoids it.",
        "warning",
    )


def _setting(value) -> str:
    if value is None or isinstance(value, bool):
        return {None: MISSING, True: "yes", False: "no"}[value]
    if isinstance(value, list):
        return ", ".join(map(_setting, value)) or MISSING
    return f"{value:g}" if isinstance(value, float) else str(value)


def _flat(values: dict, prefix: str = "") -> dict[str, str]:
    found: dict[str, str] = {}
    for key, value in values.items():
        found |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: _setting(value)}
    return found


def _settings(config: dict) -> Section:
    """What was run: the plain entries and the method's own options; the other groups fold away."""
    groups = {key: value for key, value in config.items() if isinstance(value, dict)}
    plain = {key: value for key, value in config.items() if key not in groups}
    body = settings(_flat(plain | groups.pop("config", {})))
    for name, values in groups.items():
        body += f"<details><summary>{escape(name)}</summary>{settings(_flat(values))}</details>"
    return "Settings", body


def _plots(history: list[dict]) -> list[Section]:
    """Losses together, critic logits together, and every other scalar that changes in a plot of its own."""
    scalars = dict.fromkeys(k for row in history for k, v in row.items() if is_number(v) and k not in _CLOCK)
    groups: dict[str, list[str]] = {}
    for key in scalars:
        last = key.rsplit("_", 1)[-1]
        title = {"loss": "Losses", "logit": "Critic's logits"}.get(last, _TITLES.get(key, key.replace("_", " ")))
        if len({row[key] for row in history if row.get(key) is not None}) > 1:
            groups.setdefault(title, []).append(key)
    plots = [
        picture(curves(history, {k: k.replace("_", " ") for k in keys}, title, y_label=""), alt=title)
        for title, keys in groups.items()
    ]
    return [("Training", block("plots", plots))] if plots else []


def _samples(folder: Path, kind: str) -> list[Section]:
    """The last picture large, earlier ones small, spread evenly over the run; then the strips."""
    grids = {int(m[1]): path for path in folder.glob("step-*.png") if (m := re.fullmatch(r"step-(\d+)", path.stem))}
    steps, sections = sorted(grids), []
    if steps:
        *earlier, last = steps
        count = min(EARLIER_GRIDS, len(earlier))
        chosen = [earlier[i * (len(earlier) - 1) // max(1, count - 1)] for i in range(count)]
        shown = {step: picture(grids[step].read_bytes(), f"step {step:,}") for step in [*chosen, last]}
        large = block("points" if kind == "points" else "samples", [shown.pop(last)])
        body = large + (block("pictures", list(shown.values())) if shown else "")
        sections.append(("Samples", body))
    strips = [
        picture((folder / f"{stem}.png").read_bytes(), caption)
        for stem, caption in STRIPS.items()
        if (folder / f"{stem}.png").is_file()
    ]
    return sections + ([("From noise to image", "".join(strips))] if strips else [])


def _evaluation(
    evaluation: dict, best: dict, history: list[dict], by_level: dict[str, list], data: str
) -> list[Section]:
    """Scores with their floors and notes, those of the best step, their course, and what is known by noise level."""
    sections = []
    if evaluation:
        notes = score_notes(evaluation)
        if "spread" in evaluation:
            notes.append(SPREAD_NOTE)
        if data in ("digits", "mnist") and (verdict := recognisable_digits(evaluation)):
            notes.insert(0, verdict)
        body = html_table(score_rows(evaluation), SCORE_COLUMNS) + "".join(paragraph(note, "note") for note in notes)
        sections.append(("Evaluation", body))
    if best:
        note = f"Step {best['step']:,}, the best in the evaluations on the way; above are the scores of the last step."
        body = html_table(score_rows(best), SCORE_COLUMNS) + paragraph(note, "note")
        sections.append(("Best checkpoint", body))
    course = [{"step": row["step"], **row["evaluation"]} for row in history if "evaluation" in row and "step" in row]
    if len(course) > 1:
        labels = {key: label for row in course for key, label in row.get("labels", {}).items()}
        plots = [
            picture(curves(course, {key: label}, label, y_label="", smooth=0), alt=label)
            for key, label in labels.items()
        ]
        sections.append(("Scores over the run", block("plots", plots)))
    by_t = [dict(zip(by_level, values, strict=True)) for values in zip(*by_level.values(), strict=True)]
    plots = [
        picture(levels(by_t, {key: title}, title, y_label=""), alt=title)
        for key, title in LEVELS.items()
        if by_level.get(key)
    ]
    return sections + ([("By noise level", block("plots", plots))] if plots else [])


def write_run(run_dir: str | os.PathLike) -> Path:
    """Write `report.html` into a run directory: settings, summary, samples, curves and scores on one page.

    Only ``config.json`` must be there. Beside it are read, where they exist, ``metrics.jsonl``, ``evaluation.json``,
    ``evaluation-best.json``, ``levels.json`` (by noise level: lists "t", "mse", "log_var_eps"), ``samples/step-N.png``,
    ``samples/noising.png`` and ``samples/denoising.png``; what is missing has no place on the page.

    Args:
        run_dir: the directory of a run.

    Returns:
        the path of the page, which appears whole or not at all.

    Raises:
        ValueError: the directory holds no ``config.json``.
    """
    folder = Path(run_dir)
    if not (folder / "config.json").is_file():
        raise ValueError(f"{folder} is no run directory: it holds no config.json")
    config, evaluation = _json(folder / "config.json"), _json(folder / "evaluation.json")
    best, by_level = _json(folder / "evaluation-best.json"), _json(folder / "levels.json")
    history = _history(folder / "metrics.jsonl")
    method, data = config.get("method"), config.get("data")
    kind = "points" if len(config.get("shape", ())) == 1 else "images"
    title = " on ".join(str(name) for name in (method, data) if name is not None) or folder.resolve().name
    sections = [
        ("", _summary(history, evaluation, kind) + _prior_warning(config)),
        *_samples(folder / "samples", kind),
        *_plots(history),
        *_evaluation(evaluation, best, history, by_level, str(data)),
        *_gpu(history),
        _settings(config),
    ]
    return files.write(folder / "report.html", page(title, sections).encode())
