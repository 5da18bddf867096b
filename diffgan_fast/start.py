"""What a run starts with: its arguments, checked against each other, and what config.json says of them."""

from __future__ import annotations

import copy
import dataclasses
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from diffgan_fast import backends
from diffgan_fast import data as data_sets
from diffgan_fast.engine import Method, precision, sample_group
from diffgan_fast.methods import find as find_method
from diffgan_fast.methods.diffusion import DENOISER_OPTIONS
from diffgan_fast.methods.gan import GAN
from diffgan_fast.run import Run, fingerprint, load, pick_device


@dataclass
class Start:
    """What a run begins with: its method, its data, and the networks that are not made anew."""

    method: Method
    source: Any  # the data as they were named or given
    data: data_sets.Data
    size: int | None  # of its images, where those of a folder are resized
    device: torch.device
    given: dict[str, nn.Module]  # the user's own networks
    base: Run | None  # whose denoiser to start from
    critic: Run | None  # whose critic to start from

    def networks(self) -> dict[str, nn.Module]:
        """The networks to take over: the user's own, and copies of those of other runs."""
        found = dict(self.given)
        if self.base is not None:
            net = self.base.state.sampling_net("denoiser")
            if "denoiser" in found:
                found["denoiser"].load_state_dict(net.state_dict())
            else:
                found["denoiser"] = copy.deepcopy(net).requires_grad_(True)
        if self.critic is not None:
            found["critic"] = copy.deepcopy(self.critic.state["critic"])
        return found


def resolve(method, data, preset, base, critic, model, generator, device, subset, size, options) -> Start:
    """The arguments of `train`, checked against each other. Nothing is written."""
    kind, where = find_method(method), pick_device(device)
    if base is not None and not kind.has_denoiser:
        raise ValueError(f"base must be None: method {method!r} has no denoiser to start from another run's")
    source = read_once(data)
    train_data = data_sets.load(source, subset=subset, size=size)
    base = load(base, data=source, device=where, model=model) if isinstance(base, str | Path) else base
    judge = load(critic, data=source, device=where) if isinstance(critic, str | Path) else critic
    dictated = _dictated(base, DENOISER_OPTIONS, "base")
    if isinstance(judge, Run):
        source_method = judge.method
        if not isinstance(source_method, GAN) or source_method.kind != "dcgan" or "critic_start" not in known_to(kind):
            raise ValueError(
                f"critic must be a network for method {method!r}: a run of 'gan' with DCGAN's suits methods 1 and 2"
            )
        critic, dictated = None, dictated | {"critic_width": (source_method.widths[1], "critic")}
    else:
        judge = None
    for name in dictated.keys() & options.keys():
        if options[name] != dictated[name][0]:
            value, run = dictated[name]
            raise ValueError(f"{name} is {value!r} in the {run} run, and cannot be {options[name]!r} here")
    config = kind.Config.make(preset, **{name: value for name, (value, _) in dictated.items()} | options)
    precision.check(config.precision, where)
    instance = kind(config, train_data.shape, train_data.num_classes)
    if judge is not None and kind.pretrained_critic(config) is None:
        raise ValueError("critic must be None or a network with critic_start='scratch'; got a run of 'gan'")
    if judge is not None and judge.method.shape != instance.shape:
        theirs, ours = list(judge.method.shape), list(instance.shape)
        raise ValueError(f"critic must be a run on data of shape {ours} as {train_data.name!r} has, not of {theirs}")
    own = {"denoiser": model, "critic": critic, "generator": generator}
    given = {name: net for name, net in own.items() if net is not None}
    with torch.device("meta"):  # for the errors alone
        made = instance.networks(given)
    if unused := given.keys() - made.keys():
        names = ", ".join("model" if name == "denoiser" else name for name in sorted(unused))
        raise ValueError(f"{names} must be None: method {method!r} has no such network")
    for name, net in given.items():
        for option in ("T", "z_dim", "style_mixing"):
            has, told = getattr(net, option, None), getattr(config, option, None)
            if isinstance(has, int | float) and told is not None and has != told:
                raise ValueError(f"{option} must be {has}, as the {name} that was given has it; got {told}")
    n, group = config.batch_size, sample_group(made.values())
    if n > group and n % group:
        raise ValueError(
            f"batch_size must be at most {group}, the group that the critic compares, or a multiple; got {n}"
        )
    return Start(instance, source, train_data, size, where, given, base, judge)


def read_once(data: Any) -> Any:
    """A name or a path as a string, for it can be read again; everything else in memory, for an iterator can not."""
    if isinstance(data, os.PathLike):
        return str(Path(data).expanduser().resolve())
    return data if isinstance(data, str) else data_sets.load(data)


def known_to(kind: type[Method]) -> set[str]:
    """The names of a method's options."""
    return {f.name for f in dataclasses.fields(kind.Config)}


def describe(start: Start, seed: int, subset: int | None) -> dict[str, Any]:
    """What config.json holds."""
    method, data, source = start.method, start.data, start.source
    schedule = getattr(method, "schedule", None)
    sources = {"base": (start.base, "denoiser"), "critic": (start.critic, "critic")}
    own = {*start.given, *(name for run, name in sources.values() if run is not None and name in run.given)}
    return {
        "method": method.name,
        "data": source if isinstance(source, str) else data.name,
        "data_is_named": isinstance(source, str),
        "fingerprint": data.fingerprint,
        "subset": subset,
        "size": start.size,
        "seed": seed,
        "shape": list(method.shape),
        "num_classes": method.num_classes,
        "given": sorted(own),
        **{name: identity(run, net) for name, (run, net) in sources.items()},
        "config": method.config.to_dict(),
        "schedule": {} if schedule is None else {"T": schedule.T, "prior_mismatch": schedule.prior_mismatch},
        "versions": {"diffgan_fast": backends.info()["version"], "torch": torch.__version__},
    }


def identity(run: Run | None, name: str) -> dict[str, Any] | None:
    """Which weights a network starts from."""
    if run is None:
        return None
    if name not in run.state.nets:
        raise ValueError(f"run {run.path} has no {name}")
    return {"step": run.state.step, "weights": fingerprint(run.state.sampling_net(name))}


def _dictated(run: Run | None, names: Sequence[str], source: str) -> dict[str, tuple[Any, str]]:
    """The options that a run to start from leaves no choice in: name -> (value, what the run is here)."""
    config = {} if run is None else run.method.config.to_dict()
    return {name: (config[name], source) for name in names if name in config}
