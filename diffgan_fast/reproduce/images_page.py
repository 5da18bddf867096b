"""The report on `reproduce_table1`: tables, what follows from them, and pictures named by the document's figures."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from scipy.stats import t as students_t

from diffgan_fast import files, report
from diffgan_fast.data import Data
from diffgan_fast.report.html import Section, block, page, paragraph, picture
from diffgan_fast.report.run import PRIOR_LIMIT, STRIPS
from diffgan_fast.reproduce.study import spread
from diffgan_fast.run import Run

WHAT = {
    "before": "the base itself",
    "control": "the base trained on, without a critic",
    "method1": "through the whole chain, by a fixed critic of images",
    "method2": "through the whole chain, the critic of images trained along",
    "method2-scratch": "method 2 with a critic that starts untrained",
    "method2-batch-10": "method 2 with the document's batch size",
    "method3": "a critic of the noise",
    "method3.5": "a critic of the noise that is told t",
    "method4": "a critic of the next image in the chain",
    "method4-deep-critic": "method 4 with a deeper, wider critic",
    "discriminator-guidance": "the denoiser stays; a critic corrects its samples",
}
# Table 1 as printed: what was fine-tuned -> IS, FID, KID, each before and after the best method; None where it has an X
PUBLISHED: dict[str, dict[str, tuple[str | None, str | None]]] = {
    "unconditional": {"IS": ("2.14 ± 0.16", "2.10 ± 0.12"), "FID": ("54.91", "45.86"), "KID": ("0.0348", "0.0236")},
    "conditional": {"IS": ("1.99 ± 0.13", "1.99 ± 0.13"), "FID": ("84.74", "84.74"), "KID": ("0.0719", "0.0718")},
    "CIFAR-10": {"IS": (None, "4.52 ± 0.57"), "FID": (None, "103.32"), "KID": (None, None)},
}
ARTEFACTS = (
    "Conditional, FID 84.74 before and 84.74 after: the published code saves the wrong variable, the network that was "
    "not fine-tuned. Before and after are the same network, and nothing follows about the method.",
    "CIFAR-10, “method 3.5”: in the published code it is method 3; its critic is not told t.",
    "–: an X in the document, “due to technical constraints with the size of the CIFAR-10 models”. So there is no "
    "before that its after could be compared with.",
    "The best method is 3.5 throughout. The document has one run of each and does not say how many samples it "
    "measures; its ± is over ten parts of the same samples.",
    "Its scores are on ImageNet's features, those above on features of this data set: compare what a method changes, "
    "never a number here with a number there.",
)
FIGURES: dict[str, dict[str, int]] = {
    "unconditional": {"before": 7, "method1": 19, "method2": 20, "method3": 21, "method3.5": 8, "method4": 22},
    "conditional": {"before": 9, "method3.5": 10},
    "CIFAR-10": {"before": 11, "method3.5": 12},
}
REAL = {"kid": "kid_floor", "fid": "fid_floor", "is": "is_real"}  # score -> that of real data in the samples' place
DECIMALS = {"kid": 4, "fid": 3, "is": 3, "seconds": 1}
SHOWN = 64  # images of the data

Outcomes = Sequence[Mapping[str, Any]]
Results = Mapping[str, Outcomes]


def _spread(outcomes: Outcomes, key: str) -> str:
    return spread([outcome[key] for outcome in outcomes], DECIMALS[key])


def score_table(results: Results) -> tuple[list[dict[str, Any]], dict[str, str]]:
    """Rows and columns, for `report.table`, of the scores of each configuration, with those of real data beneath."""
    rows = []
    for name, outcomes in results.items():
        row = {"config": name} | {key: _spread(outcomes, key) for key in REAL}
        if outcomes[0]["steps"]:
            row |= {"images": outcomes[0]["images"], "seconds": _spread(outcomes, "seconds")}
        rows.append(row)
    real = results["before"][0]
    rows.append({"config": "real data"} | {key: f"{real[floor]:.{DECIMALS[key]}f}" for key, floor in REAL.items()})
    return rows, {
        "config": "configuration",
        "kid": "KID (domain)",
        "fid": "FID (domain)",
        "is": "IS (domain)",
        "images": "images seen",
        "seconds": "training (s)",
    }


def gains(results: Results, name: str) -> dict[str, list[float]]:
    """A configuration's KID minus that of what it is compared with, seed by seed."""
    ours = results[name]
    others: dict[str, Outcomes] = {"before": results["before"]}
    if name != "control":
        others["equal images"] = results["control"]
        others["equal seconds"] = [outcome["equal_seconds"] for outcome in ours]
    return {what: difference(ours, theirs) for what, theirs in others.items()}


