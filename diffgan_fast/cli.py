"""The command line: the words of the Python interface, each option of a method's config a flag."""

from __future__ import annotations

import dataclasses
import inspect
import json
import sys
import types
import typing
import warnings
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer

import diffgan_fast as dgf
from diffgan_fast import methods, report
from diffgan_fast.engine import TrainConfig, distributed
from diffgan_fast.metrics.evaluation import MAX_REFERENCE
from diffgan_fast.run import pick_device

app = typer.Typer(
    help="Train, sample and measure hybrids of diffusion models and GANs.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
    rich_markup_mode=None,
)
train_app = typer.Typer(help="Train a method.", no_args_is_help=True, rich_markup_mode=None)
reproduce_app = typer.Typer(
    help="Run a study of the source documents again.", no_args_is_help=True, rich_markup_mode=None
)
app.add_typer(train_app, name="train")
app.add_typer(reproduce_app, name="reproduce")

Data = Annotated[str, typer.Option(help="data set by name, or a folder or zip of images", metavar="NAME|PATH")]
Size = Annotated[int | None, typer.Option(help="crop and resize the images of a folder or zip to so many pixels")]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, …")]
Seed = Annotated[int, typer.Option(help="everything random follows from it")]
Best = Annotated[bool, typer.Option("--best", help="at the checkpoint that scored best in training")]
# how a run is sampled, in place of its settings
Sampler = Annotated[str | None, typer.Option(help="ddpm or ddim [default: the run's]")]
Steps = Annotated[int | None, typer.Option(help="sampling steps [default: the run's]")]
Eta = Annotated[float | None, typer.Option(help="noise of ddim [default: the run's]")]
GuidanceScale = Annotated[float | None, typer.Option(help="classifier-free guidance [default: the run's]")]
Precise = Annotated[str | None, typer.Option("--precision", help="fp32, tf32, bf16 or fp16 networks [default: fp32]")]
Together = Annotated[int | None, typer.Option("--batch", help="samples drawn at a time [default: 500, points 10,000]")]
Subset = Annotated[int | None, typer.Option(help="train on so many images, a fixed choice")]
Pictures = Annotated[
    str | None,
    typer.Option(
        help="data set of images by name; digits is the quick one, mnist and cifar10 take hours on a CPU [default: "
        "mnist if its files are found on this machine, else digits]",
        metavar="NAME",
    ),
]
LogitScale = Annotated[float | None, typer.Option(help="weight of a guiding critic [default: the run's]")]


def _word_or_int(text: str) -> str | int:
    return int(text) if text.removeprefix("-").isdigit() else text


def _word_or_bool(text: str) -> str | bool:
    return {"true": True, "false": False}.get(text, text)


def _tell(text: str, err: bool = False) -> None:
    """Prints it once, however many processes there are."""
    if distributed.is_main():
        typer.echo(text, err=err)


def _flag(field: dataclasses.Field, hint: Any) -> inspect.Parameter:
    """One config field as a flag. None means that the flag was not given, so that a preset can speak."""
    meta = field.metadata
    unit = f", in {meta['unit']}" if meta["unit"] and meta["unit"] not in meta["help"] else ""
    default = "none" if field.default is None else field.default
    is_bool = hint is bool
    flag = field.name.replace("_", "-")
    name = f"--{flag}/--no-{flag}" if is_bool else f"--{flag}"
    plain = [a for a in typing.get_args(hint) if a is not type(None)] if type(None) in typing.get_args(hint) else [hint]
    settings: dict[str, Any] = dict(help=f"{meta['help']}{unit} [default: {default}]", show_default=False)
    if field.name == "batch_size" or typing.get_origin(plain[0]) in (typing.Union, types.UnionType):
        other: dict[str, Any] = {"parser": _word_or_int, "metavar": "WORD|INTEGER"}
        if bool in typing.get_args(plain[0]):
            other = {"parser": _word_or_bool, "metavar": "WORD|true|false"}
        plain, settings = [str], {**settings, **other}
    option = typer.Option(name, **settings)
    return inspect.Parameter(
        field.name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=Annotated[plain[0] | None, option]
    )


