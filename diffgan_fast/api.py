"""`dgf.train` and `dgf.compare`: one call from data to a trained run, and from methods to a table."""

from __future__ import annotations

import copy
import dataclasses
import json
import os
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from diffgan_fast import backends, random, report
from diffgan_fast import data as data_sets
from diffgan_fast.engine import Feed, Loop, Method, checkpoint
from diffgan_fast.methods import find as find_method
from diffgan_fast.methods.diffusion import DENOISER_OPTIONS
from diffgan_fast.report.run import PRIOR_LIMIT
from diffgan_fast.run import Run, build, fingerprint, load, pick_device

GRID = 64  # images in a sample grid
SCATTER = 1000  # points in a scatter plot
STRIP = 4  # images in a strip over noise levels


def train(
    method: str,
    data: Any = "digits",
    out: str | Path | None = None,
    *,
    seed: int = 0,
    preset: str | None = None,
    base: Run | str | Path | None = None,
    resume: bool = False,
    device: str | torch.device = "auto",
    model: nn.Module | None = None,
    critic: nn.Module | None = None,
    subset: int | None = None,
    callbacks: Sequence[Callable[[Run, dict], None]] = (),
    progress: bool = True,
    **options: Any,
) -> Run:
    """Trains a method and returns the run.

    Args:
        method: a name of `dgf.methods()`.
        data: a name of `dgf.datasets()`, a folder or zip of images, a tensor, an array, a Dataset, or an iterable.
        out: the run's directory; default runs/<method>-<data>.
        seed: everything random follows from it.
        preset: named settings of the method ("paper", "student", …); `options` override them.
        base: for a fine-tuning method, the run to start from; without one, a `ddpm` is trained first, into out/base.
        resume: go on from the last checkpoint in `out`, bit for bit (a fresh start if there is none).
        device: "auto", "cpu", "cuda", ….
        model, critic: your own networks in place of the method's (see `docs/networks.md` for their calls).
        subset: train on that many samples of the data, a fixed choice.
        callbacks: called as callback(run, row) after each logged row.
        progress: show a progress bar.
        options: fields of the method's config, for example steps=, batch_size=, lr=.

    Raises:
        ValueError: an argument is not what it may be; `out` holds a run and resume is False.
        TrainingError: a loss is not finite; the step and the last good checkpoint are named.
        KeyboardInterrupt: after a checkpoint was written.
    """
    kind, where = find_method(method), pick_device(device)
    if base is not None and not kind.fine_tunes:
        raise ValueError(f"base: method {method!r} does not start from another run")
    data = _read_once(data)
    train_data = data_sets.load(data, subset=subset)
    folder = Path(out) if out is not None else Path("runs") / f"{method}-{train_data.name}"
    start = load(base, data=data, device=where, model=model) if isinstance(base, str | Path) else base
    config = kind.Config.make(preset, **_with_base(options, start))
    instance = kind(config, train_data.shape, train_data.num_classes)
    given = {name: net for name, net in (("denoiser", model), ("critic", critic)) if net is not None}
    settings = _settings(instance, train_data, data, seed, subset, given, start)
    resuming = _prepare(folder, settings, resume)
    if kind.fine_tunes and not resuming and start is None and model is None:
        start = _train_base(data, folder / "base", seed, preset, config, device, subset, progress)
        settings["base"] = _identity(start)
    if start is not None:
        net = start.state.sampling_net("denoiser")
        if model is None:
            given["denoiser"] = copy.deepcopy(net).requires_grad_(True)
        else:
            model.load_state_dict(net.state_dict())
    _warn_of_mismatch(instance)

    state = build(instance, given, seed, where)
    run = Run(folder, instance, state, seed, data, settings)
    feed = Feed(
        train_data, config.batch_size, random.key(seed), where, flip=config.flip, channels_last=config.channels_last
    )
    loop = Loop(
        instance,
        state,
        feed,
        folder,
        seed,
        progress=progress,
        on_log=lambda row: [callback(run, row) for callback in callbacks],
        on_sample=lambda step: _save_picture(run, train_data, step),
    )
    if resuming:
        loop.restore()
        _drop_rows_after(folder, state.step)
    elif not checkpoint.steps(folder):
        checkpoint.write_text(folder / "config.json", json.dumps(settings, indent=1) + "\n")
    loop.run()
    for optimizer in state.optimizers.values():
        optimizer.release()  # networks that were given are their owner's again
    _save_picture(run, train_data, state.step)
    key = random.fold_in(random.key(seed), "diagnose")
    if train_data.shape[0] in (1, 3) and not train_data.points:
        for name, strip in instance.strips(state, feed.batch(0).x[:STRIP], key).items():
            report.strip(strip, folder / "samples" / f"{name}.png")
    if curves := instance.diagnose(state, feed.batch(state.step), key):
        checkpoint.write_text(folder / "levels.json", json.dumps(curves) + "\n")
    report.write_run(folder)
    return run


