"""The report on `reproduce_ddgan`: the trade-off as table and plots, the published one, and a denoising step."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from diffgan_fast import files, report
from diffgan_fast.report.html import Section, block, page, paragraph, picture
from diffgan_fast.reproduce.denoising import compared
from diffgan_fast.reproduce.study import spread
from diffgan_fast.run import Run

# CIFAR-10, as the slides have it from Xiao et al. 2022, Table 1: IS, FID, recall, NFE, seconds for 100 images on a V100
PUBLISHED: dict[str, tuple[float | None, ...]] = {
    "DDGAN, T = 4": (9.63, 3.75, 0.57, 4, 0.21),
    "DDPM": (9.46, 3.21, 0.57, 1000, 80.5),
    "DDIM, T = 50": (8.78, 4.67, 0.53, 50, 4.01),
    "Score SDE (VP)": (9.68, 2.41, 0.59, 2000, 421.5),
    "StyleGAN2 without ADA": (9.18, 8.32, 0.41, 1, 0.04),
    "StyleGAN2 with ADA": (9.83, 2.92, 0.49, 1, 0.04),
    "SNGAN": (8.22, 21.7, 0.44, 1, None),
}
DECIMALS = {"is": 3, "fid": 3, "kid": 4, "precision": 3, "recall": 3, "sample_seconds": 3, "seconds": 0}
FLOORS = {"is": "is_real", **{key: f"{key}_floor" for key in ("fid", "kid")}, "precision": "precision_real",
          "recall": "recall_real"}  # fmt: skip
NEAR = 0.1  # calls whose operations differ by so much pass for equal
DRAWN = 5000  # points of a denoising step
NOTES = (
    "Mean ± standard deviation over seeds. Sampling: seconds for 100 images in one batch on this machine. NFE: how "
    "often the network ran for them. MACs: multiply-accumulates of a call on one image. “Real data”: what held-out "
    "real images score in the samples' place.",
    "All models saw the same number of images; a step of a DDGAN or a GAN trains two networks on each, and a DDGAN's "
    "generator runs twice, so that seconds of training differ.",
)

Results = Mapping[str, Sequence[Mapping[str, Any]]]


def tradeoff_table(results: Results) -> tuple[list[dict[str, Any]], dict[str, str]]:
    """Rows and columns, for `report.table`: each configuration's scores and cost, with real data beneath."""
    rows = []
    for name, outcomes in results.items():
        row: dict[str, Any] = {"config": name, "nfe": outcomes[0]["nfe"]}
        row["macs"] = f"{outcomes[0]['macs'] / 1e6:,.1f} M"
        rows.append(row | {key: spread([o[key] for o in outcomes], d) for key, d in DECIMALS.items()})
    real = next(iter(results.values()))[0]
    rows.append({"config": "real data"} | {key: f"{real[floor]:.{DECIMALS[key]}f}" for key, floor in FLOORS.items()})
    columns = {
        "config": "configuration",
        **real["labels"],
        "nfe": "NFE",
        "macs": "MACs a call",
        "sample_seconds": "sampling 100 (s)",
    }
    return rows, columns | {"seconds": "training (s)"}


def speedups(results: Results) -> list[str]:
    """How many times faster the few steps are than the many, in sentences that say what both are worth.

    Beside each ratio stands what the multiply-accumulates of all calls predict.
    """
    said = []
    for few, many in (("ddgan-4", "ddpm-300"), ("ddgan-4", "ddpm-1000"), ("ddgan-4", "ddim-50")):
        if few in results and many in results:
            seconds, fids = (
                [statistics.mean(outcome[key] for outcome in results[name]) for name in (many, few)]
                for key in ("sample_seconds", "fid")
            )
            label = results[few][0]["labels"]["fid"]
            work = [results[name][0]["nfe"] * results[name][0]["macs"] for name in (many, few)]
            a_call = results[many][0]["macs"] / results[few][0]["macs"]
            apart = "" if abs(a_call - 1) <= NEAR else f" A call of {many} has {a_call:.2f} times the operations."
            said.append(
                f"{few} samples {seconds[0] / seconds[1]:.1f} times as fast as {many} "
                f"({work[0] / work[1]:.1f} by counted passes); {label} {fids[1]:.3f} against {fids[0]:.3f}.{apart}"
            )
    return said


