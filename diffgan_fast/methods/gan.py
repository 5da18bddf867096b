"""A plain GAN (Goodfellow et al. 2014) of images or points: the baseline without diffusion, by default DCGAN.

Its trained critic can judge the images of other methods: `run.state["critic"]`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from diffgan_fast import random
from diffgan_fast.adversarial import GanLoss, critic_objective, generator_loss
from diffgan_fast.engine import Batch, State, frozen
from diffgan_fast.methods.generator import GeneratorConfig, GeneratorMethod


def losses(
    generator: Callable[[torch.Tensor], torch.Tensor],
    critic: Callable[[torch.Tensor], torch.Tensor],
    x0: torch.Tensor,
    z: torch.Tensor,
    *,
    gan_loss: GanLoss = "nonsaturating",
) -> tuple[torch.Tensor, Callable[[], torch.Tensor], tuple[torch.Tensor, torch.Tensor]]:
    """The two losses of a step from one run of the generator.

    Args:
        generator: samples of x0's shape from z.
        critic: logits [N] = critic(x).
        x0: images [N, C, H, W] in [-1, 1], or points [N, D].
        z: latents [N, z_dim], standard normal.

    Returns:
        (critic's loss, a function that gives the generator's loss, the logits of real and of fake samples). Call the
        function after the critic's update: it judges the same samples, with their graph, by the updated critic, and
        leaves the critic's gradients alone.
    """
    fake = generator(z).to(z.dtype)
    loss, on_real, on_fake = critic_objective(critic, x0, fake, gan_loss)

    def fooled() -> torch.Tensor:
        with frozen(critic):
            return generator_loss(critic(fake), gan_loss)

    return loss, fooled, (on_real, on_fake)


@dataclass(kw_only=True)
class GANConfig(GeneratorConfig):
    pass


class GAN(GeneratorMethod):
    name, help, Config = "gan", "a plain GAN of images or points, the baseline without diffusion", GANConfig
    config: GANConfig

    def step(self, state: State, batch: Batch, key: random.Key):
        generator, critic = state["generator"], state["critic"]
        z = self.draw_z(len(batch.x), key, batch.first_sample, batch.x.device)
        loss, fooled, (on_real, on_fake) = losses(generator, critic, batch.x, z, gan_loss=self.config.gan_loss)
        state.update("critic", self.penalised(state, loss, critic, batch.x))
        logged = {"critic_loss": loss, "generator_loss": fooled()}
        n, first = len(batch.x), batch.first_sample
        state.update("generator", self.smoothed(state, logged["generator_loss"], n, key, first))
        return (
            logged | self.followed(state) | {"real_logit": on_real.float().mean(), "fake_logit": on_fake.float().mean()}
        )
