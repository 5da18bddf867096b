"""The 25 Gaussians of "Diffusion-GAN" again (Figure 5): a plain GAN and Diffusion-GAN, several seeds each.

Figure 5 compares the plain GAN with Diffusion-GAN. All arms have the same networks (LeakyReLU, 128 wide; the generator
two layers deeper and the critic one than the paper's), the same budget, batches, learning rates and seeds; the critic
of Diffusion-GAN is not told the noise level, so that it is the plain GAN's to the last weight. The R1 penalty, which
the paper has on images, keeps modes by itself: both are trained without it and with it, so that nothing is put down to
the noise that R1 does. The paper names no other setting: those here were chosen by us.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tqdm import tqdm

from diffgan_fast import data as data_sets
from diffgan_fast import files, report
from diffgan_fast.api import train
from diffgan_fast.engine import distributed
from diffgan_fast.report.html import block, page, paragraph, picture
from diffgan_fast.reproduce.study import check, spread
from diffgan_fast.run import Run

DATA = "gaussians25"
# What all arms have, and arm -> its method and what it has beside
COMMON: dict[str, Any] = dict(
    steps=11_500,
    batch_size=256,
    z_dim=2,
    layers=4,
    critic_layers=3,
    lr=4e-3,
    critic_lr=2e-3,
    lr_schedule="cosine",
    adam_beta1=0.0,
    adam_beta2=0.99,
    log_every=100,
    sample_every=0,
)
R1: dict[str, Any] = dict(r1_gamma=0.1, r1_every=4)
# sigma as large as the data and a few steps: noise that reaches the next mode and leaves the data where they are
NOISE: dict[str, Any] = dict(sigma=3.0, T_min=5, T_max=30, d_target=0.3, condition="none")
ARMS: dict[str, tuple[str, dict[str, Any]]] = {
    "gan": ("gan", {}),
    "diffusion-gan": ("diffusion-gan", NOISE),
    "gan, R1": ("gan", R1),
    "diffusion-gan, R1": ("diffusion-gan", R1 | NOISE),
}
JUDGED = "diffusion-gan, R1"
SET_BY_STUDY = {name for _, settings in ARMS.values() for name in settings}
GOAL = (25, 0.9, 120.0)  # modes, share of high-quality samples, seconds of training on two cores: of every seed
SCORES = ("modes", "high_quality", "modes_real", "high_quality_real")

# each arm -> for each seed, SCORES and "seconds" of training
Results = dict[str, list[dict[str, float]]]


def reproduce_gaussians(
    out: str | Path = "runs/reproduce-gaussians",
    *,
    seeds: int = 5,
    n: int = 10_000,
    progress: bool = True,
    **options: Any,
) -> Results:
    """Trains a plain GAN, one with R1, and Diffusion-GAN on the 25 Gaussians, and counts the modes they capture.

    Table and figures go to out/report.html.

    Args:
        out: directory; runs lie in out/<arm>/seed-<s>. Complete ones are reused, others go on.
        seeds: how many, from 0 on.
        n: samples to measure; 20 within three standard deviations of a centre capture its mode.
        options: go to all trainings, for example steps=, lr=, device=.

    Returns: each arm -> for each seed, the modes captured, the share of samples within three standard deviations of a
    centre, both for real points in the samples' place, and seconds of training.

    Raises: ValueError for seeds below 1, or an option that the arms do not share.
    """
    check(seeds)
    if fixed := SET_BY_STUDY & options.keys():
        raise ValueError(f"{', '.join(sorted(fixed))}: not of all arms, so that they would not compare")
    folder = Path(out)
    runs: dict[tuple[str, int], Run] = {}
    results: Results = {arm: [] for arm in ARMS}
    bar = tqdm([(arm, s) for s in range(seeds) for arm in ARMS], desc="gaussians", unit="run", disable=not progress)
    for arm, seed in bar:
        bar.set_postfix_str(f"{arm}, seed {seed}")
        method, own = ARMS[arm]
        settings = COMMON | options | own | dict(resume=True, progress=progress)
        run = train(method, DATA, folder / arm.replace(", ", "-") / f"seed-{seed}", seed=seed, **settings)
        scores = run.evaluated(n, seed=seed + 1, together=True)
        results[arm].append({name: scores[name] for name in SCORES} | {"seconds": run.seconds})
        runs[arm, seed] = run
    distributed.from_main(lambda: files.write(folder / "report.html", _page(results, runs, n).encode()))
    return results


def modes_table(results: Results) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Rows and columns, for `report.table`: each arm with the modes of every seed, the worst one, and the spread."""
    rows: list[dict[str, Any]] = [
        {
            "arm": arm,
            "each": ", ".join(str(seed["modes"]) for seed in seeds),
            "worst": min(seed["modes"] for seed in seeds),
            "worst_share": f"{min(seed['high_quality'] for seed in seeds):.1%}",
            "share": spread([100 * seed["high_quality"] for seed in seeds], 1),
            "seconds": spread([seed["seconds"] for seed in seeds], 1),
        }
        for arm, seeds in results.items()
    ]
    real = next(iter(results.values()))[0]
    rows.append(
        {"arm": "real data", "worst": int(real["modes_real"]), "share": f"{100 * real['high_quality_real']:.1f}"}
        | {"each": str(int(real["modes_real"])), "worst_share": f"{real['high_quality_real']:.1%}"}
    )
    columns = {
        "arm": "method",
        "each": "modes of 25, each seed",
        "worst": "worst seed",
        "share": "high quality (%)",
        "worst_share": "worst seed",
        "seconds": "training (s)",
    }
    return rows, columns