def compare(
    names: Sequence[str],
    data: Any = "digits",
    out: str | Path = "runs/compare",
    *,
    seed: int = 0,
    n: int = 2000,
    base: Run | str | Path | None = None,
    options: dict[str, dict[str, Any]] | None = None,
    **common: Any,
) -> list[dict[str, Any]]:
    """Trains methods on the same data from the same base and measures each; table and figures go to out/report.html.

    Args:
        names: methods; the fine-tuning ones start from the `ddpm` among them, or from `base`.
        n: samples to measure.
        options: options of single methods, by name; `common` goes to all.

    Returns: one row a method: method, the scores, seconds of training, path. Runs that are complete in `out` are
    reused.
    """
    if not names:
        raise ValueError("names must hold at least one method")
    folder, data, found, options = Path(out), _read_once(data), {}, options or {}
    if base is None and "ddpm" not in names and any(find_method(name).fine_tunes for name in names):
        known = {f.name for f in dataclasses.fields(find_method("ddpm").Config)}
        shared = {k: v for k, v in common.items() if k in known or k in ("device", "subset", "progress")}
        base = train("ddpm", data, folder / "base", seed=seed, resume=True, **shared)
    for name in sorted(names, key=lambda name: name != "ddpm"):  # the base comes first
        start: dict[str, Any] = {"base": base} if find_method(name).fine_tunes else {}
        run = train(name, data, folder / name, seed=seed, resume=True, **start, **{**common, **options.get(name, {})})
        if name == "ddpm" and base is None:
            base = run
        scores = run.evaluated(n)
        report.write_run(run.path)
        grid = run.path / "samples" / f"step-{run.state.step}.png"
        found[name] = ({"method": name, **scores, "seconds": run.seconds, "path": str(run.path)}, grid, run.data_name)
    rows, grids = [found[name][0] for name in names], {name: found[name][1] for name in names}
    title = f"{', '.join(names)} on {found[names[0]][2]}"
    report.write_comparison(rows, folder / "report.html", title=title, figures=grids)
    return rows


def _read_once(data: Any) -> Any:
    """A name or a path as a string, for it can be read again; everything else in memory, for an iterator can not."""
    if isinstance(data, os.PathLike):
        return str(Path(data).expanduser().resolve())
    return data if isinstance(data, str) else data_sets.load(data)


def _train_base(data, folder, seed, preset, config, device, subset, progress) -> Run:
    """The `ddpm` that a fine-tuning method starts from, with the settings that concern its denoiser."""
    preset = "student" if preset == "as-coded" else preset
    if preset not in find_method("ddpm").Config.PRESETS:
        preset = None
    shared = {k: v for k, v in config.to_dict().items() if k in DENOISER_OPTIONS}
    common = dict(seed=seed, preset=preset, resume=True, device=device, subset=subset, progress=progress)
    return train("ddpm", data, folder, **common, **shared)


def _identity(base: Run | None) -> dict[str, Any] | None:
    """Which weights a run started from."""
    if base is None:
        return None
    return {"step": base.state.step, "weights": fingerprint(base.state.sampling_net("denoiser"))}


def _with_base(options: dict[str, Any], base: Run | None) -> dict[str, Any]:
    """The options, with what the base run's denoiser dictates. ValueError where they contradict it."""
    if base is None:
        return options
    shared = {k: v for k, v in base.method.config.to_dict().items() if k in DENOISER_OPTIONS}
    for name in shared.keys() & options.keys():
        if options[name] != shared[name]:
            raise ValueError(f"{name} is {shared[name]!r} in the base run, and cannot be {options[name]!r} here")
    return {**shared, **options}


