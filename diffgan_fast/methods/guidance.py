"""Discriminator guidance (Kim et al. 2023): the denoiser stays, and a critic of noisy images corrects its samples.

A critic learns to tell noised real images from noised samples of the denoiser, at every t. At its optimum its logit is
log p_t(x) / q_t(x), of data over model, and eps' = eps_hat - w sqrt(1 - abar_t) grad_x logit is with w = 1 the noise
prediction of the data's own score. "Exploring the Combination of Diffusion Models and Generative Adversarial Networks",
§4.4.3, tried it too; its code had real and generated images in different ranges and added the gradient unscaled.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal

import torch
from safetensors.torch import load_file, save

from diffgan_fast import files, nets, random
from diffgan_fast.adversarial import critic_loss
from diffgan_fast.engine import Batch, FlatAdamW, State, distributed, option
from diffgan_fast.methods.diffusion import STUDENT, DiffusionConfig, DiffusionMethod
from diffgan_fast.ops import add_noise
from diffgan_fast.schedule import Schedule


def losses(
    critic: Callable[..., torch.Tensor],
    real: torch.Tensor,
    fake: torch.Tensor,
    t: torch.Tensor,
    schedule: Schedule,
    key: random.Key,
    *,
    first_sample: int = 0,
) -> torch.Tensor:
    """The critic's loss, binary cross-entropy of noised real against noised generated data: a scalar (Kim et al.).

    Args:
        critic: logits [N] = critic(x_t, t=t).
        real, fake: [N, …] data in the denoiser's range; both are noised to the same t, with noise of their own.
        t, schedule, first_sample: as for `ops.add_noise`.
        key: the noise is of `fold_in(key, "real")` and `fold_in(key, "fake")`.
    """
    on_real, on_fake = (
        critic(add_noise(x, t, schedule, random.fold_in(key, name), first_sample=first_sample), t=t)
        for name, x in (("real", real), ("fake", fake))
    )
    return critic_loss(on_real, on_fake)


@dataclass(kw_only=True)
class GuidanceConfig(DiffusionConfig):
    PRESETS: ClassVar = {
        # the paper's CIFAR-10: 60 epochs of 50,000 real and as many generated images, w = 2 without classes
        "paper": dict(steps=46_875, fakes=50_000, guidance_weight=2.0),
        # the source document's settings, without the faults of its code
        "student": dict(STUDENT, steps=3906, lr=2e-4, guidance_weight=1.5),
    }
    lr: float = option(3e-4, "learning rate of the critic", low=0)
    ema: float = option(0.0, "the critic is not averaged", low=0, high=0)
    lr_schedule: Literal["constant"] = option("constant", "the critic's learning rate is constant")  # type: ignore[assignment]
    warmup: int = option(0, "the critic's learning rate does not rise", unit="steps", low=0, high=0)
    clip_grad: float = option(0.0, "the critic's gradient is not limited", low=0, high=0)
    fakes: int = option(5000, "samples of the denoiser that the critic learns from, drawn once", low=1)
    critic_width: int = option(64, "channels of the critic's first convolution", low=1)
    guidance_weight: float = option(1.0, "w, the weight of the critic's gradient in sampling", low=0)
    guide_from: float = option(0.01, "share of T below which the critic does not guide", low=0, high=1)


class DiscriminatorGuidance(DiffusionMethod):
    name, help = "discriminator-guidance", "leave the denoiser, and correct its samples by a critic of noisy images"
    Config = GuidanceConfig
    config: GuidanceConfig
    fine_tunes = True
    sampling_options = (*DiffusionMethod.sampling_options, "logit_scale", "logit_from")

    @property
    def averaged(self):
        return ()

    def networks(self, given):
        # layer norm: a gradient in x must not depend on the other samples
        return {
            "denoiser": given["denoiser"] if "denoiser" in given else self.make_denoiser(),
            "critic": given["critic"]
            if "critic" in given
            else nets.DCGANCritic(
                *self.image_size(), width=self.config.critic_width, norm="layer", inputs=("x", "t"), T=self.schedule.T
            ),
        }

    def reverse(self, state):
        c = self.config
        critic = dict(critic=state["critic"], logit_scale=c.guidance_weight)
        return super().reverse(state) | critic | {"logit_from": max(1, math.ceil(round(c.guide_from * c.T, 6)))}

    def optimizers(self, nets):
        return {"critic": FlatAdamW(nets["critic"], self.config.lr)}

    def prepare(self, state: State, key: int, folder: Path) -> None:
        """Draws the samples that the critic learns from, or finds them in the run's folder."""
        path, plain, part = folder / "fakes.safetensors", super().reverse(state), distributed.part(self.config.fakes)

        def draw() -> list[torch.Tensor]:
            sizes = {i: min(500, part.stop - i) for i in range(part.start, part.stop, 500)}
            return [self.draw(state, n, key, plain, first=i).cpu() for i, n in sizes.items()]

        if not distributed.from_main(path.exists):
            drawn = distributed.gather(draw)
            distributed.from_main(lambda: files.write(path, save({"samples": torch.cat(sum(drawn, []))})))
        self._fakes = load_file(path)["samples"].to(next(state["denoiser"].parameters()).device)

    def step(self, state: State, batch: Batch, key: random.Key):
        real, first = self.to_model(batch.x), batch.first_sample
        chosen = random.randint(
            len(self._fakes), len(real), random.fold_in(key, "fakes"), first=first, device=real.device
        )
        fake = self.to_model(self._fakes[chosen])
        t = self.draw_t(len(real), key, first, real.device)
        loss = losses(state["critic"], real, fake, t, self.schedule, key, first_sample=first)
        state.update("critic", loss)
        return {"critic_loss": loss}