def _add_train_command(name: str, config: type[TrainConfig]) -> None:
    def command(data, out, plan, resume, **options) -> None:
        given = _told(**options)
        if plan:
            typer.echo(dgf.plan(name, data, **given))
            return
        try:
            run = dgf.train(name, data, out, resume=resume, **given)
        except KeyboardInterrupt:
            _tell("stopped; a checkpoint is written. The same command with --resume goes on from it.", err=True)
            raise typer.Exit(130) from None
        _tell(f"{run.path}: {run.state.step} steps in {run.seconds:.1f} s; report: {run.path / 'report.html'}")

    presets = ", ".join(config.PRESETS) or "none"
    common: dict[str, tuple[Any, Any]] = {
        "data": ("digits", Data),
        "out": (None, Annotated[Path | None, typer.Option(help="directory of the run [default: runs/METHOD-DATA]")]),
        "seed": (0, Seed),
        "preset": (None, Annotated[str | None, typer.Option(help=f"named settings: {presets}")]),
        "base": (None, Annotated[Path | None, typer.Option(help="run whose denoiser to start from")]),
        "critic": (None, Annotated[Path | None, typer.Option(help="run whose critic to start from")]),
        "resume": (
            False,
            Annotated[bool, typer.Option("--resume", help="go on from the last checkpoint, bit for bit")],
        ),
        "plan": (False, Annotated[bool, typer.Option("--plan", help="say what it will take, and do not train")]),
        "device": ("auto", Device),
        "subset": (None, Annotated[int | None, typer.Option(help="train on so many samples, a fixed choice")]),
        "size": (None, Size),
    }
    kind = inspect.Parameter.KEYWORD_ONLY
    parameters = [inspect.Parameter(k, kind, default=d, annotation=a) for k, (d, a) in common.items()]
    hints = typing.get_type_hints(config)
    parameters += [_flag(f, hints[f.name]) for f in dataclasses.fields(config)]
    command.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    train_app.command(name, help=methods()[name])(command)


for _name in methods():
    _add_train_command(_name, methods.find(_name).Config)


@app.command()
def sample(
    run: Annotated[Path, typer.Argument(help="directory of a run")],
    n: Annotated[int, typer.Option(help="how many")] = 64,
    seed: Seed = 0,
    label: Annotated[int | None, typer.Option(help="class of the samples [default: in turn]")] = None,
    out: Annotated[
        Path | None,
        typer.Option(help="a .png (grid, scatter) or .npz (uint8 NHWC, points) [default: RUN/samples/seed-S.png]"),
    ] = None,
    best: Best = False,
    sampler: Sampler = None,
    steps: Steps = None,
    eta: Eta = None,
    guidance_scale: GuidanceScale = None,
    logit_scale: LogitScale = None,
    batch: Together = None,
    precision: Precise = None,
    device: Device = "auto",
) -> None:
    """Draw samples from a run."""
    how = _told(sampler=sampler, steps=steps, eta=eta, guidance_scale=guidance_scale, logit_scale=logit_scale)
    how |= _told(batch=batch, precision=precision)
    out = out or run / "samples" / f"seed-{seed}.png"
    if out.suffix not in (".png", ".npz"):
        raise ValueError(f"out must end in .png or .npz, got {out}")
    distributed.join(pick_device(device))
    source = dgf.load(run, device=device, best=best)
    samples = source.sample(n, seed, labels=label, together=True, **how)

    def write() -> None:
        if samples.ndim == 2 and out.suffix == ".png":
            report.scatter(samples, out, source.reference().values if source.named else None)
        elif out.suffix == ".png":
            report.save_grid(samples, out)
        else:
            stored = samples if samples.ndim == 2 else dgf.data.to_uint8(samples).permute(0, 2, 3, 1)
            np.savez_compressed(out, samples=stored.numpy())

    distributed.from_main(write)
    _tell(str(out))