def difference(ours: Outcomes, theirs: Outcomes) -> list[float]:
    """KID minus KID, paired by seed."""
    return [a["kid"] - b["kid"] for a, b in zip(ours, theirs, strict=True)]


def verdict(differences: Sequence[float]) -> str:
    """ "better" or "worse" if the mean difference of KID lies beyond two standard errors, else ""."""
    if len(differences) < 2:
        return ""
    mean, error = statistics.mean(differences), statistics.stdev(differences) / math.sqrt(len(differences))
    return "" if abs(mean) <= 2 * error else "better" if mean < 0 else "worse"


def _capped(results: Results, name: str) -> bool:
    return any(outcome.get("capped", False) for outcome in results[name])


def gain_table(results: Results) -> tuple[list[dict[str, Any]], dict[str, str]]:
    """Rows and columns, for `report.table`, of paired differences of KID with their verdicts."""
    rows = []
    for name in list(results)[1:]:
        row = {"config": name}
        for what, differences in gains(results, name).items():
            row[what] = f"{spread(differences, DECIMALS['kid'], '+')} {verdict(differences)}".strip()
        if name != "control":
            longer = [outcome["equal_seconds"]["steps"] / results["control"][0]["steps"] for outcome in results[name]]
            row["longer"] = f"{statistics.mean(longer):.1f}{' (cap)' if _capped(results, name) else ''}"
        rows.append(row)
    columns = {"config": "KID minus that of", "before": "the base", "equal images": "control, equal images"}
    return rows, columns | {"equal seconds": "control, equal seconds", "longer": "its steps ×"}


_THAN = {
    "before": "the base",
    "equal images": "the control at equal images",
    "equal seconds": "the control at equal seconds",
}
_TOLD = {"better": "better than", "worse": "worse than", "": "not to be told from"}
_CLAIMS = {
    "unconditional": "In the document method 3.5 lowers KID from 0.0348 to 0.0236.",
    "conditional": "In the document method 3.5 changes nothing, but before and after were the same network.",
    "CIFAR-10": "In the document method 3.5 makes the images worse to the eye; it has no score before.",
}


def conclusions(results: Results, column: str) -> list[str]:
    """What the differences of KID carry, in sentences.

    Args: column: the one of PUBLISHED that the study stands beside.
    """
    seeds = len(results["before"])
    if seeds < 2:
        return ["One seed has no spread, so nothing is concluded: take three or more."]
    said = []
    if len(results) > 2:
        said += [_summary(results, what) for what in _THAN]
    if "method2" in results:
        said.append(_method2(results))
    if "method3.5" in results:
        told = _TOLD[verdict(gains(results, "method3.5")["before"])]
        said.append(f"{_CLAIMS[column]} Here it is {told} its base.")
    chance = 2 * students_t.sf(2, seeds - 1)
    said.append(
        f"Of differences made by chance alone, {chance:.0%} lie beyond two standard errors of {seeds} seeds. All seeds "
        "share one base: what is said holds for it."
    )
    return said


