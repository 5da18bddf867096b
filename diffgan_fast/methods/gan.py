"""DCGAN (Radford, Metz and Chintala 2016): a generator and a critic of images. The baseline without diffusion.

Its trained critic can judge the images of other methods: `run.state["critic"]`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch

from diffgan_fast import nets, random
from diffgan_fast.adversarial import GanLoss, critic_loss, generator_loss
from diffgan_fast.engine import Batch, FlatAdamW, Method, State, TrainConfig, evaluating, frozen, option

BETAS = (0.5, 0.999)  # of both optimisers (Radford et al. 2016, §4)


def losses(
    generator: Callable[[torch.Tensor], torch.Tensor],
    critic: Callable[[torch.Tensor], torch.Tensor],
    x0: torch.Tensor,
    z: torch.Tensor,
    *,
    gan_loss: GanLoss = "nonsaturating",
) -> tuple[torch.Tensor, Callable[[], torch.Tensor]]:
    """The two losses of a step from one run of the generator.

    Args:
        generator: images of x0's shape from z.
        critic: logits [N] = critic(x).
        x0: images [N, C, H, W] in [-1, 1].
        z: latents [N, z_dim], standard normal.

    Returns:
        (critic's loss, a function that gives the generator's loss). Call the function after the critic's update: it
        judges the same images, with their graph, by the updated critic, and leaves the critic's gradients alone.
    """
    fake = generator(z)
    # real and fake go in apart: in one batch, batch norm would mix their statistics
    loss = critic_loss(critic(x0), critic(fake.detach()), gan_loss)

    def fooled() -> torch.Tensor:
        with frozen(critic):
            return generator_loss(critic(fake), gan_loss)

    return loss, fooled


@dataclass(kw_only=True)
class GANConfig(TrainConfig):
    PRESETS: ClassVar = {
        # MNIST in github.com/csinva/gan-vae-pretrained-pytorch: 100 epochs, counted in images seen
        "dcgan": dict(steps=93750, batch_size=64, lr=2e-4, critic_lr=2e-4, z_dim=100, ema=0.0),
    }
    batch_size: int = option(64, "samples a step", low=1)
    critic_lr: float = option(2e-4, "learning rate of the critic, constant", low=0)
    z_dim: int = option(100, "length of the latent z", low=1)
    width: int = option(64, "channels of the generator before its last layer", low=1)
    critic_width: int = option(64, "channels of the critic's first convolution", low=1)
    gan_loss: GanLoss = option("nonsaturating", "loss of the critic and the generator")


class GAN(Method):
    name, help, Config = "gan", "DCGAN: a plain GAN of images, the baseline without diffusion", GANConfig
    config: GANConfig

    @property
    def averaged(self):
        return ("generator",)

    def networks(self, given):
        c = self.config
        if len(self.shape) == 1 or self.shape[1] != self.shape[2] or self.shape[1] % 2 or self.shape[1] < 8:
            raise ValueError(
                f"data must be square images [N, C, S, S] of an even size, at least 8, for method {self.name!r}; "
                f"got shape {list(self.shape)}"
            )
        channels, size, _ = self.shape
        return {
            "generator": given["generator"]
            if "generator" in given
            else nets.DCGANGenerator(channels, size, z_dim=c.z_dim, width=c.width),
            "critic": given["critic"]
            if "critic" in given
            else nets.DCGANCritic(channels, size, width=c.critic_width, init="dcgan"),
        }

    def optimizers(self, nets):
        return {
            "generator": FlatAdamW(nets["generator"], self.config.lr, BETAS),
            "critic": FlatAdamW(nets["critic"], self.config.critic_lr, BETAS),
        }

    def draw_z(self, n: int, key: int, first_sample: int, device: torch.device) -> torch.Tensor:
        """z ~ N(0, 1) for samples first_sample … first_sample + n: [n, z_dim]."""
        z_dim = self.config.z_dim
        return random.normal((n, z_dim), random.fold_in(key, "z"), first=first_sample * z_dim, device=device)

    def step(self, state: State, batch: Batch, key: int):
        z = self.draw_z(len(batch.x), key, batch.first_sample, batch.x.device)
        loss, fooled = losses(state["generator"], state["critic"], batch.x, z, gan_loss=self.config.gan_loss)
        state.update("critic", loss)
        logged = {"critic_loss": loss, "generator_loss": fooled()}
        state.update("generator", logged["generator_loss"])
        return logged

    @torch.no_grad()
    def sample(self, state, n, key, *, first=0, ema=True, labels=None):
        if labels is not None:
            raise ValueError("labels must be None: this run's generator is told no class")
        net = state.sampling_net("generator", ema)
        z = self.draw_z(n, key, first, next(net.parameters()).device)
        with evaluating(net):
            return net(z).clamp(-1, 1).contiguous()
