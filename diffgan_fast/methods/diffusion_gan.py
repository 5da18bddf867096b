"""Diffusion-GAN: a GAN whose critic sees real and fake samples through adaptive instance noise.

Source: Wang et al. 2023, "Diffusion-GAN: Training GANs with Diffusion", Algorithm 1. The critic minimises
-log D(y, t) - log(1 - D(y_g, t)) with y, y_g the noised x_0, G(z); the generator -log D(y_g, t), through the noise.
Our two steps share one run of the generator, where Algorithm 1 draws z again.

The published code (`variant="as-coded"`) trains the generator first, each network on a z of its own, draws a t for the
fake samples that is not that of the real ones, and tells the critic t itself, a raw integer.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, cast

import torch
from torch import nn

from diffgan_fast import nets, random
from diffgan_fast.adversarial import GanLoss, critic_objective, generator_loss
from diffgan_fast.engine import Batch, State, frozen, option
from diffgan_fast.instance_noise import AdaptiveDiffusion, Preset, Rebuilt, Variant
from diffgan_fast.methods.generator import GeneratorConfig, GeneratorMethod

JOINING = {"mlp": "plane", "stylegan2": "mapping"}  # how the authors' critics are told the level; others: "concat"
LEVEL_LAYERS: dict[str, Literal["spectral", "equalised"]] = {"sngan": "spectral", "stylegan2": "equalised"}


class BehindNoise(nn.Module):
    """A critic of clean samples: the noiser, then the critic of noisy ones, which is told t and its level."""

    def __init__(self, critic: Callable[..., torch.Tensor], diffusion: AdaptiveDiffusion):
        super().__init__()
        self.critic, self.diffusion = critic, diffusion

    def forward(self, x: torch.Tensor, t: torch.Tensor | None, key: random.Key, first_sample: int = 0) -> torch.Tensor:
        """The logits of x with noise of level t (None: drawn)."""
        y, t = self.diffusion(x, t, key, first_sample=first_sample)
        return self.critic(y, **self.told(t))

    def told(self, t: torch.Tensor) -> dict[str, torch.Tensor]:
        """What the critic is told of a noisy sample."""
        return {"t": t, "level": self.diffusion.level(t)}


def losses(
    generator: Callable[[torch.Tensor], torch.Tensor],
    critic: Callable[..., torch.Tensor],
    diffusion: AdaptiveDiffusion,
    x0: torch.Tensor,
    z: torch.Tensor,
    key: random.Key,
    *,
    gan_loss: GanLoss = "nonsaturating",
    first_sample: int = 0,
) -> tuple[torch.Tensor, Callable[[], torch.Tensor], tuple[torch.Tensor, torch.Tensor]]:
    """The two losses of a step from one run of the generator.

    Args:
        generator, x0, z: as for `gan.losses`.
        critic: logits [N] = critic(y, t=t, level=level) of noised samples; it takes of t and level what it wants.
        diffusion: the noiser. Hand it the logits of the real samples: `diffusion.update(logits)`.
        key: of the step.
        first_sample: number of the first sample in the global batch.

    Returns:
        (critic's loss, a function that gives the generator's loss, the logits of noised real and fake samples). The
        fake ones have the t of the real ones; the generator's loss draws new t. Call the function after the critic's
        update, as that of `gan.losses`.
    """
    judge, fake = BehindNoise(critic, diffusion), generator(z).to(z.dtype)
    loss, logits, _ = _critic_side(judge, x0, fake, key, gan_loss, first_sample, paired=True)
    return loss, lambda: _generator_side(judge, fake, key, gan_loss, first_sample), logits


def _critic_side(judge, x0, fake, key, gan_loss, first, paired):
    """(loss, logits of real and fake, t of the real samples)."""
    y, t = judge.diffusion(x0, None, random.fold_in(key, "real"), first_sample=first)
    y_fake, t_fake = judge.diffusion(
        fake.detach(), t if paired else None, random.fold_in(key, "fake"), first_sample=first
    )
    told = dict(cond=judge.told(t), fake_cond=judge.told(t_fake))
    loss, on_real, on_fake = critic_objective(judge.critic, y, y_fake, gan_loss, **told)
    return loss, (on_real, on_fake), t


def _generator_side(judge, fake, key, gan_loss, first):
    with frozen(judge):
        return generator_loss(judge(fake, None, random.fold_in(key, "generator"), first), gan_loss)


@dataclass(kw_only=True)
class DiffusionGANConfig(GeneratorConfig):
    PRESETS: ClassVar[dict[str, dict[str, Any]]] = GeneratorConfig.PRESETS | {
        "stylegan2": GeneratorConfig.PRESETS["stylegan2"] | {"noise": "pixel-priority"}  # Wang et al. 2023, Table 6
    }

    variant: Variant = option("paper", "what the paper says, or what its code does")
    noise: Preset = option("pixel-uniform", "the noise's settings, of which those below may differ")
    T_min: int | None = option(None, "least largest noise level T (none: as `noise` has it)", unit="steps", low=1)
    T_max: int | None = option(None, "greatest T; equal to T_min it keeps T fixed", unit="steps", low=1)
    mixing: Literal["auto", "uniform", "priority"] = option(
        "auto", "how noise levels up to T are drawn: all alike, or in proportion to t (auto: as `noise` has it)"
    )
    sigma: float | None = option(None, "standard deviation of the noise at its largest", low=0)
    noise_schedule: Rebuilt = option("rebuild", "whether T steps always reach the last beta, or are the first of T_max")
    d_target: float = option(
        0.6, "mean sign of the critic's outputs of real samples above which T grows", low=-1, high=1
    )
    threshold: float | None = option(
        None, "above it an output counts as positive (none: 0.5 for lsgan, else 0; with wgan T adapts only by a number)"
    )
    ada_kimg: float = option(100.0, "thousands of samples in which T can go through its whole range", low=1e-3)
    condition: Literal["auto", "none", "plane", "concat", "projection", "mapping"] = option(
        "auto",
        "how the critic is told the noise level: not, as a channel of its input, beside its features, by a projection "
        "of them, or by a mapping network (auto: plane for points, mapping for StyleGAN2, else concat; as coded "
        "mapping, for features none)",
    )


class DiffusionGAN(GeneratorMethod):
    name, help, Config = "diffusion-gan", "a GAN whose critic sees through adaptive noise", DiffusionGANConfig
    config: DiffusionGANConfig

    def networks(self, given):
        c = self.config
        usual = 0.5 if c.gan_loss == "lsgan" else 0.0  # the middle between what real and fake samples should get
        diffusion = AdaptiveDiffusion(
            c.noise,
            variant=c.variant,
            T_min=c.T_min,
            T_max=c.T_max,
            mixing=None if c.mixing == "auto" else c.mixing,
            sigma=c.sigma,
            schedule=c.noise_schedule,
            d_target=c.d_target,
            threshold=usual if c.threshold is None else c.threshold,
            ada_kimg=c.ada_kimg,
        )
        if c.gan_loss == "wgan" and c.threshold is None and diffusion.T_min < diffusion.T_max:
            raise ValueError(
                "threshold must be a number for gan_loss='wgan', whose critic has no output between real and fake, "
                "unless T_min is T_max; got None"
            )
        if "critic" in given and c.condition != "auto":
            raise ValueError(
                f"condition must be auto for a critic of your own, which is called critic(y, t=t, level=level) and "
                f"takes what it wants of them; got {c.condition!r}"
            )
        return super().networks(given) | {"diffusion": diffusion}

    def make_critic(self):
        kind, as_coded = self.config.condition, self.config.variant == "as-coded"
        by_channel = as_coded and self.config.noise == "feature"
        if kind == "auto":
            coded = "none" if by_channel else "mapping"
            kind = coded if as_coded else JOINING.get(self.kind, "concat")
        if by_channel and kind != "none":
            raise ValueError(
                f"condition must be auto or none where each channel has its own level, as with noise='feature' as "
                f"coded; got {kind!r}"
            )
        if as_coded and kind == "plane":
            raise ValueError(
                "condition must be auto, none, concat, projection or mapping as coded, where the critic is told t, "
                f"which no channel holds; got {kind!r}"
            )
        if kind in ("none", "plane"):
            return super().make_critic(("x",) if kind == "none" else ("x", "level"))
        plain = super().make_critic()
        features = nn.Sequential(*plain.main[:-1], nn.Flatten())
        layers = LEVEL_LAYERS.get(self.kind, "plain")
        dim = 512 if as_coded else 128
        return nets.LevelCritic(features, plain.features, kind, dim=dim, as_coded=as_coded, layers=layers)

    def step(self, state: State, batch: Batch, key: random.Key):
        generator, x0, first = state["generator"], batch.x, batch.first_sample
        diffusion = cast(AdaptiveDiffusion, state["diffusion"])
        judge, kind = BehindNoise(state["critic"], diffusion), self.config.gan_loss
        as_coded = self.config.variant == "as-coded"
        logged: dict[str, torch.Tensor] = {}

        def generate(name="z"):
            z = self.draw_z(len(x0), key, first, x0.device, name)
            return generator(z).to(z.dtype)

        def train_generator(fake):
            logged["generator_loss"] = _generator_side(judge, fake, key, kind, first)
            state.update("generator", self.smoothed(state, logged["generator_loss"], len(x0), key, first))

        fake = generate()
        if as_coded:
            train_generator(fake)
            with torch.no_grad():
                fake = generate("z of the critic")
        loss, (on_real, on_fake), t = _critic_side(judge, x0, fake, key, kind, first, paired=not as_coded)
        real_key = random.fold_in(key, "real")  # the noise that the critic has just seen
        state.update("critic", self.penalised(state, loss, judge, x0, t=t, key=real_key, first_sample=first))
        if not as_coded:
            train_generator(fake)
        logged |= self.followed(state) | {
            "critic_loss": loss,
            "real_logit": on_real.float().mean(),
            "fake_logit": on_fake.float().mean(),
        }
        logged |= {"p": diffusion.p.clone(), "T": diffusion.T.clone()}
        state.outside(lambda key: diffusion.update(on_real, random.fold_in(key, "levels")), key)
        return logged
