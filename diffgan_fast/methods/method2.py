"""Method 2: fine-tune a denoiser through its whole chain, by a critic of images that is trained along.

Source: "Exploring the Combination of Diffusion Models and Generative Adversarial Networks", §4.2. One run of the chain
serves both updates: the critic's, on x_0 without its graph, and then the denoiser's, by the updated critic. (The
source's code runs the chain twice a step.)
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from diffgan_fast.engine import FlatAdamW, option
from diffgan_fast.methods.diffusion import STUDENT
from diffgan_fast.methods.image_critic import (
    AS_CODED,
    ImageCritic,
    ImageCriticConfig,
    _critic_loss,
    _denoiser_loss,
    losses,
)

__all__ = ["Method2", "losses"]


@dataclass(kw_only=True)
class Method2Config(ImageCriticConfig):
    PRESETS: ClassVar = {
        "student": STUDENT,
        "as-coded": dict(AS_CODED, steps=50),
    }
    critic_lr: float = option(1e-5, "learning rate of the critic", low=0)


class Method2(ImageCritic):
    name, help = "method2", "fine-tune a denoiser through its whole chain, with its critic of images"
    Config = Method2Config
    config: Method2Config

    def optimizers(self, nets):
        critic = FlatAdamW(nets["critic"], self.config.critic_lr, (self.config.adam_beta1, 0.999))
        return {"denoiser": self.denoiser_optimizer(nets["denoiser"]), "critic": critic}

    def step(self, state, batch, key):
        critic, kind = state["critic"], self.config.gan_loss
        fake = self.generate(state, batch, key)
        logged = {"critic_loss": _critic_loss(critic, batch.x, fake, kind)}
        state.update("critic", logged["critic_loss"])
        logged["denoiser_loss"] = _denoiser_loss(critic, fake, kind)
        state.update("denoiser", logged["denoiser_loss"])
        return logged