@app.command()
def evaluate(
    what: Annotated[Path, typer.Argument(help="directory of a run, folder or zip of images, or .npz of samples")],
    against: Annotated[
        str | None,
        typer.Option(help="data set by name, or a folder or zip of images [default: the run's]", metavar="NAME|PATH"),
    ] = None,
    n: Annotated[int | None, typer.Option(help="samples to measure [default: 2000 of a run, else all]")] = None,
    metrics: Annotated[
        list[str] | None,
        typer.Option("--metrics", "--metric", help="names with commas between, or given often [default: all that fit]"),
    ] = None,
    extractor: Annotated[
        str | None, typer.Option(help=f"{', '.join(dgf.metrics.extractors())} [default: domain]", show_default=False)
    ] = None,
    max_reference: Annotated[
        int, typer.Option(help="real images that samples are measured against at most, a fixed choice (0: all)")
    ] = MAX_REFERENCE,
    as_json: Annotated[bool, typer.Option("--json", help="print JSON")] = False,
    size: Size = None,
    best: Best = False,
    sampler: Sampler = None,
    steps: Steps = None,
    eta: Eta = None,
    guidance_scale: GuidanceScale = None,
    logit_scale: LogitScale = None,
    batch: Together = None,
    precision: Precise = None,
    device: Device = "auto",
) -> None:
    """Measure a run's samples, or samples made by anything else, against a data set."""
    how = _told(sampler=sampler, steps=steps, eta=eta, guidance_scale=guidance_scale, logit_scale=logit_scale)
    how |= _told(batch=batch, precision=precision)
    names = [name.strip() for given in metrics or () for name in given.split(",")] or None
    if n is not None and n < 2:
        raise ValueError(f"n must be at least 2, got {n}")
    if not what.exists():
        raise ValueError(f"{what} does not exist: name a run, a folder or zip of images, or an .npz of samples")
    is_run = (what / "config.json").exists()
    if (how or best) and not is_run:
        raise ValueError(f"{', '.join(how or ['best'])} must not be given: {what} is no run to sample from")
    distributed.join(pick_device(device))
    named = against is None or against in dgf.datasets()
    if size is not None and named and (is_run or what.suffix == ".npz"):
        raise ValueError(
            f"size must not be given: {what} is no folder or zip of images, nor what it is measured against"
        )
    if is_run and against is None:
        given: dict[str, Any] = {"metrics": names, "extractor": extractor, "max_reference": max_reference or None}
        result = dgf.load(what, device=device, best=best).evaluate(n or 2000, together=True, **given, **how)
        distributed.from_main(lambda: report.write_run(what))
    elif against is None:
        raise ValueError(f"against must name the data set to measure {what} against: it is no run")
    else:
        of_theirs = None if named else size
        data, on = dgf.data.load(against, size=of_theirs), pick_device(device)
        if is_run:
            how |= dict(progress=True, together=True)
            samples = dgf.load(what, device=device, best=best).sample(n or 2000, seed=1, **how)
        else:
            samples = _stored(what, n, data, size)
        test = dgf.data.load_test(against, size=of_theirs)
        held_out = None if test is None else test.to(on)
        options: dict[str, Any] = {"metrics": names, "extractor": extractor, "held_out": held_out}
        options["max_reference"] = max_reference or None
        result = distributed.from_main(lambda: dgf.metrics.evaluate(samples, data.to(on), **options))
    if as_json:
        _tell(json.dumps(result, indent=1))
    else:
        notes = report.score_notes(result)
        if "spread" in result:
            notes.append(report.SPREAD_NOTE)
        _tell("\n".join([report.table(report.score_rows(result), report.SCORE_COLUMNS), *notes]))


def _told(**options: Any) -> dict[str, Any]:
    """The options that were given."""
    return {name: value for name, value in options.items() if value is not None}


