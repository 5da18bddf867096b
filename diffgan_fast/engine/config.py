"""Settings of a training: dataclasses whose fields know their help, unit and range.

A method's config is a dataclass that inherits `TrainConfig`. Every field is a keyword of `dgf.train`, a flag of the
command line and an entry of config.json, under one name.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import types
import typing
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

from diffgan_fast.engine.compiling import Compile
from diffgan_fast.engine.memory import DataOn
from diffgan_fast.engine.precision import Precision


def option(default: Any, help: str, *, unit: str = "", low: float | None = None, high: float | None = None) -> Any:
    """A config field with its help line, its unit, and its least and greatest value."""
    return field(default=default, metadata={"help": help, "unit": unit, "low": low, "high": high})


@dataclass(kw_only=True)
class TrainConfig:
    """What every method has."""

    steps: int = option(2000, "training steps", low=0)
    kimg: float | None = option(None, "thousands of samples to train on, in place of steps", low=0)
    batch_size: int = option(128, "samples a step", low=1)
    lr: float = option(2e-4, "learning rate of the generating network", low=0)
    lr_schedule: Literal["constant", "cosine", "exponential"] = option(
        "constant", "learning rate of the generating network over the run: cosine to 0, or exponential to a tenth"
    )
    warmup: int = option(0, "steps over which the learning rate rises from 0", unit="steps", low=0)
    clip_grad: float = option(0.0, "largest norm of the generating network's gradient (0: no limit)", low=0)
    ema: float = option(
        0.999,
        "decay of the averaged weights that sampling uses, after k updates at most 1 - (1 + k)^(-2/3) (0: none)",
        low=0,
        high=1,
    )
    ema_every: int = option(1, "updates between averagings", unit="updates", low=1)
    ema_start: int = option(0, "updates during which the average is a copy", unit="updates", low=0)
    flip: bool = option(False, "mirror half of the training images")
    data_on: DataOn = option(
        "auto",
        "where the data lie: device; host, from which batches are copied ahead of their steps; or auto: on the device, "
        "unless they would take more than a quarter of its free memory",
    )
    channels_last: bool = option(True, "keep images and convolutions in channels_last memory format")
    precision: Precision = option(
        "fp32",
        "what the networks compute in while they train: fp32 (as torch is set), tf32 (CUDA), or bf16 or fp16 by "
        "autocast, fp16 with scaled losses",
    )
    compile: Compile = option(
        False, "compile the networks while they train: true, false, or auto: on CUDA, where that pays soonest"
    )
    cuda_graphs: bool = option(
        True, "on CUDA, run the steps as CUDA graphs, one for each kind of step, where they can be captured"
    )
    log_every: int = option(50, "steps between rows of metrics.jsonl", unit="steps", low=1)
    sample_every: int = option(500, "steps between sample grids (0: only at the end)", unit="steps", low=0)
    checkpoint_every: int = option(1000, "steps between checkpoints (0: only at the end)", unit="steps", low=0)
    keep: int = option(2, "checkpoints kept", low=1)
    evaluate_every: int = option(
        0, "steps between evaluations, by which the best checkpoint is kept (0: none)", unit="steps", low=0
    )
    evaluate_n: int = option(1000, "samples of such an evaluation", low=10)
    evaluate_on: str = option("domain", "the features that images are measured on: domain, effl0, inception or vgg16")
    best_by: str | None = option(None, "the metric of the best checkpoint (none: kid of images, kl of points)")

    PRESETS: ClassVar[dict[str, dict[str, Any]]] = {}
    critic_scheduled: ClassVar[bool] = False  # whether the critic's learning rate follows lr_schedule too

    def __post_init__(self) -> None:
        hints = typing.get_type_hints(type(self))
        for f in dataclasses.fields(self):
            setattr(self, f.name, _checked(f, hints[f.name], getattr(self, f.name)))
        if self.kimg is not None:
            self.steps = math.ceil(1000 * self.kimg / self.batch_size)

    @classmethod
    def make(cls, preset: str | None = None, **options: Any):
        """A config from a named preset and options that override it. ValueError for names there are none of."""
        if preset is not None and preset not in cls.PRESETS:
            known = ", ".join(cls.PRESETS) or "none for this method"
            raise ValueError(f"preset must be one of: {known}; got {preset!r}")
        names = [f.name for f in dataclasses.fields(cls)]
        for name in options:
            if name not in names:
                close = difflib.get_close_matches(name, names, n=1)
                hint = f"; did you mean {close[0]!r}?" if close else ""
                raise ValueError(f"unknown option {name!r}{hint} (there are: {', '.join(names)})")
        chosen = dict(cls.PRESETS.get(preset or "", {}))
        if "steps" in options and options.get("kimg") is not None:
            raise ValueError(f"steps must not be given with kimg; got {options['steps']} and {options['kimg']}")
        if "steps" in options:
            chosen.pop("kimg", None)
        return cls(**{**chosen, **options})

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


def _checked(f: dataclasses.Field, hint: Any, value: Any) -> Any:
    """The value as the field's type, or a ValueError that names the field and what it may be."""
    meta = f.metadata
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        if value is None and type(None) in args:
            return None
        kinds = [a for a in args if a is not type(None)]
        literal = [a for a in kinds if typing.get_origin(a) is Literal]
        if literal and value in typing.get_args(literal[0]):
            return value
        if literal and not isinstance(value, kinds[-1]):
            words = ", ".join(map(repr, typing.get_args(literal[0])))
            raise ValueError(f"{f.name} must be {words} or {kinds[-1].__name__}, got {value!r}")
        hint = kinds[-1]
        origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin is Literal:
        if value not in args:
            raise ValueError(f"{f.name} must be one of {', '.join(map(str, args))}; got {value!r}")
        return value
    if origin is tuple:
        if isinstance(value, str) or not all(isinstance(v, args[0]) for v in value):
            raise ValueError(f"{f.name} must be a sequence of {args[0].__name__}, got {value!r}")
        return tuple(value)
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    if not isinstance(value, hint) or (hint is int and isinstance(value, bool)):
        raise ValueError(f"{f.name} must be {hint.__name__}, got {value!r}")
    low, high = meta.get("low"), meta.get("high")
    if (low is not None and value < low) or (high is not None and value > high) or value != value:
        bounds = f"{low}..{high}" if high is not None else f"at least {low}"
        raise ValueError(f"{f.name} must be {bounds}, got {value!r}")
    return value
