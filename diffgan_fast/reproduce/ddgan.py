"""The trade-off of Denoising Diffusion GAN: quality of samples against the time that they take, and its ablations.

All models are trained on the same data with the same number of images, with several seeds. The U-Net of the diffusion
models has the width at which a call takes as many multiply-accumulates as one of the DDGAN's generator, or nearly.
"""

from __future__ import annotations

import copy
import inspect
import json
import time
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from itertools import product
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from diffgan_fast import data as data_sets
from diffgan_fast import files, methods, nets, random
from diffgan_fast.api import train
from diffgan_fast.data.points import POINTS
from diffgan_fast.engine import distributed
from diffgan_fast.methods import find as find_method
from diffgan_fast.reproduce.ddgan_page import write_page
from diffgan_fast.reproduce.study import check, pictures
from diffgan_fast.run import Run

BATCH = 64  # samples a training step
TIMED = 100  # images whose drawing is timed, as the published seconds are for 100
WIDTHS = range(4, 513, 2)  # of the U-Net of the diffusion models
# what small diffusion models learn most from, as in the demo, whose U-Net is narrower and learns at twice the rate
DIFFUSION: dict[str, Any] = dict(schedule="cosine", prediction="v", lr=2e-3, lr_schedule="cosine", warmup=50, ema=0.995)
LARGE = 32  # pixels from which the DDGAN is the authors' for CIFAR-10, and diffusion models learn at Ho et al.'s rate
COMMON: dict[str, Any] = dict(batch_size=BATCH, flip=False, sample_every=0, checkpoint_every=500)


@dataclass(frozen=True)
class Arm:
    """A model: the method that trains it, its settings, and how it is sampled if not as it was trained to be."""

    method: str
    settings: dict[str, Any]
    what: str
    sampled: dict[str, Any] = field(default_factory=dict)
    run: str | None = None  # the configuration whose runs it shares


DDIM: dict[str, Any] = dict(sampler="ddim", sample_steps=50, eta=0.0)
CONFIGS = {
    "ddpm-1000": Arm("ddpm", dict(T=1000), "DDPM, T = 1000"),
    "ddpm-300": Arm("ddpm", dict(T=300), "DDPM, T = 300"),
    "ddim-50": Arm("ddpm", dict(T=1000), "DDIM, 50 steps of the DDPM with T = 1000", DDIM, "ddpm-1000"),
    **{f"ddgan-{T}": Arm("ddgan", dict(T=T), f"DDGAN, T = {T}") for T in (1, 2, 4, 8)},
    "ddgan-no-latent": Arm("ddgan", dict(T=4, latent=False), "DDGAN, T = 4, without the latent z"),
    "ddgan-x-prev": Arm("ddgan", dict(T=4, predicts="x_prev"), "DDGAN, T = 4, that predicts x_{t-1} directly"),
    "gan": Arm("gan", {}, "DCGAN, one step"),
    "diffusion-gan": Arm("diffusion-gan", {}, "Diffusion-GAN, one step"),
}
SCORES = ("is", "fid", "kid", "precision", "recall")

# What was measured of a run: SCORES with their labels and those of real data; "sample_seconds" of TIMED images; "nfe",
# how often the network is called for them, and "macs" of a call on one; "seconds" and "images" of training; "path".
Outcome = dict[str, Any]


def configurations() -> list[str]:
    """The configurations whose methods there are."""
    return [name for name, arm in CONFIGS.items() if arm.method in methods()]