def _stored(path: Path, n: int | None, like: dgf.data.Data, size: int | None) -> torch.Tensor:
    """Samples from a folder or zip of images, or an .npz: its array "samples", or "arr_0", or its only one.

    Grey images may be stored as colours, or colours be wanted of grey ones.
    """
    if path.suffix != ".npz":
        found = dgf.data.load(path, size=size)
    else:
        try:
            with np.load(path) as file:
                names = [name for name in ("samples", "arr_0") if name in file] or list(file.files)
                if len(names) != 1 and "samples" not in names:
                    raise ValueError(f"must hold the array samples, or only one; it holds {', '.join(file.files)}")
                found = dgf.data.load(file[names[0]])
        except (ValueError, OSError, zipfile.BadZipFile) as error:
            raise ValueError(f"{path} is no .npz of samples: {error}") from error
    samples = (found if n is None else found.subset(n)).batch(slice(None))
    if samples.ndim == 4 and len(like.shape) == 3 and samples.shape[1] != like.shape[0]:
        if samples.shape[1] == 1:
            return samples.expand(-1, like.shape[0], -1, -1)
        if like.shape[0] == 1 and (samples == samples[:, :1]).all():
            return samples[:, :1]
    return samples


@app.command()
def compare(
    names: Annotated[list[str], typer.Argument(help="methods", metavar="METHOD…")],
    data: Data = "digits",
    out: Annotated[Path, typer.Option(help="directory of the comparison")] = Path("runs/compare"),
    seed: Seed = 0,
    n: Annotated[int, typer.Option(help="samples to measure")] = 2000,
    device: Device = "auto",
) -> None:
    """Train methods on the same data, and print one table."""
    rows = dgf.compare(names, data, out, seed=seed, n=n, device=device)
    _tell(_scores(rows))
    _tell(f"report: {out / 'report.html'}")


@app.command(name="report")
def write_report(run: Annotated[Path, typer.Argument(help="directory of a run")]) -> None:
    """Write a run's report.html anew."""
    typer.echo(report.write_run(run))


@app.command()
def info(as_json: Annotated[bool, typer.Option("--json", help="print JSON")] = False) -> None:
    """Show which back ends exist here, what they were built for, and why one is missing."""
    facts = dgf.info()
    if as_json:
        typer.echo(json.dumps(facts, indent=1))
        return
    typer.echo(f"diffgan_fast {facts['version']}, torch {facts['torch']}, devices: {', '.join(facts['devices'])}")
    for name, row in [*facts["backends"].items(), ("host", facts["host"])]:
        details = {
            k: " ".join(v) if isinstance(v, list) else v for k, v in row.items() if k not in ("available", "reason")
        }
        text = ", ".join(f"{k.replace('_', ' ')}: {v}" for k, v in details.items())
        state = "yes" if row["available"] else f"no: {row.get('reason', 'not built')}"
        typer.echo(f"  {name:<10} {state}{f'  ({text})' if text else ''}")


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="directory of the demo")] = Path("runs/demo"),
    seed: Seed = 0,
    device: Device = "auto",
) -> None:
    """Train a DDPM on the digits that ship with the package, fine-tune it with methods 3 and 3.5, and compare."""
    from diffgan_fast.demo import run_demo

    rows = run_demo(out, seed=seed, device=device)
    _tell(_scores(rows))
    _tell(f"report: {out / 'report.html'}")


@reproduce_app.command(name="2d")
def reproduce_2d(
    out: Annotated[Path, typer.Option(help="directory of the study")] = Path("runs/reproduce-2d"),
    variant: Annotated[str, typer.Option(help="as-coded (the published code) or paper (what it means)")] = "as-coded",
    data: Annotated[list[str] | None, typer.Option(help="data set, may be given often [default: all four]")] = None,
    config: Annotated[list[str] | None, typer.Option(help="configuration, may be given often [default: all]")] = None,
    seeds: Annotated[int, typer.Option(help="runs of each, with seeds from 0 on")] = 3,
    steps: Annotated[int | None, typer.Option(help="training steps [default: as published]")] = None,
    device: Device = "auto",
) -> None:
    """Train and measure each configuration of "GAN-Enhanced Diffusion" on its 2-D data, beside the published values."""
    from diffgan_fast import reproduce

    given: dict[str, Any] = {"steps": steps, "data": data, "configs": config}
    options = {name: value for name, value in given.items() if value}
    with _resumable():
        results = reproduce.reproduce_2d(out, variant=variant, seeds=seeds, device=device, **options)
    _tell(report.table(*reproduce.kl_table(results)))
    _tell(f"report: {out / variant / 'report.html'}")


