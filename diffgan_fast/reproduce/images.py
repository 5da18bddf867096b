"""Table 1 of "Exploring the Combination of Diffusion Models and Generative Adversarial Networks" again.

Every fine-tuning method starts from the same base and sees the same number of images, with several seeds. A control,
the base trained on without a critic, tells what the critic adds: at equal images, and at equal seconds.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

from tqdm import tqdm

from diffgan_fast import data as data_sets
from diffgan_fast.api import train
from diffgan_fast.data.points import POINTS
from diffgan_fast.demo import BASE
from diffgan_fast.engine import distributed
from diffgan_fast.methods import find as find_method
from diffgan_fast.reproduce.images_page import write_page
from diffgan_fast.reproduce.study import check
from diffgan_fast.run import Run, load
from diffgan_fast.start import known_to

BATCH = 128
CAP = 10  # the control is trained on for at most so many times its own images to equal a configuration's seconds
BASES: dict[int, dict[str, Any]] = {8: BASE, 28: {"preset": "student"}}  # by the images' size; others: the defaults
# the source's code guides by eps_u + 5 (eps_c - eps_u)
CONDITIONAL: dict[str, Any] = dict(conditional=True, guidance_scale=5.0)
# the weights as trained are judged; no pictures on the way
COMMON: dict[str, Any] = dict(batch_size=BATCH, ema=0.0, sample_every=0)
# configuration -> method, and its settings beside the method's defaults. The control's are methods 2 to 4's.
CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "control": ("ddpm", dict(lr=1e-5, adam_beta1=0.5)),
    "method1": ("method1", {}),
    "method2": ("method2", {}),
    "method2-scratch": ("method2", dict(critic_start="scratch")),
    "method2-batch-10": ("method2", dict(batch_size=10)),
    "method3": ("method3", {}),
    "method3.5": ("method3.5", {}),
    "method4": ("method4", {}),
    "method4-deep-critic": ("method4", dict(critic_depth=2, critic_width=128)),
    "discriminator-guidance": ("discriminator-guidance", {}),
}
CRITIC_FIRST = ("method3", "method3.5")  # §4.2: the critic trains alone in the first of five epochs
SET_BY_STUDY = {"steps", "critic_steps", "seed", *COMMON} | {key for _, own in CONFIGS.values() for key in own}

SCORES = ("kid", "fid", "is", "kid_floor", "fid_floor", "is_real")

# What was measured of a run: SCORES; lr, steps and images of its training and the seconds that it took; its path. Of a
# configuration also, as "equal_seconds", the same of the control trained on for as many seconds, and whether the cap
# kept it from that, as "capped".
Outcome = dict[str, Any]
# "before" (the base) and each configuration -> an outcome for each seed
Results = dict[str, list[Outcome]]


def reproduce_table1(
    out: str | Path = "runs/reproduce-table1",
    *,
    data: str = "digits",
    configs: Sequence[str] = tuple(CONFIGS),
    seeds: int = 3,
    n: int = 2000,
    images: int = 12_800,
    conditional: bool = False,
    base: Run | str | Path | None = None,
    critic: Run | str | Path | None = None,
    progress: bool = True,
    **options: Any,
) -> Results:
    """Fine-tunes one base by every method with several seeds and measures it before and after, beside a control.

    Tables and figures go to out/<data>/report.html, or out/<data>-conditional/report.html.

    Args:
        out: directory; runs lie in out/<data>[-conditional]/<config>/seed-<s>. Complete ones are reused, others go on.
        data: a name out of `dgf.datasets()` that stands for images.
        configs: names out of CONFIGS; "control" is always among them.
        seeds: how many, from 0 on; every configuration has the same.
        n: samples to measure.
        images: how many each configuration is trained on, its critic included; at least BATCH.
        conditional: the denoiser is told the class, and its samples are guided.
        base: the run to start from; without one, a `ddpm` is trained in out/<data>[-conditional]/base.
        critic: the run of a `gan` whose critic methods 1 and 2 start from; without one, out/<data>/critic is trained.
        options: go to every training whose method has them, for example device=, subset=, T=, log_every=, fakes=.

    Returns: "before" and each configuration -> for each seed what was measured, as `Outcome` says.

    Raises: ValueError for an unknown name, or another argument out of range.
    """
    configs = list(dict.fromkeys(("control", *([configs] if isinstance(configs, str) else configs))))
    pictures = [name for name in data_sets.datasets() if name not in POINTS]
    check(seeds, data=([data], pictures), configs=(configs, CONFIGS))
    if images < BATCH:
        raise ValueError(f"images must be at least {BATCH}, which is one step; got {images}")
    _check_options(options)
    options |= {"resume": True, "progress": progress}
    source = data_sets.load(data)
    folder = table1_folder(out, data, conditional)
    if base is None:
        settings = BASES.get(source.shape[-1], {}) | (CONDITIONAL if conditional else {})
        base = train("ddpm", data, folder / "base", **settings | _known("ddpm", options))
    base = _opened(base, options)
    if getattr(base.method.config, "conditional", None) != conditional:
        raise ValueError(f"base must be a run of a denoiser trained with conditional={conditional}: {base} is not")
    if critic is None and any(_wants_critic(name) for name in configs):
        critic = train("gan", data, Path(out) / data / "critic", **_known("gan", options))
    critic = None if critic is None else _opened(critic, options)
    study = _Study(folder, data, base, critic, images - images % BATCH, n, options)

    results: Results = {name: [] for name in ("before", *configs)}
    bar = tqdm(list(product(range(seeds), results)), desc="reproduce table1", unit="run", disable=not progress)
    for seed, name in bar:
        bar.set_postfix_str(f"{name}, seed {seed}")
        if name == "before":
            outcome = study.control(0, seed)
        elif name == "control":
            outcome = study.control(study.images // BATCH, seed)
        else:
            outcome = study.configuration(name, seed)
            outcome |= study.equal_seconds(outcome, results["control"][seed], seed)
        results[name].append(outcome)
    distributed.from_main(lambda: write_page(folder / "report.html", results, source, base, critic, n))
    return results


def table1_folder(out: str | Path, data: str, conditional: bool) -> Path:
    """Where a study's runs and its report lie."""
    return Path(out) / (f"{data}-conditional" if conditional else data)


