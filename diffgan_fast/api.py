"""`dgf.train` and `dgf.compare`: one call from data to a trained run, and from methods to a table."""

from __future__ import annotations

import copy
import dataclasses
import json
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from diffgan_fast import data as data_sets
from diffgan_fast import files, planning, random, report
from diffgan_fast.engine import Feed, Loop, Method, State, checkpoint, distributed, together
from diffgan_fast.engine.memory import placed, stay
from diffgan_fast.methods import find as find_method
from diffgan_fast.methods.diffusion import DENOISER_OPTIONS
from diffgan_fast.report.run import PRIOR_LIMIT
from diffgan_fast.run import Run, build, pick_device
from diffgan_fast.selection import Selection
from diffgan_fast.start import Start, describe, identity, known_to, read_once, resolve

GRID = 64  # images in a sample grid
SCATTER = 1000  # points in a scatter plot
STRIP = 4  # images in a strip over noise levels
HOW = ("precision", "compile", "data_on")  # how a run is run, which holds for what it trains first, too


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
    critic: nn.Module | Run | str | Path | None = None,
    generator: nn.Module | None = None,
    subset: int | None = None,
    size: int | None = None,
    callbacks: Sequence[Callable[[Run, dict], None]] = (),
    progress: bool = True,
    **options: Any,
) -> Run:
    """Trains a method and returns the run.

    Several processes that torchrun started train one run together, each on its share of every batch, if they all call
    this with the same arguments (see `docs/distributed.md`). The main one writes; all return the run.

    Args:
        method: a name of `dgf.methods()`.
        data: a name of `dgf.datasets()`, a folder or zip of images, a tensor, an array, a Dataset, or an iterable.
        out: the run's directory; default runs/<method>-<data>.
        seed: everything random follows from it.
        preset: named settings of the method ("paper", "student", …); `options` override them.
        base: the run whose denoiser to start from; without one, a fine-tuning method trains a `ddpm` first, into
            out/base.
        resume: go on from the last checkpoint in `out`, bit for bit (a fresh start if there is none).
        device: "auto", "cpu", "cuda", ….
        model, critic, generator: your own networks in place of the method's (see `docs/networks.md` for their calls).
            `critic` may also be a run whose critic to start from; without one, a method that wants a pre-trained critic
            trains a `gan` first, into out/critic.
        subset: train on that many samples of the data, a fixed choice.
        size: crop the images of a folder or zip to their central square and resize them to so many pixels.
        callbacks: called as callback(run, row) after each logged row, in every process.
        progress: show a progress bar.
        options: fields of the method's config, for example steps=, batch_size=, lr=. batch_size="auto" is the largest
            that fits into the free memory, but no more than there are samples (see `plan`).

    Raises:
        ValueError: an argument is not what it may be; `out` holds a run and resume is False.
        TrainingError: a loss is not finite, memory is out, or another process has ended; the step and the last good
            checkpoint are named.
        KeyboardInterrupt: of Ctrl-C or SIGTERM, after a checkpoint was written.
    """
    distributed.join(pick_device(device))
    if automatic := options.get("batch_size") == "auto":
        del options["batch_size"]
        if distributed.size() > 1:
            raise ValueError("batch_size must be an int in a run of several processes, got 'auto'")
    with distributed.main_first():  # data that have to be fetched are fetched once
        start = resolve(method, data, preset, base, critic, model, generator, device, subset, size, options)
    folder = Path(out) if out is not None else Path("runs") / f"{method}-{start.data.name}"
    if automatic:
        start.method = _with_largest_batch(start, seed, folder)
    kind, config, instance, data = type(start.method), start.method.config, start.method, start.source
    settings = describe(start, seed, subset)
    distributed.check_same({**settings, **config.to_dict(), "out": str(folder), "resume": resume})
    part = distributed.share(config.batch_size)
    with distributed.main_first():
        selection = _selection(start) if config.evaluate_every else None
    resuming = distributed.from_main(lambda: _prepare(folder, settings, resume))
    common = dict(seed=seed, device=device, subset=subset, size=size, progress=progress)
    if kind.fine_tunes and not resuming and start.base is None and model is None:
        start.base = _train_base(data, folder / "base", preset, config, common)
        settings["base"] = identity(start.base, "denoiser")
    if kind.pretrained_critic(config) and not resuming and critic is None:
        start.critic = _train_critic(data, folder / "critic", kind, config, common)
        settings["critic"] = identity(start.critic, "critic")
    if distributed.is_main():
        _warn_of_mismatch(instance)

    state, train_data, where = build(instance, start.networks(), seed, start.device), start.data, start.device
    run = Run(folder, instance, state, seed, data, settings)
    how: dict[str, Any] = {name: getattr(config, name) for name in ("data_on", "flip", "channels_last")}
    feed = Feed(train_data, config.batch_size, random.key(seed), where, **how)
    loop = Loop(
        instance,
        state,
        feed,
        folder,
        seed,
        progress=progress,
        on_log=lambda row: [callback(run, row) for callback in callbacks],
        on_sample=lambda step: _save_picture(run, train_data, step),
        **({} if selection is None else {"on_evaluate": lambda: selection(run)}),
    )
    if resuming:
        loop.restore()
        distributed.from_main(lambda: _drop_rows_after(folder, state.step))
        if state.step == config.steps and (folder / "report.html").exists():  # complete, pictures and all
            _release(state)
            return run
    else:
        distributed.from_main(lambda: files.write(folder / "config.json", json.dumps(settings, indent=1) + "\n"))
    with together(state, part.stop - part.start):
        instance.prepare(state, random.fold_in(random.key(seed), "prepare"), folder)
        loop.run()
    _release(state)
    _save_picture(run, train_data, state.step)
    distributed.from_main(lambda: _present(run, feed))
    return run