@reproduce_app.command(name="table1")
def reproduce_table1(
    out: Annotated[Path, typer.Option(help="directory of the study")] = Path("runs/reproduce-table1"),
    data: Annotated[str, typer.Option(help="data set of images by name", metavar="NAME")] = "digits",
    config: Annotated[list[str] | None, typer.Option(help="configuration, may be given often [default: all]")] = None,
    seeds: Annotated[int, typer.Option(help="runs of each, with seeds from 0 on")] = 3,
    n: Annotated[int, typer.Option(help="samples to measure")] = 2000,
    images: Annotated[int, typer.Option(help="images that each configuration is trained on")] = 12_800,
    conditional: Annotated[bool, typer.Option("--conditional", help="tell the denoiser the class, and guide")] = False,
    base: Annotated[Path | None, typer.Option(help="run to start from [default: a ddpm, trained first]")] = None,
    critic: Annotated[
        Path | None, typer.Option(help="run whose critic methods 1 and 2 start from [default: a gan, trained first]")
    ] = None,
    device: Device = "auto",
) -> None:
    """Fine-tune one base by every method of "Exploring the Combination of Diffusion Models and GANs", and compare."""
    from diffgan_fast import reproduce

    options: dict[str, Any] = dict(seeds=seeds, n=n, images=images, conditional=conditional)
    if config:
        options["configs"] = config
    with _resumable():
        results = reproduce.reproduce_table1(out, data=data, base=base, critic=critic, device=device, **options)
    _tell(report.table(*reproduce.score_table(results)))
    _tell("\n" + report.table(*reproduce.gain_table(results)))
    _tell(f"report: {reproduce.table1_folder(out, data, conditional) / 'report.html'}")


@reproduce_app.command(name="ddgan")
def reproduce_ddgan(
    out: Annotated[Path, typer.Option(help="directory of the study")] = Path("runs/reproduce-ddgan"),
    data: Pictures = None,
    config: Annotated[list[str] | None, typer.Option(help="configuration, may be given often [default: all]")] = None,
    seeds: Annotated[int, typer.Option(help="runs of each, with seeds from 0 on")] = 3,
    n: Annotated[int, typer.Option(help="samples to measure")] = 2000,
    images: Annotated[int, typer.Option(help="images that each model is trained on")] = 128_000,
    points: Annotated[str, typer.Option(help="data set of points of the picture of a denoising step")] = "ring",
    width: Annotated[int | None, typer.Option(help="channels of the DDGAN's generator [default: its preset's]")] = None,
    subset: Subset = None,
    device: Device = "auto",
) -> None:
    """Set quality against sampling time: DDGAN with few steps, DDPM and DDIM with many, GANs with one; ablations."""
    from diffgan_fast import reproduce

    options: dict[str, Any] = dict(seeds=seeds, n=n, images=images, points=points, width=width, subset=subset)
    data, options["device"] = _pictures(data), device
    with _resumable():
        results = reproduce.reproduce_ddgan(out, data=data, configs=config or None, **options)
    _tell(report.table(*reproduce.tradeoff_table(results)))
    _tell(f"report: {out / data / 'report.html'}")


@reproduce_app.command(name="toy")
def reproduce_toy(
    out: Annotated[Path, typer.Option(help="directory of the study")] = Path("runs/reproduce-toy"),
    sigma: Annotated[float, typer.Option(help="scale of the noise")] = 1.0,
    n: Annotated[int, typer.Option(help="samples of each kind")] = 100_000,
    seed: Seed = 0,
) -> None:
    """The toy example of "Diffusion-GAN": divergence and optimal critic under noise, beside noised samples."""
    from diffgan_fast import reproduce

    rows = reproduce.reproduce_toy(out, sigma=sigma, n=n, seed=seed)
    _tell(report.table(rows, {name: name for name in rows[0]}))
    _tell(f"report: {out / 'report.html'}")


