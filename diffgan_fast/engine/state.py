"""What training changes: networks, optimisers, averaged weights and the step count. And how one of them is updated."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from diffgan_fast.engine import batch_norm, distributed, precision
from diffgan_fast.engine.config import TrainConfig
from diffgan_fast.engine.optim import FlatAdamW
from diffgan_fast.random import Key


class State:
    """Networks by name, an optimiser for each one that trains, and EMA copies of those that sample.

    Args:
        nets: the networks, on their device.
        optimizers: for each name that trains, its optimiser. The first group's lr is the base learning rate.
        averaged: names of the networks whose weights are averaged.
        config: decay, clipping and the learning-rate schedule.
    """

    def __init__(
        self,
        nets: dict[str, nn.Module],
        optimizers: dict[str, FlatAdamW],
        averaged: tuple[str, ...],
        config: TrainConfig,
    ):
        self.nets, self.optimizers, self.config = nets, optimizers, config
        self.step = 0
        self.exchange: Callable[[torch.Tensor], object] = lambda gradient: None  # with other processes: see `together`
        self.later: list[Callable[[Key], None]] | None = None  # what `outside` keeps, while a step is captured
        self.captured = False  # whether updates find their numbers on the device: see `number`
        self._base_lr = {name: o.param_groups[0]["lr"] for name, o in optimizers.items()}
        self._updates = dict.fromkeys(optimizers, 0)
        self.scalers = {name: precision.scaler(config.precision, o.device) for name, o in optimizers.items()}
        self.ema = {name: copy.deepcopy(nets[name]).eval().requires_grad_(False) for name in averaged if config.ema > 0}
        self._weight: dict[str, float | torch.Tensor] = dict.fromkeys(self.ema, 0.0)  # of the networks in averages

    def __getitem__(self, name: str) -> nn.Module:
        return self.nets[name]

    @property
    def updates(self) -> dict[str, int]:
        """How often each network was updated."""
        return self._updates

    def update(self, name: str, loss: torch.Tensor) -> None:
        """One optimiser step of network `name` on a loss. No other network's gradients are computed."""
        optimizer, scaler = self.optimizers[name], self.scalers[name]
        if not self.captured:
            self.number(name)
        with precision.full(optimizer.device):
            optimizer.backward(scaler.scale(loss))
            for gradient in optimizer.gradients:
                self.exchange(gradient)
            scaler.unscale_(optimizer)  # and notes, on the device, whether it is finite
            if name in self.generating and self.config.clip_grad:
                optimizer.clip(self.config.clip_grad)
            scaler.step(optimizer)
            scaler.update()
            if self.averages_next(name):
                self._average(name)
            self._updates[name] += 1

    def number(self, name: str) -> None:
        """Sets the numbers of network `name`'s next update: its learning rate, and its weight in the average."""
        optimizer, c = self.optimizers[name], self.config
        scheduled = name in self.generating or c.critic_scheduled
        lr = self._base_lr[name] * (self.lr_factor() if scheduled else 1.0)
        for group in optimizer.param_groups:
            _set(group, "lr", lr)
        if name in self.ema:
            # the usual warm-up: the average of few updates is not dominated by the initial weights
            ramp = 1 - (1 + max(self._updates[name] + 1 - c.ema_start, 0)) ** (-2 / 3)
            _set(self._weight, name, 1 - min(c.ema, ramp))

    def numbers_on_device(self) -> None:
        """Keeps what `number` sets in tensors from now on, which captured updates read."""
        self.captured = True
        for name, optimizer in self.optimizers.items():
            for group in optimizer.param_groups:
                group["lr"] = torch.zeros((), device=optimizer.device)
            if name in self.ema:
                self._weight[name] = torch.zeros((), device=optimizer.device)

    def averages_next(self, name: str) -> bool:
        """Whether network `name`'s next update is followed by an averaging."""
        return name in self.ema and (self._updates[name] + 1) % self.config.ema_every == 0

    def outside(self, run: Callable[[Key], None], key: Key) -> None:
        """Runs what a CUDA graph cannot hold, as the last thing of a step: run(key).

        At once; but of a step that is captured after each replay, with the key that the step then has.
        """
        if self.later is None:
            run(key)
        else:
            self.later.append(run)

    @property
    def generating(self) -> tuple[str, ...]:
        """The networks that samples come from: all but critics."""
        return tuple(n for n in self.nets if n != "critic")

    def lr_factor(self) -> float:
        """What the base learning rates that follow the schedule are multiplied by at this step."""
        c, progress = self.config, self.step / max(self.config.steps, 1)
        factor = {
            "constant": 1.0,
            "cosine": 0.5 * (1 + math.cos(math.pi * min(progress, 1.0))),
            "exponential": 0.1**progress,
        }
        return factor[c.lr_schedule] * (min(1.0, (self.step + 1) / c.warmup) if c.warmup else 1.0)

    @torch.no_grad()
    def _average(self, name: str) -> None:
        ema, net, weight = self.ema[name], self.nets[name], self._weight[name]
        for mine, theirs in zip(ema.parameters(), net.parameters(), strict=True):
            mine.lerp_(theirs, weight)
        for buffer, other in zip(ema.buffers(), net.buffers(), strict=True):
            buffer.copy_(other)

    def sampling_net(self, name: str, ema: bool = True) -> nn.Module:
        """The network to sample from: the averaged copy if there is one and it is wanted."""
        return self.ema[name] if ema and name in self.ema else self.nets[name]