def plan(
    method: str,
    data: Any = "digits",
    *,
    seed: int = 0,
    preset: str | None = None,
    base: Run | str | Path | None = None,
    device: str | torch.device = "auto",
    model: nn.Module | None = None,
    critic: nn.Module | Run | str | Path | None = None,
    generator: nn.Module | None = None,
    subset: int | None = None,
    size: int | None = None,
    **options: Any,
) -> planning.Plan:
    """What `train` with these arguments will take, before it is run: memory and time, and which `recompute` fits.

    A few steps of the method are run, with short chains for methods 1 and 2, on copies of the networks; nothing is
    written. Memory counts tensors: workspaces of libraries come on top. With batch_size="auto" it is the plan of the
    largest that fits.

    Returns: a `Plan`; print it.
    Raises: ValueError as `train`; TrainingError if not even these few steps fit into the memory.
    """
    if automatic := options.get("batch_size") == "auto":
        del options["batch_size"]
    with distributed.acting(together=False):
        start = resolve(method, data, preset, base, critic, model, generator, device, subset, size, options)
        if automatic:
            start.method = _with_largest_batch(start, seed)
        networks = lambda: copy.deepcopy(start.networks())  # noqa: E731
        return planning.measure(start.method, networks, seed, start.device, taken=_taken(start))


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
    folder, data, found, options = Path(out), read_once(data), {}, options or {}
    if base is None and "ddpm" not in names and any(find_method(name).fine_tunes for name in names):
        known = known_to(find_method("ddpm")) | {"device", "subset", "size", "progress"}
        shared = {k: v for k, v in common.items() if k in known}
        base = train("ddpm", data, folder / "base", seed=seed, resume=True, **shared)
    for name in sorted(names, key=lambda name: name != "ddpm"):  # the base comes first
        kind, chosen = find_method(name), {**common, **options.get(name, {})}
        start: dict[str, Any] = {"base": base} if kind.fine_tunes else {}
        config = kind.Config.make(chosen.get("preset"), **{k: v for k, v in chosen.items() if k in known_to(kind)})
        if kind.pretrained_critic(config) and "critic" not in chosen:  # one for all of its width
            shared = {k: v for k, v in common.items() if k in ("device", "subset", "size", "progress")}
            where = folder / f"critic-{config.critic_width}"
            start["critic"] = _train_critic(data, where, kind, config, {"seed": seed, **shared})
        run = train(name, data, folder / name, seed=seed, resume=True, **start, **chosen)
        if name == "ddpm" and base is None:
            base = run
        scores = run.evaluated(n, together=True)
        distributed.from_main(partial(report.write_run, run.path))
        grid = run.path / "samples" / f"step-{run.state.step}.png"
        found[name] = ({"method": name, **scores, "seconds": run.seconds, "path": str(run.path)}, grid, run.data_name)
    rows, grids = [found[name][0] for name in names], {name: found[name][1] for name in names}
    title = f"{', '.join(names)} on {found[names[0]][2]}"
    distributed.from_main(lambda: report.write_comparison(rows, folder / "report.html", title=title, figures=grids))
    return rows


def _train_base(data, folder, preset, config, common) -> Run:
    """The `ddpm` that a fine-tuning method starts from, with the settings that concern its denoiser."""
    if preset not in find_method("ddpm").Config.PRESETS:
        preset = "student" if config.network == "student" else None
    shared = {k: v for k, v in config.to_dict().items() if k in (*DENOISER_OPTIONS, *HOW)}
    return train("ddpm", data, folder, preset=preset, resume=True, **common, **shared)


def _train_critic(data, folder, kind, config, common) -> Run:
    """The run whose critic a method starts from."""
    name = kind.pretrained_critic(config)
    shared = {k: getattr(config, k) for k in HOW}
    return train(name, data, folder, resume=True, critic_width=config.critic_width, **shared, **common)


def _with_largest_batch(start: Start, seed: int, folder: Path | None = None) -> Method:
    """The method with the batch size that its run in `folder` was trained with, or with the largest that fits."""
    if folder is not None and checkpoint.steps(folder):
        size = json.loads((folder / "config.json").read_text())["config"]["batch_size"]
    else:
        networks = lambda: copy.deepcopy(start.networks())  # noqa: E731
        size = planning.largest_batch(start.method, networks, seed, start.device, len(start.data), _taken(start))
    config = dataclasses.replace(start.method.config, batch_size=size)
    return type(start.method)(config, start.method.shape, start.method.num_classes)