def _settings(
    method: Method,
    data: data_sets.Data,
    source: Any,
    seed: int,
    subset: int | None,
    given: dict[str, nn.Module],
    base: Run | None,
) -> dict[str, Any]:
    """What config.json holds."""
    schedule = getattr(method, "schedule", None)
    own = {*given, *(n for n in (base.given if base is not None else ()) if n == "denoiser")}
    return {
        "method": method.name,
        "data": source if isinstance(source, str) else data.name,
        "data_is_named": isinstance(source, str),
        "fingerprint": data.fingerprint,
        "subset": subset,
        "seed": seed,
        "shape": list(method.shape),
        "num_classes": method.num_classes,
        "given": sorted(own),
        "base": _identity(base),
        "config": method.config.to_dict(),
        "schedule": {} if schedule is None else {"T": schedule.T, "prior_mismatch": schedule.prior_mismatch},
        "versions": {"diffgan_fast": backends.info()["version"], "torch": torch.__version__},
    }


def _prepare(folder: Path, settings: dict[str, Any], resume: bool) -> bool:
    """Makes the run's folder. True if there is a checkpoint to go on from; ValueError if it holds something else."""
    path, done = folder / "config.json", checkpoint.steps(folder)
    if path.exists():
        if not resume:
            raise ValueError(f"out {folder} holds a run already: pass resume=True to go on with it, or another out")
        stored = json.loads(path.read_text())
        settings["base"] = settings["base"] or stored["base"]
        # a run may be made longer where that does not change its learning rates, and logged otherwise
        free = {"log_every", "sample_every", "checkpoint_every", "keep", "versions", "config"}
        if settings["config"]["lr_schedule"] == "constant":
            free.add("steps")
        ours, theirs = (json.loads(json.dumps({**d, **d["config"]})) for d in (settings, stored))
        different = sorted(k for k in ours.keys() | theirs.keys() if k not in free and ours.get(k) != theirs.get(k))
        if different:
            names = ", ".join(different)
            raise ValueError(f"out {folder} holds a run with other settings ({names}): it cannot be resumed so")
        if done and settings["config"]["steps"] < done[-1]:
            raise ValueError(f"steps must be at least {done[-1]}, which out {folder} has trained; got {ours['steps']}")
    elif done:
        raise ValueError(f"out {folder} has checkpoints but no config.json: it is no run of this library")
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "samples").mkdir(exist_ok=True)
    if done:
        checkpoint.write_text(path, json.dumps(settings, indent=1) + "\n")
    elif path.exists():
        (folder / "metrics.jsonl").unlink(missing_ok=True)  # rows of a start that never reached a checkpoint
    return bool(done)


def _drop_rows_after(folder: Path, step: int) -> None:
    path = folder / "metrics.jsonl"
    kept = [json.dumps(row) + "\n" for row in checkpoint.read_rows(path) if row["step"] <= step]
    checkpoint.write_text(path, "".join(kept))


def _save_picture(run: Run, data: data_sets.Data, step: int) -> None:
    """A grid of sample images, or samples over the points that the run is trained on."""
    if data.shape[0] not in ((2,) if data.points else (1, 3)):
        return  # nothing that a picture could show
    samples, path = run.sample(SCATTER if data.points else GRID, seed=0), run.path / "samples" / f"step-{step}.png"
    if not samples.isfinite().all():
        warnings.warn(f"samples at step {step} are not finite: no picture is written", stacklevel=2)
    elif data.points:
        report.scatter(samples, path, data.values)
    else:
        report.save_grid(samples, path)


def _warn_of_mismatch(method: Method) -> None:
    schedule = getattr(method, "schedule", None)
    if schedule is not None and schedule.prior_mismatch > PRIOR_LIMIT:
        warnings.warn(
            f"the schedule leaves sqrt(abar_T) = {schedule.prior_mismatch:.3f} of the data at t = T, but sampling "
            "starts from pure noise: samples will be biased (schedule='linear-scaled' or 'cosine' reaches the prior)",
            stacklevel=3,
        )