@dataclass(frozen=True)
class _Study:
    """What all runs of a study have in common, and how one is trained and measured."""

    folder: Path
    data: str
    base: Run
    critic: Run | None
    images: int
    n: int
    options: dict[str, Any]

    def control(self, steps: int, seed: int) -> Outcome:
        """The base trained on without a critic; in no step it is the base itself."""
        return self._train(f"control-{steps}", "control", seed, steps)

    def configuration(self, name: str, seed: int) -> Outcome:
        batch = CONFIGS[name][1].get("batch_size", BATCH)
        return self._train(name, name, seed, self.images // batch)

    def equal_seconds(self, outcome: Outcome, control: Outcome, seed: int) -> dict[str, Any]:
        """The control for as many seconds as a configuration took, but no shorter than at equal images."""
        steps, most = control["steps"], CAP * control["steps"]
        equal = round(outcome["seconds"] / control["seconds"] * steps)
        return {"equal_seconds": self.control(min(max(equal, steps), most), seed), "capped": equal > most}

    def _train(self, folder: str, name: str, seed: int, steps: int) -> Outcome:
        method, own = CONFIGS[name]
        settings = {**COMMON, **own, "steps": steps}
        if method in CRITIC_FIRST:
            settings["critic_steps"] = steps // 5
        if _wants_critic(name):
            settings["critic"] = self.critic
        where = self.folder / folder / f"seed-{seed}"
        run = train(method, self.data, where, seed=seed, base=self.base, **settings, **_known(method, self.options))
        scores = run.evaluated(self.n, seed=seed + 1, together=True)
        seen = {"lr": run.method.config.lr, "steps": steps, "images": steps * settings["batch_size"]}
        return {key: scores[key] for key in SCORES} | seen | {"seconds": run.seconds, "path": run.path}


def _opened(run: Run | str | Path, options: Mapping[str, Any]) -> Run:
    return run if isinstance(run, Run) else load(run, device=options.get("device", "auto"))


def _wants_critic(name: str) -> bool:
    """Whether a configuration starts from the critic of a `gan`."""
    method, settings = CONFIGS[name]
    kind = find_method(method)
    return kind.pretrained_critic(kind.Config.make(**settings)) is not None


def _known(method: str, options: Mapping[str, Any]) -> dict[str, Any]:
    """The options that a training of this method has."""
    known = known_to(find_method(method)) | {"device", "subset", "resume", "progress"}
    return {name: value for name, value in options.items() if name in known}


def _check_options(options: Mapping[str, Any]) -> None:
    if own := SET_BY_STUDY & options.keys():
        raise ValueError(f"{', '.join(sorted(own))}: set by the study itself, so that its configurations compare")
    methods = {"gan", *(method for method, _ in CONFIGS.values())}
    if unknown := options.keys() - {name for method in methods for name in _known(method, options)}:
        raise ValueError(f"unknown options: {', '.join(sorted(unknown))}: no method of the study has them")
