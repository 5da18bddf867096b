"""The comparisons of "Diffusion-GAN" on images: with and without diffusion (Table 8), mixing (Table 7), T (Figure 7).

DCGAN's and SNGAN's networks, or StyleGAN2's, each with the noise that the paper recommends and without, the two mixing
distributions, a T that adapts or stays, and a schedule that is rebuilt for each T or fixed: several seeds, equal
images, equal generators. A critic that is told the noise level has more layers than the plain GAN's, as in the paper;
one that is not ("not-told") is the plain GAN's, and its difference the noise's alone. Published scores are of far
longer runs on other features; only differences here mean anything.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product
from pathlib import Path
from typing import Any

from tqdm import tqdm

from diffgan_fast import data as data_sets
from diffgan_fast import files, report
from diffgan_fast.api import train
from diffgan_fast.data.points import POINTS
from diffgan_fast.engine import distributed
from diffgan_fast.report.html import block, page, paragraph, picture
from diffgan_fast.reproduce.study import check, pictures, spread
from diffgan_fast.run import Run

NETWORKS: dict[str, dict[str, Any]] = {
    "dcgan": dict(preset="dcgan", network="dcgan", ema=0.999),
    "sngan": dict(preset="sngan"),
    "stylegan2": dict(preset="stylegan2", ema=0.999, flip=False),
}
TABLE_8 = ("dcgan", "sngan")
# configuration -> method, and its settings beside the network's
CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "gan": ("gan", {}),
    "diffusion-gan": ("diffusion-gan", {}),
    "not-told": ("diffusion-gan", dict(condition="none")),
    "priority": ("diffusion-gan", dict(mixing="priority", T_max=1000)),
    "fixed-T": ("diffusion-gan", dict(T_min=500, T_max=500)),
    "fixed-schedule": ("diffusion-gan", dict(noise_schedule="fixed")),
    "as-coded": ("diffusion-gan", dict(variant="as-coded", noise="pixel-priority")),
}
WHAT = {
    "gan": "no noise",
    "diffusion-gan": "the paper's starting point: T adapts in 5..500, uniform mixing, the schedule rebuilt for each T",
    "not-told": "the same noise, and a critic that is not told its level: the plain GAN's to the last weight",
    "priority": "priority mixing, T in 5..1000 (Table 7)",
    "fixed-T": "T = 500 from the first step (what Figure 7 asks, at the end of training)",
    "fixed-schedule": "T steps are the first of 500, as Equations 5 and 6 have it",
    "as-coded": "what the published code does: T in 10..1000, weights t - 1, the raw t to the critic, generator first",
}
SCORES = {"fid": 3, "kid": 4, "recall": 3}
SET_BY_STUDY = {"steps", "seed", "network", *(key for _, own in CONFIGS.values() for key in own)}

# (network, configuration) -> for each seed its scores, those of real data, seconds of training, with noise the last T
Results = dict[tuple[str, str], list[dict[str, float]]]


def reproduce_diffusion_gan(
    out: str | Path = "runs/reproduce-diffusion-gan",
    *,
    data: str | None = None,
    networks: Sequence[str] = TABLE_8,
    configs: Sequence[str] = tuple(CONFIGS),
    seeds: int = 3,
    n: int = 2000,
    kimg: float = 128.0,
    progress: bool = True,
    **options: Any,
) -> Results:
    """Trains every configuration with every network and several seeds on images, and measures them.

    Table and figures go to out/<data>/report.html.

    Args:
        out: directory; runs lie in out/<data>/<network>/<config>/seed-<s>. Complete ones are reused, others go on.
        data: a name out of `dgf.datasets()` that stands for images; None: "mnist" if its files lie on this machine,
            which takes hours on a CPU, else "digits".
        networks: names out of NETWORKS.
        configs: names out of CONFIGS.
        seeds: how many, from 0 on.
        n: samples to measure.
        kimg: thousands of images that each is trained on.
        options: go to every training, for example device=, subset= (few data, Table 3), ada_kimg= (of the noise alone).

    Returns: (network, configuration) -> for each seed FID, KID and recall, the same of real data, and seconds.

    Raises: ValueError for an unknown name, or another argument out of range.
    """
    networks, configs = ([v] if isinstance(v, str) else list(dict.fromkeys(v)) for v in (networks, configs))
    data, known = pictures(data), [name for name in data_sets.datasets() if name not in POINTS]
    check(seeds, data=([data], known), networks=(networks, NETWORKS), configs=(configs, CONFIGS))
    if own := SET_BY_STUDY & options.keys():
        raise ValueError(f"{', '.join(sorted(own))}: set by the study itself, so that its configurations compare")
    noise = {"ada_kimg": options.pop("ada_kimg")} if "ada_kimg" in options else {}
    options |= dict(kimg=kimg, resume=True, progress=progress)
    folder, results = Path(out) / data, Results()
    first: dict[tuple[str, str], Run] = {}
    runs = list(product(range(seeds), networks, configs))
    bar = tqdm(runs, desc=f"diffusion-gan on {data}", unit="run", disable=not progress)
    for seed, network, config in bar:
        bar.set_postfix_str(f"{network}, {config}, seed {seed}")
        method, own_settings = CONFIGS[config]
        noised = {"noise": "pixel-uniform"} | own_settings | noise if method == "diffusion-gan" else own_settings
        settings = NETWORKS[network] | noised | options
        run = train(method, data, folder / network / config / f"seed-{seed}", seed=seed, **settings)
        scores = run.evaluated(n, seed=seed + 1, together=True)
        kept = {name: scores[name] for score in SCORES for name in (score, _real(score))}
        level = {"T": run.history[-1]["T"]} if method == "diffusion-gan" else {}
        results.setdefault((network, config), []).append(kept | {"seconds": run.seconds} | level)
        first.setdefault((network, config), run)
    distributed.from_main(lambda: files.write(folder / "report.html", _page(results, first, data, n, kimg).encode()))
    return results


def _real(score: str) -> str:
    """What real data score is called."""
    return "recall_real" if score == "recall" else f"{score}_floor"


def diffusion_gan_table(results: Results) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Rows and columns, for `report.table`: mean ± standard deviation over seeds, and real data last."""
    rows: list[dict[str, Any]] = [
        {"network": network, "config": config}
        | {score: spread([seed[score] for seed in seeds], decimals) for score, decimals in SCORES.items()}
        | ({"T": spread([seed["T"] for seed in seeds], 0)} if "T" in seeds[0] else {})
        | {"seconds": spread([seed["seconds"] for seed in seeds], 1)}
        for (network, config), seeds in results.items()
    ]
    real = next(iter(results.values()))[0]
    rows.append({"network": "real data"} | {s: f"{real[_real(s)]:.{decimals}f}" for s, decimals in SCORES.items()})
    columns = {"network": "networks", "config": "configuration", "fid": "FID (domain)", "kid": "KID (domain)",
               "recall": "recall (domain)", "T": "T at the end", "seconds": "training (s)"}  # fmt: skip
    return rows, columns