def _set(where: dict, name: str, value: float) -> None:
    """Puts a number in its place, on the device if it is a tensor there."""
    if isinstance(where[name], torch.Tensor):
        where[name].fill_(value)
    else:
        where[name] = value


@contextmanager
def together(state: State, samples: int) -> Iterator[None]:
    """A state that all processes train as one, each with `samples` of a batch: as one process does with all of them.

    They begin with the main process's weights, gradients are averaged, and batch norm measures the whole batch.

    Raises: ValueError for a network that compares samples which lie in different processes, or a batch norm that cannot
        be shared.
    """
    if distributed.size() == 1:
        yield
        return
    modules = [*state.nets.values(), *state.ema.values()]
    told = distributed.from_main(lambda: [{k: v.cpu() for k, v in net.state_dict().items()} for net in modules])
    for net, weights in zip(modules, told, strict=True):
        net.load_state_dict(weights)
    try:
        for name, net in state.nets.items():
            if samples % (group := sample_group([net])):
                raise ValueError(
                    f"batch_size must give each of {distributed.size()} processes a multiple of {group} samples, the "
                    f"group that network {name!r} compares; got {samples * distributed.size()}"
                )
            batch_norm.share(net)
        state.exchange = distributed.mean
        yield
    finally:
        state.exchange = lambda gradient: None
        for net in state.nets.values():
            batch_norm.unshare(net)


def sample_group(nets: Iterable[nn.Module]) -> int:
    """The samples that hold whole groups of every layer which compares some, 1 where each is seen by itself."""
    return math.lcm(*(getattr(layer, "sample_group", 1) for net in nets for layer in net.modules()))


@contextmanager
def evaluating(*modules: nn.Module) -> Iterator[None]:
    """Modules in eval mode; each submodule's mode comes back afterwards."""
    modes = [(m, m.training) for module in modules for m in module.modules()]
    try:
        for module in modules:
            module.eval()
        yield
    finally:
        for m, mode in modes:
            m.training = mode


@contextmanager
def frozen(module: object) -> Iterator[None]:
    """A module's parameters without gradients, for a forward pass that trains something else. Other objects pass."""
    trainable = [p for p in module.parameters() if p.requires_grad] if isinstance(module, nn.Module) else []
    try:
        for p in trainable:
            p.requires_grad_(False)
        yield
    finally:
        for p in trainable:
            p.requires_grad_(True)


def measures_batch(module: object) -> bool:
    """Whether a module normalises by the batch that it is given: its output for a sample depends on the others."""
    layers = module.modules() if isinstance(module, nn.Module) else ()
    return any(isinstance(m, _BatchNorm) and (m.training or m.running_var is None) for m in layers)