def _taken(start: Start) -> int:
    """Bytes of the device's free memory that the data will take."""
    values, device = start.data.values, start.device
    there = values.device.type == device.type or stay(start.data, device, start.method.config.data_on)
    return 0 if there else values.nbytes


def _selection(start: Start) -> Selection:
    """Judge of the best checkpoint: by the test split, or by the data themselves if they have none."""
    data = data_sets.load(start.source, size=start.size)  # not the subset: the classifier is that of `Run.evaluate`
    test, config = data_sets.load_test(start.source, size=start.size), start.method.config
    data = placed(data, start.device, config.data_on)
    return Selection(config, data, data if test is None else placed(test, start.device, config.data_on))


def _prepare(folder: Path, settings: dict[str, Any], resume: bool) -> bool:
    """Makes the run's folder. True if there is a checkpoint to go on from; ValueError if it holds something else."""
    path, done = folder / "config.json", checkpoint.steps(folder)
    if path.exists():
        if not resume:
            raise ValueError(f"out {folder} holds a run already: pass resume=True to go on with it, or another out")
        stored = json.loads(path.read_text())
        for source in ("base", "critic"):
            settings[source] = settings[source] or stored.get(source)
        # a run may be made longer where that does not change its learning rates; logged, recomputed or fed otherwise
        free = {"log_every", "sample_every", "checkpoint_every", "keep", "recompute", "data_on", "versions", "config"}
        if settings["config"]["lr_schedule"] == "constant" or not done:
            free |= {"steps", "kimg"}
        if not done:  # memory was out in the first step
            free.add("batch_size")
        ours, theirs = (json.loads(json.dumps({**d, **d["config"]})) for d in (settings, stored))
        different = sorted(k for k in ours.keys() | theirs.keys() if k not in free and ours.get(k) != theirs.get(k))
        if different:
            names, used = ", ".join(different), [f"{source}=" for source in ("base", "critic") if stored.get(source)]
            hint = f"; it started with {' and '.join(used)}, which say some of them" if used else ""
            raise ValueError(f"out {folder} holds a run with other settings ({names}): it cannot be resumed so{hint}")
        if done and settings["config"]["steps"] < done[-1]:
            raise ValueError(f"steps must be at least {done[-1]}, which out {folder} has trained; got {ours['steps']}")
    elif done:
        raise ValueError(f"out {folder} has checkpoints but no config.json: it is no run of this library")
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "samples").mkdir(exist_ok=True)
    if done:
        files.write(path, json.dumps(settings, indent=1) + "\n")
    elif path.exists():
        (folder / "metrics.jsonl").unlink(missing_ok=True)  # rows of a start that never reached a checkpoint
    return bool(done)


def _present(run: Run, feed: Feed) -> None:
    """Writes what a trained run shows beside its samples: pictures, curves and the report."""
    method, state, data, folder = run.method, run.state, feed.data, run.path
    key = random.fold_in(random.key(run.seed), "diagnose")
    if data.shape[0] in (1, 3) and not data.points:
        for name, strip in method.strips(state, feed.batch(0).x[:STRIP], key).items():
            report.strip(strip, folder / "samples" / f"{name}.png")
    if curves := method.diagnose(state, feed.batch(state.step), key):
        files.write(folder / "levels.json", json.dumps(curves) + "\n")
    report.write_run(folder)


def _release(state: State) -> None:
    """Networks that were given are their owner's again."""
    for optimizer in state.optimizers.values():
        optimizer.release()


def _drop_rows_after(folder: Path, step: int) -> None:
    path = folder / "metrics.jsonl"
    kept = [json.dumps(row) + "\n" for row in checkpoint.read_rows(path) if row["step"] <= step]
    files.write(path, "".join(kept))


def _save_picture(run: Run, data: data_sets.Data, step: int) -> None:
    """A grid of sample images, or samples over the points that the run is trained on, drawn by all processes."""
    if data.shape[0] not in ((2,) if data.points else (1, 3)):
        return  # nothing that a picture could show
    samples, path = run.sample(SCATTER if data.points else GRID, together=True), run.path / f"samples/step-{step}.png"

    def write() -> None:
        if not samples.isfinite().all():
            warnings.warn(f"samples at step {step} are not finite: no picture is written", stacklevel=2)
        elif data.points:
            report.scatter(samples, path, data.values)
        else:
            report.save_grid(samples, path)

    distributed.from_main(write)


def _warn_of_mismatch(method: Method) -> None:
    schedule = getattr(method, "schedule", None)
    if schedule is not None and schedule.prior_mismatch > PRIOR_LIMIT:
        warnings.warn(
            f"the schedule leaves sqrt(abar_T) = {schedule.prior_mismatch:.3f} of the data at t = T, but sampling "
            "starts from pure noise: samples will be biased ("
            + ("schedule='linear-scaled' or 'cosine'" if "schedule" in known_to(type(method)) else "a greater beta_max")
            + " reaches the prior)",
            stacklevel=3,
        )
