"""`dgf.train` and `dgf.compare`: one call from data to a trained run, and from methods to a table."""

from __future__ import annotations

import copy
import json
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
from diffgan_fast.run import Run, build, load, pick_device

GRID = 64  # images in a sample grid
STRIP = 4  # images in a strip over noise levels
MISMATCH = 0.05  # sqrt(abar_T) above which sampling from pure noise is visibly wrong


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
    train_data = data_sets.load(data, subset=subset)
    folder = Path(out) if out is not None else Path("runs") / f"{method}-{train_data.name}"
    if base is not None and not kind.fine_tunes:
        raise ValueError(f"base: method {method!r} does not start from another run")
    start = load(base, data=data, device=where) if isinstance(base, str | Path) else base
    config = kind.Config.make(preset, **_with_base(options, start))
    instance = kind(config, train_data.shape, train_data.num_classes)
    given = {name: net for name, net in (("denoiser", model), ("critic", critic)) if net is not None}
    inherited = start.given if start is not None else ()
    settings = _settings(instance, train_data, data, seed, subset, sorted({*given, *inherited}))
    resuming = _prepare(folder, settings, resume)
    if kind.fine_tunes and "denoiser" not in given and not (resuming and start is None):
        if start is None:
            shared = {k: v for k, v in config.to_dict().items() if k in DENOISER_OPTIONS}
            preset = preset if preset in find_method("ddpm").Config.PRESETS else None
            start = train(
                "ddpm",
                data,
                folder / "base",
                seed=seed,
                preset=preset,
                resume=True,
                device=device,
                subset=subset,
                progress=progress,
                **shared,
            )
        given["denoiser"] = copy.deepcopy(start.state.sampling_net("denoiser")).requires_grad_(True)
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
        on_sample=lambda step: _save_grid(run, step),
    )
    if resuming:
        loop.restore()
        _drop_rows_after(folder, state.step)
    elif not checkpoint.steps(folder):
        checkpoint.write_text(folder / "config.json", json.dumps(settings, indent=1) + "\n")
    loop.run()
    _save_grid(run, state.step)
    key = random.fold_in(random.key(seed), "diagnose")
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
    folder, rows, grids = Path(out), [], {}
    for name in names:
        kind = find_method(name)
        start: dict[str, Any] = {"base": base} if kind.fine_tunes and base is not None else {}
        extra = {**common, **(options or {}).get(name, {})}
        run = train(name, data, folder / name, seed=seed, resume=True, **start, **extra)
        if name == "ddpm" and base is None:
            base = run
        stored = run.path / "evaluation.json"
        scores = json.loads(stored.read_text()) if stored.exists() else {}
        if scores.get("n") != n:
            scores = run.evaluate(n)
        report.write_run(run.path)
        rows.append({"method": name, **scores, "seconds": run.seconds, "path": str(run.path)})
        grids[name] = run.path / "samples" / f"step-{run.state.step}.png"
    report.write_comparison(rows, folder / "report.html", title=f"{', '.join(names)} on {run.data_name}", figures=grids)
    return rows


def _with_base(options: dict[str, Any], base: Run | None) -> dict[str, Any]:
    """The options, with what the base run's denoiser dictates. ValueError where they contradict it."""
    if base is None:
        return options
    shared = {k: v for k, v in base.method.config.to_dict().items() if k in DENOISER_OPTIONS}
    for name in shared.keys() & options.keys():
        if options[name] != shared[name]:
            raise ValueError(f"{name} is {shared[name]!r} in the base run, and cannot be {options[name]!r} here")
    return {**shared, **options}


def _settings(method: Method, data: data_sets.Data, source: Any, seed: int, subset: int | None, given: list) -> dict:
    """What config.json holds."""
    schedule = getattr(method, "schedule", None)
    return {
        "method": method.name,
        "data": source if isinstance(source, str) else data.name,
        "data_is_named": isinstance(source, str),
        "fingerprint": data.fingerprint,
        "subset": subset,
        "seed": seed,
        "shape": list(method.shape),
        "num_classes": method.num_classes,
        "given": given,
        "config": method.config.to_dict(),
        "schedule": {} if schedule is None else {"T": schedule.T, "prior_mismatch": schedule.prior_mismatch},
        "versions": {"diffgan_fast": backends.info()["version"], "torch": torch.__version__},
    }


def _prepare(folder: Path, settings: dict, resume: bool) -> bool:
    """Makes the run's folder. True if there is a checkpoint to go on from; ValueError if it holds something else."""
    path = folder / "config.json"
    if path.exists():
        if not resume:
            raise ValueError(f"out {folder} holds a run already: pass resume=True to go on with it, or another out")
        # a run may be made longer; everything else must be as it was
        free = ("steps", "log_every", "sample_every", "checkpoint_every", "keep", "versions", "config")
        ours, theirs = (json.loads(json.dumps({**d, **d["config"]})) for d in (settings, json.loads(path.read_text())))
        different = sorted(k for k in ours.keys() | theirs.keys() if k not in free and ours.get(k) != theirs.get(k))
        if different:
            raise ValueError(
                f"out {folder} holds a run with other settings ({', '.join(different)}): it cannot be resumed so"
            )
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "samples").mkdir(exist_ok=True)
    if not checkpoint.steps(folder):
        (folder / "metrics.jsonl").unlink(missing_ok=True)  # rows of a start that never reached a checkpoint
        return False
    checkpoint.write_text(path, json.dumps(settings, indent=1) + "\n")
    return True


def _drop_rows_after(folder: Path, step: int) -> None:
    path = folder / "metrics.jsonl"
    if path.exists():
        kept = [line for line in path.read_text().splitlines(keepends=True) if json.loads(line)["step"] <= step]
        checkpoint.write_text(path, "".join(kept))


def _save_grid(run: Run, step: int) -> None:
    report.save_grid(run.sample(GRID, seed=0), run.path / "samples" / f"step-{step}.png")


def _warn_of_mismatch(method: Method) -> None:
    schedule = getattr(method, "schedule", None)
    if schedule is not None and schedule.prior_mismatch > MISMATCH:
        warnings.warn(
            f"the schedule leaves sqrt(abar_T) = {schedule.prior_mismatch:.3f} of the data at t = T, but sampling "
            "starts from pure noise: samples will be biased (schedule='linear-scaled' or 'cosine' reaches the prior)",
            stacklevel=3,
        )