def _summary(results: Results, what: str) -> str:
    """Which configurations are better and which worse than one thing."""
    found: dict[str, list[str]] = {"Better": [], "Worse": []}
    for name in list(results)[1:]:
        if differences := gains(results, name).get(what):
            judged = verdict(differences).capitalize() or "Not to be told apart"
            if judged == "Better" and what == "equal seconds" and _capped(results, name):
                judged = "Better, but the cap left the control less time"
            found.setdefault(judged, []).append(name)
    parts = [f"{judged}: {', '.join(names) or 'none'}." for judged, names in found.items()]
    return f"KID beside that of {_THAN[what]}. {' '.join(parts)}"


def _method2(results: Results) -> str:
    """Whether method 2 gains from batches that the document had no memory for."""
    compared = {_THAN[what]: d for what, d in gains(results, "method2").items()}
    if "method2-batch-10" in results:
        compared["method 2 at batch 10"] = difference(results["method2"], results["method2-batch-10"])
    parts = [f"{_TOLD[verdict(d)]} {than} ({spread(d, DECIMALS['kid'], '+')})" for than, d in compared.items()]
    capped = " The cap left that control less time." if _capped(results, "method2") else ""
    return f"Method 2 at batch 128, by KID: {'; '.join(parts)}.{capped}"


def write_page(path: Path, results: Results, data: Data, base: Run, critic: Run | None, n: int) -> None:
    """Writes the report."""
    conditional = base.method.config.conditional  # type: ignore[attr-defined]
    column = "conditional" if conditional else "CIFAR-10" if data.shape[0] == 3 else "unconditional"
    sections = [
        ("", _scores(results, base, critic, n)),
        ("Differences of KID, paired by seed", _gains(results)),
        ("Conclusions", "".join(map(paragraph, conclusions(results, column)))),
        ("Configurations", _configurations(results)),
        ("Table 1 as published", _published()),
        *_pictures(path.parent, results, data, column),
        ("Base", _base(base)),
        ("From noise to image", _strips(results)),
    ]
    title = f"Table 1 again: adversarial fine-tuning of a {'conditional ' * conditional}DDPM on {data.name}"
    files.write(path, page(title, sections))


def _scores(results: Results, base: Run, critic: Run | None, n: int) -> str:
    images, last = base.state.step * base.method.config.batch_size, len(results["before"]) - 1
    opening = (
        f"Every configuration starts from the same base, which saw {images:,} images in {base.seconds:.0f} s, and is "
        f"trained on {results['control'][0]['images']:,} more with {f'seeds 0 to {last}' if last else 'seed 0'}. The "
        f"judge, fixed in advance, is KID at the last checkpoint, on {n:,} samples from the same noise for all "
        "configurations."
    )
    start = "" if critic is None else f", nor the {critic.seconds:.0f} s of the critic that methods 1 and 2 start from"
    notes = (
        "Mean ± standard deviation over seeds. “Before” is the base, sampled with the same seeds. “Real data”: what "
        "held-out real images score in the samples' place.",
        "Training is that of the fine-tuning alone: not sampling, in which discriminator guidance runs its critic at "
        f"each step, nor the drawing of the samples that this critic learns from{start}.",
        "The images of methods 3 and 3.5 include those of the first fifth, in which the critic trains alone.",
        "The scores are on features of a classifier of this data set: never compare them with published ones.",
    )
    return paragraph(opening) + report.html_table(*score_table(results)) + _notes(*notes)


def _configurations(results: Results) -> str:
    rows = [{"config": name, "what": WHAT[name], "lr": f"{results[name][0]['lr']:g}"} for name in list(results)[1:]]
    columns = {"config": "configuration", "what": "what it is", "lr": "learning rate"}
    note = (
        "The learning rate is the denoiser's; of discriminator guidance, which leaves the denoiser, the critic's. "
        "Where it is not the control's, what the critic adds and what the rate does cannot be told apart."
    )
    return report.html_table(rows, columns) + _notes(note)


