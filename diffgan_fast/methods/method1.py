"""Method 1: fine-tune a denoiser through its whole chain by a critic that stays as it is.

Source: "Exploring the Combination of Diffusion Models and Generative Adversarial Networks", §4.2. The critic, trained
beforehand against a GAN, is soon fooled: it does not learn.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from diffgan_fast.engine import evaluating, option
from diffgan_fast.methods.diffusion import STUDENT
from diffgan_fast.methods.image_critic import AS_CODED, ImageCritic, ImageCriticConfig, _denoiser_loss, losses

__all__ = ["Method1", "losses"]


@dataclass(kw_only=True)
class Method1Config(ImageCriticConfig):
    PRESETS: ClassVar = {
        "student": STUDENT,
        "as-coded": dict(AS_CODED, steps=10, lr=1e-4, adam_beta1=0.9),
    }
    steps: int = option(10, "training steps", low=0)
    lr: float = option(1e-4, "learning rate of the denoiser", low=0)
    adam_beta1: float = option(0.9, "decay of Adam's mean gradient", low=0, high=1)


class Method1(ImageCritic):
    name, help = "method1", "fine-tune a denoiser through its whole chain, by a fixed critic of images"
    Config = Method1Config

    def optimizers(self, nets):
        return {"denoiser": self.denoiser_optimizer(nets["denoiser"])}

    def step(self, state, batch, key):
        with evaluating(state["critic"]):
            loss = _denoiser_loss(state["critic"], self.generate(state, batch, key), self.config.gan_loss)
        state.update("denoiser", loss)
        return {"denoiser_loss": loss}