def write_page(path: Path, results: Results, what: Mapping[str, str], denoised: Run) -> None:
    """Writes the report.

    Args:
        results: as `reproduce_ddgan` returns them.
        what: configuration -> what it is.
        denoised: the `ddgan` of points whose steps are shown.
    """
    first = next(iter(results.values()))[0]
    body = "".join(map(paragraph, speedups(results))) + report.html_table(*tradeoff_table(results))
    notes = (*NOTES, *report.score_notes(first))
    configurations = report.html_table(
        [{"config": name, "what": text} for name, text in what.items()],
        {"config": "configuration", "what": "what it is"},
    )
    sections: list[Section] = [
        ("", body + "".join(paragraph(note, "note") for note in notes)),
        ("Quality against time", _plots(results)),
        ("Configurations", configurations),
        ("As published, on CIFAR-10", _published()),
        ("Samples", _samples(results)),
        ("One denoising step", _steps(denoised)),
    ]
    data = path.parent.name
    files.write(path, page(f"The trade-off of Denoising Diffusion GAN on {data}", sections).encode())


def _plots(results: Results) -> str:
    labels, plots = next(iter(results.values()))[0]["labels"], []
    for cost, name in (("sample_seconds", "seconds for 100 images"), ("nfe", "network calls (NFE)")):
        for score in ("fid", "recall"):
            points = {config: [(o[cost], o[score]) for o in outcomes] for config, outcomes in results.items()}
            title = f"{labels[score]} against {name}"
            plots.append(picture(report.tradeoff(points, name, labels[score], title), alt=title))
    return block("plots", plots)


def _published() -> str:
    keys = ("IS", "FID", "recall", "NFE", "seconds")
    rows = [{"model": model, **dict(zip(keys, values, strict=True))} for model, values in PUBLISHED.items()]
    specs = {"IS": ".2f", "FID": ".2f", "recall": ".2f", "NFE": ",.0f", "seconds": "g"}
    table = report.html_table(rows, {"model": "model"} | {key: (key, spec) for key, spec in specs.items()})
    note = "On ImageNet's features, at full training: compare its ratios of times with those above, never a score."
    return table + paragraph(note, "note")


def _samples(results: Results) -> str:
    """A grid of each configuration's first run; configurations that share a run share its picture."""
    shown: dict[Path, tuple[str, Path]] = {}
    for name, outcomes in results.items():
        folder = Path(outcomes[0]["path"])
        shown.setdefault(folder, (name, folder / "samples" / f"step-{outcomes[0]['step']}.png"))
    return block("beside samples", [picture(grid.read_bytes(), name) for name, grid in shown.values()])


def _steps(run: Run) -> str:
    found = compared(run, DRAWN)
    rows = {
        "DDGAN": {level: step["ddgan"] for level, step in found.items()},
        "best Gaussian": {level: step["gaussian"] for level, step in found.items()},
    }
    shown = picture(
        report.panels(rows, {level: step["true"] for level, step in found.items()}, "density"),
        f"p(x_(t-1) | x_t) on {run.data_name}, for one x_t at each t of a DDGAN's {len(found)} steps",
    )
    columns = {"t": "KL (bits) of the true law", "ddgan": "from DDGAN", "gaussian": "from the best Gaussian"}
    table = report.html_table(
        [{"t": level, **step["kl"]} for level, step in found.items()], columns | {"floor": "from itself"}
    )
    note = (
        "First row: drawn from the data by Bayes' rule. The Gaussian has its mean and covariance; of all Gaussians it "
        "is the nearest, so that no diffusion model with Gaussian steps of this size does better."
    )
    return shown + table + paragraph(note, "note")