def _page(results: Results, first: dict[tuple[str, str], Run], data: str, n: int, kimg: float) -> str:
    about = f"{data}, {kimg:g} thousand images of training each, {n:,} samples measured, averaged weights sampled."
    configs = dict.fromkeys(config for _, config in results)
    notes = [f"{config}: {WHAT[config]}." for config in configs]
    notes.append(
        "A critic that is told the noise level has more than gan's and not-told's: a hidden layer behind its features, "
        "or with stylegan2 and as-coded a mapping network."
    )
    notes.append("Scores are on features of this data set: compare them with each other, never with published ones.")
    table = report.html_table(*diffusion_gan_table(results)) + "".join(paragraph(note, "note") for note in notes)
    sections = [("", paragraph(about) + table)]
    for network in dict.fromkeys(network for network, _ in results):
        runs = {config: run for (of, config), run in first.items() if of == network}
        grids = [
            picture((run.path / "samples" / f"step-{run.state.step}.png").read_bytes(), config)
            for config, run in runs.items()
        ]
        plots = [
            picture(report.curves(run.history, _LOGITS, f"{config}: critic's logits", y_label=""), alt=config)
            for config, run in runs.items()
        ]
        rows = [
            {"step": row["step"], config: row["T"]} for config, run in runs.items() for row in run.history if "T" in row
        ]
        if rows:
            noised = [config for config in runs if CONFIGS[config][0] == "diffusion-gan"]
            plots.insert(
                0,
                picture(
                    report.curves(rows, noised, "Largest noise level T", y_label="", smooth=0),
                    alt="Largest noise level T",
                ),
            )
        sections += [
            (f"{network}: training, seed 0 (Figure 4)", block("plots", plots)),
            (f"{network}: samples, seed 0", block("pictures", grids)),
        ]
    return page(f"Diffusion-GAN on {data}", sections)


_LOGITS = {"real_logit": "real", "fake_logit": "generated"}
