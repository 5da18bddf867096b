"""Denoising Diffusion GAN (Xiao, Kreis and Vahdat 2022): T = 2…8 large denoising steps, each made by a conditional GAN.

The true x_{t-1} given x_t of a large step has many modes, which no Gaussian follows. A generator with a latent z does:

    (x_{t-1}, x_t)   neighbours of the forward process, from x_0
    x̂_{t-1}          ~ q(x_{t-1} | x_t, x_0 = G(x_t, t, z)), z ~ N(0, I)
    critic           softplus(-D(x_{t-1}, x_t, t)) + softplus(D(x̂_{t-1}, x_t, t)), and every `lazy_reg`-th step
                     r1_gamma / 2 · |grad D|^2 in x_{t-1}: on average γ / lazy_reg, for the interval is no factor;
                     `critic_updates` times, each with t, pair, z and posterior of its own from the same x_0
    generator        softplus(-D(x̂_{t-1}, x_t, t)), with another t, pair and z from the same x_0

t is the noisier one's index, 1..T, here as everywhere; the authors' code counts by the cleaner one, 0..T - 1, and tells
its networks that number. It also back-propagates the critic's loss into the generator and throws the result away; here
the critic's step runs the generator without gradients.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import nn

from diffgan_fast import nets, random
from diffgan_fast.adversarial import GanLoss, critic_loss, generator_loss
from diffgan_fast.engine import Batch, FlatAdamW, Method, State, TrainConfig, evaluating, frozen, option
from diffgan_fast.nets import ddgan, ddgan_critic
from diffgan_fast.ops import add_noise, noise_pair, posterior_step, r1_penalty
from diffgan_fast.sampling import Predicts, check_predicts, generated_step, sample_posterior
from diffgan_fast.schedule import Schedule


def losses(
    generator: Callable[..., torch.Tensor],
    critic: Callable[..., torch.Tensor],
    x0: torch.Tensor,
    schedule: Schedule,
    key: random.Key,
    *,
    z_dim: int = 100,
    predicts: Predicts = "x0",
    r1_gamma: float = 0.0,
    gan_loss: GanLoss = "nonsaturating",
    first_sample: int = 0,
) -> tuple[torch.Tensor, Callable[[], torch.Tensor]]:
    """The two losses of a step, each with t, a pair and z of its own (Xiao et al. 2022, Eqs. 3-5).

    Args:
        generator: `generator(x_t, t, z)` -> what `predicts` says, like x_t; z [N, z_dim] standard normal.
        critic: logits [N] = critic(x_{t-1}, t=t, x_t=x_t).
        x0, first_sample: as for `ops.noise_pair`. z is of x0's type.
        schedule: t is uniform on 1..T.
        key: of the step. The critic's loss has the draws of `fold_in(key, "critic")`, the generator's those of
            `fold_in(key, "generator")`; of these again "t", "z", "pair" and "posterior".
        predicts: "x0", from which x̂_{t-1} is drawn, or "x_prev", x̂_{t-1} itself.
        r1_gamma: twice the weight of the R1 penalty in this step's critic loss (0: none).

    Returns:
        (critic's loss, a function that gives the generator's loss). Call the function after the critic's update. It
        leaves the critic's gradients alone, and the critic's loss has no graph through the generator.

    Raises: ValueError for an unknown `predicts` or `gan_loss`, and as `ops.noise_pair` and `ops.r1_penalty`.
    """
    check_predicts(predicts)
    n, first = len(x0), first_sample

    def judged(part: str) -> tuple[torch.Tensor, ...]:
        """t, x_{t-1}, x_t and x̂_{t-1}."""
        t_key, z_key, pair_key, posterior_key = (
            random.fold_in(key, part, name) for name in ("t", "z", "pair", "posterior")
        )
        t = 1 + random.randint(schedule.T, n, t_key, first=first, device=x0.device)
        z = random.normal((n, z_dim), z_key, first=first * z_dim, dtype=x0.dtype, device=x0.device)
        x_prev, x_t = noise_pair(x0, t, schedule, pair_key, first_sample=first)
        fake = generator(x_t, t, z).to(x_t.dtype)
        if predicts == "x0":
            fake = posterior_step(fake, x_t, t, schedule, posterior_key, first_sample=first)
        return t, x_prev, x_t, fake

    with torch.no_grad():
        t, x_prev, x_t, fake = judged("critic")
    loss = critic_loss(critic(x_prev, t=t, x_t=x_t), critic(fake, t=t, x_t=x_t), gan_loss)
    if r1_gamma:
        loss = loss + r1_gamma / 2 * r1_penalty(critic, x_prev, t=t, x_t=x_t)

    def fooled() -> torch.Tensor:
        t, _, x_t, fake = judged("generator")
        with frozen(critic):
            return generator_loss(critic(fake, t=t, x_t=x_t), gan_loss)

    return loss, fooled


# an epoch of the authors' is counted in images: 50,000 of CIFAR-10, 120,000 of LSUN Church, 30,000 of CelebA-HQ
_AUTHORS: dict[str, Any] = dict(adam_beta1=0.5, adam_beta2=0.9, lr_schedule="cosine")
_LARGE: dict[str, Any] = dict(_AUTHORS, network="256", critic_network="large", lazy_reg=10)


@dataclass(kw_only=True)
class DDGANConfig(TrainConfig):
    critic_scheduled = True
    PRESETS: ClassVar = {
        "cifar10": dict(
            _AUTHORS, network="cifar10", critic_network="small", steps=351_562, batch_size=256, lr=1.6e-4,
            critic_lr=1.25e-4, r1_gamma=0.02, lazy_reg=15, ema=0.9999, flip=True,
        ),
        "church256": dict(_LARGE, steps=937_500, batch_size=64, lr=1.6e-4, critic_lr=1e-4, r1_gamma=1.0, ema=0.999),
        "celeba256": dict(
            _LARGE, steps=750_000, batch_size=32, lr=2e-4, critic_lr=1e-4, r1_gamma=2.0, ema=0.9999, T=2, flip=True
        ),
        "mnist": dict(steps=20_000),
        "points": dict(
            _AUTHORS, steps=10_000, batch_size=256, lr=3e-4, critic_lr=3e-4, r1_gamma=0.02, lazy_reg=15, ema=0.995,
            z_dim=8,
        ),
    }  # fmt: skip
    batch_size: int = option(64, "samples a step; for the authors' critics at most 4, or a multiple of 4", low=1)
    lr: float = option(5e-4, "learning rate of the generator", low=0)
    lr_schedule: Literal["constant", "cosine", "exponential"] = option(
        "exponential", "learning rate of generator and critic over the run: cosine to 0, or exponential to a tenth"
    )
    T: int = option(4, "denoising steps", unit="steps", low=1)
    beta_min: float = option(0.1, "beta of the variance-preserving SDE at its beginning", low=0)
    beta_max: float = option(20.0, "beta of the variance-preserving SDE at its end", low=0)
    predicts: Predicts = option("x0", "what the generator makes of x_t: x0, or (an ablation) x_{t-1} at once")
    latent: bool = option(True, "the generator is told z (no: an ablation)")
    z_dim: int = option(100, "length of the latent z", low=1)
    network: Literal["auto", "8", "28", "cifar10", "256"] = option(
        "auto", "preset of the images' generator (auto: by their size)"
    )
    critic_network: Literal["auto", "dcgan", "8", "28", "small", "large"] = option(
        "auto", "preset of the images' critic, or DCGAN's, without norms (auto: that)"
    )
    width: int | None = option(
        None, "channels of the generator at full resolution, or width of the MLP (none: as the network has them)", low=1
    )
    critic_width: int | None = option(
        None, "channels of the first layer of DCGAN's critic, 64, or width of the critic of points, 256", low=1
    )
    critic_lr: float = option(2e-3, "learning rate of the critic; the authors' want 1e-4", low=0)
    critic_updates: int = option(1, "updates of the critic a step, each on new noise of the same samples", low=1)
    adam_beta1: float = option(0.0, "decay of Adam's mean gradient, of both optimisers", low=0, high=1)
    adam_beta2: float = option(0.99, "decay of Adam's mean squared gradient, of both optimisers", low=0, high=1)
    gan_loss: GanLoss = option("nonsaturating", "loss of the critic and the generator")
    r1_gamma: float = option(0.1, "gamma of the R1 penalty, which has weight gamma / 2 (0: none)", low=0)
    lazy_reg: int = option(4, "steps between those with R1 penalties, which it does not multiply", unit="steps", low=1)


class DDGAN(Method):
    name, help, Config = "ddgan", "Denoising Diffusion GAN: few large steps, each by a conditional GAN", DDGANConfig
    config: DDGANConfig
    sampling_options = ("steps",)

    def __init__(self, config: TrainConfig, shape: tuple[int, ...], num_classes: int = 0):
        super().__init__(config, shape, num_classes)
        self.schedule = Schedule.vp(self.config.T, self.config.beta_min, self.config.beta_max)

    @property
    def averaged(self):
        return ("generator",)

    def networks(self, given):
        points = len(self.shape) == 1
        return {
            "generator": given["generator"] if "generator" in given else self._generator(points),
            "critic": given["critic"] if "critic" in given else self._critic(points),
        }

    def _generator(self, points: bool) -> nn.Module:
        c, told = self.config, dict[str, Any](T=self.config.T, z_dim=self.config.z_dim)
        if points:
            return nets.DDGANPointGenerator(self.shape[0], c.width or 256, **told)
        if c.width is not None:
            told["width"] = c.width
        channels, size = self._square()
        preset = ddgan.BY_SIZE.get(size) if c.network == "auto" else c.network
        self._fitting("network", preset, ddgan.fitting(size))
        return nets.DDGANGenerator(channels, size, preset=preset, bounded=c.predicts == "x0", **told)

    def _critic(self, points: bool) -> nn.Module:
        c, told = self.config, dict[str, Any](inputs=("x", "x_t", "t"), T=self.config.T)
        if points:
            return nets.MLPCritic(self.shape[0], c.critic_width or 256, **told)
        channels, size = self._square()
        if c.critic_network in ("auto", "dcgan"):
            width = c.critic_width or 64
            return nets.DCGANCritic(channels, size, width=width, depth=2, norm=None, init="he", **told)
        self._fitting("critic_network", c.critic_network, ["auto", "dcgan", *ddgan_critic.fitting(size)])
        if c.critic_width is not None:
            raise ValueError(
                f"critic_width must be None for the authors' critic {c.critic_network!r}, got {c.critic_width}"
            )
        return nets.DDGANCritic(channels, size, T=c.T, preset=c.critic_network)

    def _square(self) -> tuple[int, int]:
        """The images' channels and size. ValueError if they are not square, for which there is no network here."""
        channels, size, width = self.shape
        if size != width:
            raise ValueError(f"data must be square images or points for method {self.name!r}, got {list(self.shape)}")
        return channels, size

    def _fitting(self, name: str, preset: str | None, fitting: list[str]) -> None:
        """ValueError if the preset that option `name` says, or leaves to the images' size, is none of the fitting."""
        if preset not in fitting:
            known = f"must be one of {', '.join(fitting)}" if fitting else "has none"
            raise ValueError(
                f"{name} {known} for images of {self.shape[1]} pixels; got {getattr(self.config, name)!r} (or pass a "
                "network of your own, or images of another size)"
            )

    def optimizers(self, nets):
        c = self.config
        rates = {"generator": c.lr, "critic": c.critic_lr}
        return {name: FlatAdamW(nets[name], lr, (c.adam_beta1, c.adam_beta2)) for name, lr in rates.items()}

    def generate(self, generator: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
        """The generator as it is told z, or zeros in its place in the ablation without a latent."""
        return generator if self.config.latent else lambda x, t, z: generator(x, t, torch.zeros_like(z))

    def phase(self, step):
        """Whether the step has a penalty."""
        return self.config.r1_gamma > 0 and step % self.config.lazy_reg == 0

    def step(self, state: State, batch: Batch, key: random.Key):
        c = self.config
        for i in range(c.critic_updates):
            loss, fooled = losses(
                self.generate(state["generator"]),
                state["critic"],
                batch.x,
                self.schedule,
                random.fold_in(key, i) if i else key,
                z_dim=c.z_dim,
                predicts=c.predicts,
                r1_gamma=c.r1_gamma if self.phase(state.step) else 0.0,
                gan_loss=c.gan_loss,
                first_sample=batch.first_sample,
            )
            state.update("critic", loss)
        logged = {"critic_loss": loss, "generator_loss": fooled()}
        state.update("generator", logged["generator_loss"])
        return logged

    @property
    def _drawn(self) -> dict[str, Any]:
        return {"z_dim": self.config.z_dim, "predicts": self.config.predicts}

    @torch.no_grad()
    def denoise(self, state: State, x_t: torch.Tensor, t: int, key: int) -> torch.Tensor:
        """x_{t-1} [N, …] from x_t [N, …] by the averaged generator, with the latents and noise of `key`."""
        net = state.sampling_net("generator")
        with evaluating(net):
            return generated_step(self.generate(net), x_t, t, self.schedule, key, **self._drawn)

    def sample(self, state, n, key, *, first=0, ema=True, labels=None, steps=None, on_step=None):
        if labels is not None:
            raise ValueError("labels must be None: this run's generator is told no class")
        if steps not in (None, self.config.T):
            raise ValueError(
                f"steps must be {self.config.T}, for which this run's generator was trained; got {steps!r}"
            )
        net = state.sampling_net("generator", ema)
        place = dict(device=next(net.parameters()).device, channels_last=self.config.channels_last)
        with evaluating(net):
            x = sample_posterior(
                self.generate(net),
                (n, *self.shape),
                self.schedule,
                key,
                first_sample=first,
                on_step=on_step,
                **self._drawn,
                **place,
            )
        return self._shown(x).contiguous()

    def _shown(self, x: torch.Tensor) -> torch.Tensor:
        """Images clamped to [-1, 1]; points as they are."""
        return x if x.dim() == 2 else x.clamp(-1, 1)

    def strips(self, state, x, key):
        noised = [(t, self._shown(add_noise(x, t, self.schedule, key)).cpu()) for t in range(self.schedule.T + 1)]
        seen = []
        self.sample(state, len(x), key, on_step=lambda t, x: seen.append((t, self._shown(x).cpu())))
        return {"noising": noised, "denoising": seen}