def reproduce_ddgan(
    out: str | Path = "runs/reproduce-ddgan",
    *,
    data: str | None = None,
    configs: Sequence[str] | None = None,
    seeds: int = 3,
    n: int = 2000,
    images: int = 128_000,
    points: str = "ring",
    point_steps: int = 10_000,
    width: int | None = None,
    subset: int | None = None,
    device: str = "auto",
    progress: bool = True,
) -> dict[str, list[Outcome]]:
    """Trains every configuration with several seeds and measures what its samples cost and are worth.

    Table and figures go to out/<data>/report.html; with them a picture of one denoising step of points, learnt by a
    `ddgan` in out/points/<points>.

    Args:
        out: directory; runs lie in out/<data>/<config>/seed-<s>. Complete ones are reused, others go on.
        data: a name out of `dgf.datasets()` that stands for images; None: "mnist", which is what the slides show and
            takes hours on a CPU, if its files lie on this machine, else "digits".
        configs: names out of `configurations()`; None: all.
        seeds: how many, from 0 on.
        n: samples to measure.
        images: how many each model is trained on; at least BATCH.
        points: a name out of `dgf.datasets()` that stands for points.
        point_steps: training steps of the `ddgan` of points.
        width: channels of the DDGAN's generator at full resolution; None: as its preset for the size has them.
        subset: train on so many images.

    Returns: configuration -> for each seed what was measured, as `Outcome` says.

    Raises: ValueError for an unknown name, or another argument out of range.
    """
    known, images_of = configurations(), [name for name in data_sets.datasets() if name not in POINTS]
    data = pictures(data)
    configs = known if configs is None else [configs] if isinstance(configs, str) else list(dict.fromkeys(configs))
    check(seeds, data=([data], images_of), configs=(configs, known), points=([points], POINTS))
    if images < BATCH:
        raise ValueError(f"images must be at least {BATCH}, which is one step; got {images}")
    folder = Path(out) / data
    results: dict[str, list[Outcome]] = {name: [] for name in configs}
    study = _Study(folder, data, images // BATCH, n, width, dict(subset=subset, device=device, progress=progress))
    bar = tqdm(list(product(range(seeds), configs)), desc=f"ddgan on {data}", unit="run", disable=not progress)
    for seed, name in bar:
        bar.set_postfix_str(f"{name}, seed {seed}")
        results[name].append(study.outcome(name, seed))
    denoised = train(
        "ddgan", points, Path(out) / "points" / points, preset="points", steps=point_steps, resume=True, sample_every=0,
        device=device, progress=progress,
    )  # fmt: skip
    what = {name: CONFIGS[name].what for name in configs}
    distributed.from_main(lambda: write_page(folder / "report.html", results, what, denoised))
    return results


@dataclass(frozen=True)
class _Study:
    """What all runs of a study have in common, and how one is trained and measured."""

    folder: Path
    data: str
    steps: int
    n: int
    width: int | None
    options: dict[str, Any]

    def outcome(self, name: str, seed: int) -> Outcome:
        """What a configuration comes to with a seed: from its run's directory, if it was measured before."""
        arm = CONFIGS[name]
        shape = data_sets.load(self.data).shape
        settings, large = COMMON | arm.settings | {"steps": self.steps}, shape[-1] >= LARGE
        if arm.method == "ddpm":
            settings |= DIFFUSION | {"width": matched(shape, self.width)[0]} | ({"lr": 2e-4} if large else {})
        elif arm.method == "ddgan":
            settings |= {"width": self.width} | ({"preset": "cifar10"} if large else {})
        where = self.folder / (arm.run or name) / f"seed-{seed}"
        run = train(arm.method, self.data, where, seed=seed, resume=True, **settings, **self.options)
        path = where / f"tradeoff-{name}.json"
        known = {"n": self.n, "step": run.state.step}
        stored = distributed.from_main(lambda: json.loads(path.read_text()) if path.exists() else {})
        if stored.items() & known.items() != known.items():
            stored = known | _measured(_sampled(run, arm.sampled), self.n, seed + 1)
            distributed.from_main(lambda: files.write(path, json.dumps(stored, indent=1) + "\n"))
        return stored | {"seconds": run.seconds, "images": self.steps * BATCH, "path": run.path}


def _sampled(run: Run, options: dict[str, Any]) -> Run:
    """The run with other options of sampling."""
    method, other = run.method, copy.copy(run)
    other.method = type(method)(replace(method.config, **options), method.shape, method.num_classes)
    return other


def _measured(run: Run, n: int, seed: int) -> Outcome:
    """Scores of n samples; the seconds that TIMED of them take, the faster of two times; what the network does."""
    scores = run.measure(n, seed, run.reference(), metrics=SCORES, held_out=run.reference("test"))
    return scores | distributed.from_main(lambda: _cost(run, seed))


def _cost(run: Run, seed: int) -> Outcome:
    """What samples cost, of one process."""
    network = run.state.sampling_net(run.state.generating[0])
    seconds: list[float] = []
    seen: list[torch.Tensor] = []

    def remember(_, given: tuple[Any, ...]) -> None:
        seen.extend(x[:1].clone() for x in given)
        hook.remove()

    hook = network.register_forward_pre_hook(remember)
    for i in range(2):
        started = time.perf_counter()
        run.sample(TIMED, seed, first=i * TIMED)
        seconds.append(time.perf_counter() - started)
    return {"sample_seconds": min(seconds), "nfe": network_calls(run), "macs": nets.macs(network, *seen)}


def network_calls(run: Run) -> int:
    """How often the network is called for a batch: once a step, which the walk counts, or once where there is none.

    A hook would not do: replays of a CUDA graph call nothing.
    """
    sample = run.method.sample
    if "on_step" not in inspect.signature(sample).parameters:
        return 1
    states: list[int] = []  # t of each, and 0 at the end
    sample(run.state, 1, random.key(0), on_step=lambda t, x: states.append(t))
    return len(states) - 1


@cache
def matched(shape: tuple[int, ...], width: int | None) -> tuple[int, int, int]:
    """The U-Net's width at which a call takes most nearly as many multiply-accumulates as one of the DDGAN's generator
    of `width`; those of the generator; those of the U-Net."""
    kind = find_method("ddgan")
    method = kind(kind.Config.make(width=width), shape)
    with torch.device("meta"):
        x, t, z = torch.empty(1, *shape), torch.ones(1, dtype=torch.int64), torch.empty(1, 100)
        target = nets.macs(method.networks({})["generator"], x, t, z)

        @cache
        def unet(width: int) -> int:
            return nets.macs(nets.UNet.preset(shape[1], shape[0], width=width), x, t)

        above = max(1, bisect_left(WIDTHS, target, key=unet))
        best = min(WIDTHS[above - 1 : above + 1], key=lambda width: abs(unet(width) - target))
    return best, target, unet(best)