def verdict(results: Results) -> str:
    """Whether every seed of Diffusion-GAN reaches GOAL, in a sentence."""
    modes, share, limit = GOAL
    worst = {key: min(seed[key] for seed in results[JUDGED]) for key in ("modes", "high_quality")}
    slowest = max(seed["seconds"] for seed in results[JUDGED])
    met = worst["modes"] >= modes and worst["high_quality"] >= share and slowest <= limit
    return (
        f"Goal, of every seed of Diffusion-GAN: {modes} modes, {share:.0%} of high quality, {limit:.0f} s of training. "
        f"{'Met' if met else 'Missed'}: {worst['modes']} modes, {worst['high_quality']:.1%}, {slowest:.1f} s."
    )


def _page(results: Results, runs: dict[tuple[str, int], Run], n: int) -> str:
    config: Any = runs["gan", 0].method.config
    about = (
        f"All arms: {config.steps:,} steps of {config.batch_size}, learning rates {config.lr:g} of the generator and "
        f"{config.critic_lr:g} of the critic (schedule: {config.lr_schedule}), z of {config.z_dim}, averaged weights "
        f"sampled. {n:,} samples measured."
    )
    own = [
        f"{arm}: {', '.join(f'{name} {value}' for name, value in settings.items()) or 'nothing beside'}."
        for arm, (_, settings) in ARMS.items()
    ]
    notes = (
        "A sample is of high quality within three standard deviations (0.15) of a centre; a mode is captured by 20 of "
        "them.",
        "High quality: mean ± standard deviation over seeds.",
        f"Hidden layers of 128: {config.layers} of the generator, {config.critic_layers} of the critic; two each in "
        "the paper.",
        *own,
    )
    table = report.html_table(*modes_table(results)) + "".join(paragraph(note, "note") for note in notes)
    real = {DATA: data_sets.load(DATA).values}
    samples = {arm: {DATA: runs[arm, 0].sample(n, seed=1)} for arm in ARMS}
    shown = picture(report.panels(samples, real), "2,000 samples (blue) over real points (grey), seed 0")
    density = picture(report.panels(samples, real, "density"), f"All {n:,} samples")
    logits = {"real_logit": "real", "fake_logit": "generated"}
    plots = [
        picture(report.curves(runs[arm, 0].history, logits, f"{arm}: critic's logits", y_label=""), alt=arm)
        for arm in ARMS
    ]
    history = runs[JUDGED, 0].history
    plots.append(
        picture(report.curves(history, {"T": "T"}, "Largest noise level T", smooth=0), alt="Largest noise level T")
    )
    sections = [
        ("", paragraph(about) + paragraph(verdict(results)) + table),
        ("Samples (Figure 5)", block("beside", [shown, density])),
        ("Training, seed 0 (Figures 4 and 5)", block("plots", plots)),
    ]
    return page("25 Gaussians: a plain GAN and Diffusion-GAN", sections)