def _gains(results: Results) -> str:
    notes = [
        "Mean ± standard deviation over seeds; lower is better. A verdict stands where the mean lies beyond two "
        "standard errors.",
        "Equal images: the control, trained on as many images as the configuration. Equal seconds: the control trained "
        "on for as many seconds as the configuration took, in so many times its own steps, but at least for those.",
    ]
    if any(_capped(results, name) for name in results):
        notes.append("(cap): more steps would equal the seconds, but the study stops there: the control had less time.")
    return report.html_table(*gain_table(results)) + _notes(*notes)


def _published() -> str:
    rows: list[dict[str, Any]] = [
        {"network": f"{column}, {when}", **{score: values[i] for score, values in scores.items()}}
        for column, scores in PUBLISHED.items()
        for i, when in enumerate(("without fine-tuning", "best method"))
    ]
    return report.html_table(rows, {"network": "", "KID": "KID", "FID": "FID", "IS": "IS"}) + _notes(*ARTEFACTS)


def _pictures(folder: Path, results: Results, data: Data, column: str) -> list[Section]:
    """Samples of the base and of every configuration, and of the data, beside the document's figures by name."""
    shown = []
    for name, outcomes in results.items():
        grid = outcomes[0]["path"] / "samples" / f"step-{outcomes[0]['steps']}.png"
        figure = FIGURES[column].get(name)
        shown.append(picture(grid.read_bytes(), f"{name} (Figure {figure})" if figure else name))
    note = "Seed 0, from the same noise in every grid. (Figure …): the document's picture of the same, here and below."
    data = data.subset(min(SHOWN, len(data)))
    drawn = report.save_grid(data.batch(slice(None)), folder / "data.png").read_bytes()
    figure = 14 if data.shape[0] == 3 else 13
    return [
        ("Samples", block("beside samples", shown) + _notes(note)),
        ("Data", block("samples", [picture(drawn, f"{len(data)} images of {data.name} (Figure {figure})")])),
    ]


def _strips(results: Results) -> str:
    """Images on their way to noise, and the base's on their way from it."""
    folder = results["before"][0]["path"] / "samples"
    return "".join(picture((folder / f"{stem}.png").read_bytes(), caption) for stem, caption in STRIPS.items())


def _base(base: Run) -> str:
    """The base's loss and noise schedule."""
    S = base.method.schedule  # type: ignore[attr-defined]
    rows = [
        {"t": t, "beta": beta, "signal": abar**0.5, "noise": (1 - abar) ** 0.5, "gain": alpha**-0.5}
        for t, (beta, alpha, abar) in enumerate(
            zip(S.betas.tolist(), S.alphas.tolist(), S.alphas_cumprod.tolist(), strict=True)
        )
    ]
    plots = []
    if any("loss" in row for row in base.history):
        title = "Training loss (Figure 6)"
        plots.append(picture(report.curves(base.history, ["loss"], title, y_label=""), alt=title))
    for keys in (
        {"beta": r"$\beta_t$"},
        {"signal": r"$\sqrt{\bar\alpha_t}$", "noise": r"$\sqrt{1-\bar\alpha_t}$"},
        {"gain": r"$1/\sqrt{\alpha_t}$"},
    ):
        title = f"Noise schedule: {', '.join(keys.values())} (Figure 5)"
        plots.append(picture(report.levels(rows, keys, title, y_label=""), alt=", ".join(keys)))
    warning = (
        paragraph(
            f"The schedule leaves √ᾱ_T = {S.prior_mismatch:.3f} of the data at t = T, where sampling starts from pure "
            "noise: the samples are biased.",
            "warning",
        )
        if S.prior_mismatch > PRIOR_LIMIT
        else ""
    )
    return warning + block("plots", plots)


def _notes(*notes: str) -> str:
    return "".join(paragraph(note, "note") for note in notes)