@reproduce_app.command(name="gaussians")
def reproduce_gaussians(
    out: Annotated[Path, typer.Option(help="directory of the study")] = Path("runs/reproduce-gaussians"),
    seeds: Annotated[int, typer.Option(help="runs of each, with seeds from 0 on")] = 5,
    steps: Annotated[int | None, typer.Option(help="training steps [default: the study's]")] = None,
    device: Device = "auto",
) -> None:
    """Train a plain GAN, one with R1, and Diffusion-GAN on 25 Gaussians, and count the modes that they capture."""
    from diffgan_fast import reproduce

    options: dict[str, Any] = {"steps": steps} if steps else {}
    with _resumable():
        results = reproduce.reproduce_gaussians(out, seeds=seeds, device=device, **options)
    _tell(report.table(*reproduce.modes_table(results)))
    _tell(f"report: {out / 'report.html'}")


@reproduce_app.command(name="diffusion-gan")
def reproduce_diffusion_gan(
    out: Annotated[Path, typer.Option(help="directory of the study")] = Path("runs/reproduce-diffusion-gan"),
    data: Pictures = None,
    network: Annotated[
        list[str] | None, typer.Option(help="dcgan, sngan or stylegan2, may be given often [default: the first two]")
    ] = None,
    config: Annotated[list[str] | None, typer.Option(help="configuration, may be given often [default: all]")] = None,
    seeds: Annotated[int, typer.Option(help="runs of each, with seeds from 0 on")] = 3,
    n: Annotated[int, typer.Option(help="samples to measure")] = 2000,
    kimg: Annotated[float, typer.Option(help="thousands of images that each is trained on")] = 128.0,
    width: Annotated[int | None, typer.Option(help="of generators and critics [default: each network's]")] = None,
    subset: Subset = None,
    device: Device = "auto",
) -> None:
    """Train GANs of images with and without diffusion, in the paper's configurations, and compare them."""
    from diffgan_fast import reproduce

    widths = {"width": width, "critic_width": width}
    given: dict[str, Any] = {"networks": network, "configs": config, "subset": subset} | widths
    options, data = {name: value for name, value in given.items() if value not in (None, [])}, _pictures(data)
    with _resumable():
        results = reproduce.reproduce_diffusion_gan(
            out, data=data, seeds=seeds, n=n, kimg=kimg, device=device, **options
        )
    _tell(report.table(*reproduce.diffusion_gan_table(results)))
    _tell(f"report: {out / data / 'report.html'}")


def _pictures(data: str | None) -> str:
    """The data set of a study of images. If it was not named, says which it is, and why."""
    from diffgan_fast import reproduce

    chosen = reproduce.pictures(data)
    if data is None:
        why = {"mnist": "its files are on this machine; --data digits is quicker", "digits": "no files of MNIST here"}
        _tell(f"data: {chosen} ({why[chosen]})")
    return chosen


@contextmanager
def _resumable() -> Iterator[None]:
    """Ctrl-C ends a study with a word on how to go on."""
    try:
        yield
    except KeyboardInterrupt:
        _tell("stopped; the same command goes on from here.", err=True)
        raise typer.Exit(130) from None


def _scores(rows: list[dict]) -> str:
    """The table of some runs' scores, with what real data score, and the notes that belong to it."""
    shown, columns, _ = report.compared(rows)
    return "\n".join([report.table(shown, columns), *report.score_notes(rows[0])])


def main(arguments: list[str] | None = None) -> None:
    """The entry point: errors of use are one line, not a stack trace."""
    errors: tuple[type[Exception], ...] = (ValueError, FileNotFoundError, dgf.BackendError, dgf.TrainingError)
    errors += (torch.OutOfMemoryError,)
    try:
        with warnings.catch_warnings():
            for kind in (dgf.metrics.SmallSampleWarning, dgf.metrics.SampleRangeWarning):
                warnings.simplefilter("ignore", kind)  # they stand below the tables
            app(args=arguments)
    except errors as error:
        typer.echo(f"diffgan-fast: {error}", err=True)
        sys.exit(2)
