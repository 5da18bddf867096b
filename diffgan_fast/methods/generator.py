"""What the methods with a generator share: its network and its critic, their optimisers, latents, and sampling."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, cast

import torch
from torch import nn

from diffgan_fast import nets, random
from diffgan_fast.adversarial import GanLoss
from diffgan_fast.engine import FlatAdamW, Method, State, TrainConfig, distributed, evaluating, option, precision
from diffgan_fast.nets.mlp import SLOPE
from diffgan_fast.nets.stylegan2 import PathLength
from diffgan_fast.ops import r1_penalty

# of generator and critic
WIDTHS = {"dcgan": (64, 64), "sngan": (256, 128), "mlp": (128, 128), "stylegan2": (512, 512)}
PATH_EVERY = 4  # steps between path length penalties
SMALL = 64  # pixels up to which StyleGAN2 has two mapping layers, else eight, and a critic without skip connections

# Settings that both arms of a comparison have in common
PRESETS: dict[str, dict[str, Any]] = {
    # MNIST in github.com/csinva/gan-vae-pretrained-pytorch: 100 epochs, counted in images seen
    "dcgan": dict(steps=93750, batch_size=64, lr=2e-4, critic_lr=2e-4, z_dim=100, ema=0.0),
    # Miyato et al. 2018 on CIFAR-10, with one update of the critic a step where they have five
    "sngan": dict(network="sngan", gan_loss="hinge", z_dim=128, adam_beta1=0.0, adam_beta2=0.9, kimg=6400.0),
    # StyleGAN2 on CIFAR-10 in Wang et al. 2023: rates as lazy penalties scale them, 4/5 and 16/17 of 0.0025
    "stylegan2": dict(
        network="stylegan2", z_dim=512, lr=2e-3, critic_lr=2.353e-3, adam_beta1=0.0, adam_beta2=0.99, r1_gamma=0.01,
        ema=0.9999, flip=True, kimg=25_000.0,
    ),
}  # fmt: skip


@dataclass(kw_only=True)
class GeneratorConfig(TrainConfig):
    critic_scheduled = True
    PRESETS: ClassVar = PRESETS

    batch_size: int = option(64, "samples a step", low=1)
    lr: float = option(2e-4, "learning rate of the generator", low=0)
    critic_lr: float = option(2e-4, "learning rate of the critic", low=0)
    lr_schedule: Literal["constant", "cosine", "exponential"] = option(
        "constant", "learning rate of generator and critic over the run: cosine to 0, or exponential to a tenth"
    )
    adam_beta1: float = option(0.5, "decay of Adam's mean gradient, of both optimisers", low=0, high=1)
    adam_beta2: float = option(0.999, "decay of Adam's mean squared gradient, of both optimisers", low=0, high=1)
    network: Literal["auto", "dcgan", "sngan", "stylegan2", "mlp"] = option(
        "auto",
        "generator and critic: DCGAN's, SNGAN's residual ones, StyleGAN2's, or MLPs for points (auto: DCGAN or MLP)",
    )
    z_dim: int = option(100, "length of the latent z", low=1)
    width: int | None = option(
        None,
        "width of the generator's layers: DCGAN's before the last, 64; SNGAN's, 256; StyleGAN2's and its "
        "styles', 512; the MLP's, 128",
        low=1,
    )
    critic_width: int | None = option(
        None, "width of the critic's layers: DCGAN's first, 64; SNGAN's, 128; StyleGAN2's, 512; the MLP's, 128", low=1
    )
    layers: int = option(2, "hidden layers of the MLPs", low=1)
    critic_layers: int | None = option(None, "hidden layers of the critic's MLP (none: as the generator's)", low=1)
    critic_norm: Literal["batch", "layer", "none"] = option("batch", "norm in DCGAN's critic; R1 needs layer or none")
    gan_loss: GanLoss = option("nonsaturating", "loss of the critic and the generator")
    r1_gamma: float = option(0.0, "weight of the R1 penalty: gamma/2 E|grad D|^2 at real samples (0: none)", low=0)
    r1_every: int = option(16, "steps between R1 penalties, each of which counts for all of them", unit="steps", low=1)
    path_length: float = option(
        0.0, "weight of StyleGAN2's path length penalty, 2 in its code, in every fourth step (0: none)", low=0
    )
    style_mixing: float = option(
        0.0, "StyleGAN2: part of the batches whose styles come from two z, 0.9 in its paper", low=0, high=1
    )


class GeneratorMethod(Method):
    """Base of `gan` and `diffusion-gan`."""

    Config: ClassVar[type[TrainConfig]] = GeneratorConfig
    config: GeneratorConfig

    @property
    def averaged(self):
        return ("generator",)

    @property
    def kind(self) -> str:
        """The kind of network. ValueError if the data do not fit it."""
        points, chosen = len(self.shape) == 1, self.config.network
        if chosen == "auto":
            chosen = "mlp" if points else "dcgan"
        square = not points and self.shape[1] == self.shape[2]
        fits = points if chosen == "mlp" else square and self.shape[1] % 2 == 0 and self.shape[1] >= 8
        if not fits:
            needed = "points [N, D]" if chosen == "mlp" else "square images [N, C, S, S] of an even size, at least 8,"
            raise ValueError(
                f"data must be {needed} for method {self.name!r} with network={chosen!r}; got shape {list(self.shape)}"
            )
        return chosen

    @property
    def widths(self) -> tuple[int, int]:
        """Of the generator and the critic."""
        usual = WIDTHS[self.kind]
        return self.config.width or usual[0], self.config.critic_width or usual[1]

    def networks(self, given):
        c = self.config
        made = {
            "generator": given["generator"] if "generator" in given else self.make_generator(),
            "critic": given["critic"] if "critic" in given else self.make_critic(),
        }
        for name, value in (("path_length", c.path_length), ("style_mixing", c.style_mixing)):
            if value and not isinstance(made["generator"], nets.StyleGAN2Generator):
                raise ValueError(f"{name} must be 0 for a generator that is not StyleGAN2's; got {value}")
        return made | ({"path_length": PathLength()} if c.path_length else {})

    def make_generator(self) -> nn.Module:
        """A new generator for this data."""
        kind, width, z_dim = self.kind, self.widths[0], self.config.z_dim
        if kind == "mlp":
            return nets.MLPGenerator(self.shape[0], z_dim=z_dim, hidden=width, layers=self.config.layers)
        channels, size, _ = self.shape
        if kind == "sngan":
            return nets.SNGANGenerator(channels, size, z_dim=z_dim, width=width)
        if kind == "stylegan2":
            mapping, mixing = 2 if size <= SMALL else 8, self.config.style_mixing
            return nets.StyleGAN2Generator(
                channels, size, z_dim=z_dim, width=width, latent=width, mapping=mapping, style_mixing=mixing
            )
        return nets.DCGANGenerator(channels, size, z_dim=z_dim, width=width)

    def make_critic(self, inputs: tuple[str, ...] = ("x",)) -> nets.Critic:
        """A new critic for this data that sees `inputs`."""
        kind, width = self.kind, self.widths[1]
        if kind == "mlp":
            layers = self.config.critic_layers or self.config.layers
            return nets.MLPCritic(self.shape[0], width, layers, slope=SLOPE, inputs=inputs)
        channels, size, _ = self.shape
        if kind == "sngan":
            return nets.SNGANCritic(channels, size, width=width, inputs=inputs)
        if kind == "stylegan2":
            return nets.StyleGAN2Critic(channels, size, width=width, residual=size > SMALL, inputs=inputs)
        norm = None if self.config.critic_norm == "none" else self.config.critic_norm
        return nets.DCGANCritic(channels, size, width=width, norm=norm, inputs=inputs, init="dcgan")

    def optimizers(self, nets):
        c = self.config
        rates = {"generator": c.lr, "critic": c.critic_lr}
        return {name: FlatAdamW(nets[name], lr, (c.adam_beta1, c.adam_beta2)) for name, lr in rates.items()}

    def draw_z(self, n: int, key: random.Key, first_sample: int, device: torch.device, name: str = "z") -> torch.Tensor:
        """z ~ N(0, 1) for samples first_sample … first_sample + n: [n, z_dim]."""
        z_dim = self.config.z_dim
        return random.normal((n, z_dim), random.fold_in(key, name), first=first_sample * z_dim, device=device)

    def phase(self, step):
        """Whether the step has an R1 penalty, and whether it has one of path lengths."""
        c = self.config
        return c.r1_gamma > 0 and step % c.r1_every == 0, c.path_length > 0 and step % PATH_EVERY == 0

    def penalised(self, state: State, loss: torch.Tensor, critic: Callable, x0: torch.Tensor, **cond) -> torch.Tensor:
        """The critic's loss, with the R1 penalty at x0 where this step has one.

        One in `r1_every` steps has it, with as many times the weight (StyleGAN2: Karras et al. 2020, Appendix B).
        """
        c = self.config
        if not self.phase(state.step)[0]:
            return loss
        return loss + c.r1_every * c.r1_gamma / 2 * r1_penalty(critic, x0, **cond)

    def smoothed(self, state: State, loss: torch.Tensor, n: int, key: random.Key, first_sample: int) -> torch.Tensor:
        """The generator's loss, with the path length penalty where this step has one: as `penalised`.

        Samples of an even number are penalised, half of a batch, on z of their own (Karras et al. 2020, App. B).
        """
        if not self.phase(state.step)[1]:
            return loss
        generator, path, shape = state["generator"], cast(PathLength, state["path_length"]), (n, *self.shape)
        z = self.draw_z(n, key, first_sample, loss.device, "z of the path")
        noise_key, numbers = random.fold_in(key, "path"), math.prod(self.shape)
        noise = random.normal(shape, noise_key, first=first_sample * numbers, device=loss.device)
        even = slice(first_sample % 2 if n > 1 else 0, None, 2)
        with precision.full(loss.device):
            lengths = path(cast(nets.StyleGAN2Generator, generator), z[even], noise[even])
        penalty = (lengths - path.mean).square().mean()
        path.follow(distributed.mean(lengths.detach().mean()))
        return loss + PATH_EVERY * self.config.path_length * penalty

    def followed(self, state: State) -> dict[str, torch.Tensor]:
        """What is logged of the path lengths: their running mean, where they are penalised."""
        if "path_length" not in state.nets:
            return {}
        return {"path_length": cast(PathLength, state["path_length"]).mean.clone()}

    @torch.no_grad()
    def sample(self, state, n, key, *, first=0, ema=True, labels=None):
        if labels is not None:
            raise ValueError("labels must be None: this run's generator is told no class")
        net = state.sampling_net("generator", ema)
        z = self.draw_z(n, key, first, next(net.parameters()).device)
        with evaluating(net):
            x = net(z)
        return (x if len(self.shape) == 1 else x.clamp(-1, 1)).contiguous()
