"""Fine-tuning a denoiser through its whole denoising chain by a critic of images: what methods 1 and 2 share.

Source: "Exploring the Combination of Diffusion Models and Generative Adversarial Networks", §4.2. The denoiser is
trained so that x_0, drawn step by step from noise, passes as real. The source's code differentiates its T = 300 steps
with plain autograd, which takes 13.9 GiB at batch 10; here `denoise_chain` recomputes them.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, Literal

import torch

from diffgan_fast import nets, random
from diffgan_fast.adversarial import GanLoss, critic_loss, generator_loss
from diffgan_fast.chain import denoise_chain
from diffgan_fast.engine import Batch, FlatAdamW, State, evaluating, frozen, option
from diffgan_fast.methods.diffusion import STUDENT, DiffusionConfig, DiffusionMethod
from diffgan_fast.sampling import first_noise
from diffgan_fast.schedule import Schedule

# the notebook: batches of ten, images clamped before the critic sees them, batch norm in train mode
AS_CODED: dict[str, Any] = dict(STUDENT, batch_size=10, judged="clamped", chain_mode="train")


def losses(
    denoiser: Callable[..., torch.Tensor],
    critic: Callable[[torch.Tensor], torch.Tensor],
    real: torch.Tensor,
    schedule: Schedule,
    key: random.Key,
    *,
    to_image: Callable[[torch.Tensor], torch.Tensor] = lambda x: x,
    gan_loss: GanLoss = "nonsaturating",
    first_sample: int = 0,
    **chain: Any,
) -> tuple[torch.Tensor, Callable[[], torch.Tensor]]:
    """The two losses of a step from one run of the chain. Method 1 uses the second alone.

    Args:
        denoiser, schedule, key, first_sample: as for `denoise_chain`; x_T is `sampling.first_noise` of the key.
        critic: logits [N] = critic(x).
        real: images [N, C, H, W] as the critic sees them.
        to_image: what the critic sees of x_0.
        chain: recompute=, grad_steps=, cond=, … of `denoise_chain`.

    Returns:
        (critic's loss, a function that gives the denoiser's loss). Call the function after the critic's update: it
        judges the same images, with their graph, by the updated critic.
    """
    fake = _generate(denoiser, real, schedule, key, to_image, first_sample, chain)
    return _critic_loss(critic, real, fake, gan_loss), lambda: _denoiser_loss(critic, fake, gan_loss)


def _generate(denoiser, like, schedule, key, to_image, first_sample, chain):
    x_T = first_noise(like.shape, key, first_sample=first_sample, device=like.device)
    if like.is_contiguous(memory_format=torch.channels_last):
        x_T = x_T.contiguous(memory_format=torch.channels_last)
    return to_image(denoise_chain(denoiser, x_T, schedule, key, first_sample=first_sample, **chain))


def _critic_loss(critic, real, fake, gan_loss):
    # real and fake go in apart: in one batch, batch norm would mix their statistics
    return critic_loss(critic(real), critic(fake.detach()), gan_loss)


def _denoiser_loss(critic, fake, gan_loss):
    with frozen(critic):
        return generator_loss(critic(fake), gan_loss)


@dataclass(kw_only=True)
class ImageCriticConfig(DiffusionConfig):
    steps: int = option(200, "training steps", low=0)
    lr: float = option(1e-5, "learning rate of the denoiser", low=0)
    adam_beta1: float = option(0.5, "decay of Adam's mean gradient", low=0, high=1)
    ema: float = option(0.0, "decay of the averaged weights that sampling uses (0: none)", low=0, high=1)
    log_every: int = option(10, "steps between rows of metrics.jsonl", unit="steps", low=1)
    checkpoint_every: int = option(50, "steps between checkpoints (0: only at the end)", unit="steps", low=0)
    sample_every: int = option(0, "steps between sample grids (0: only at the end)", unit="steps", low=0)
    critic_start: Literal["pretrained", "scratch"] = option(
        "pretrained", "the critic's initial weights: those of a `gan` (trained first unless given), or DCGAN's"
    )
    critic_width: int = option(64, "channels of the critic's first convolution", low=1)
    gan_loss: GanLoss = option("nonsaturating", "loss of the critic and the denoiser")
    recompute: Literal["step", "none"] | int = option(
        "step",
        "what the backward pass recomputes: each step once, nothing (plain autograd), or k: every k-th state is kept, "
        "and each step recomputed twice",
        low=1,
    )
    grad_steps: int | None = option(
        None, "last steps of the chain that carry gradients (none: all)", unit="steps", low=1
    )
    judged: Literal["raw", "clamped"] = option(
        "raw", "what the critic sees: x_0, or x_0 clamped to the images' range, where saturated pixels pass no gradient"
    )
    chain_clip_x0: bool = option(
        False, "clamp the reconstruction within the trained chain too, where saturated pixels pass no gradient"
    )
    chain_mode: Literal["eval", "train"] = option(
        "eval", "mode of the denoiser in the trained chain: eval as in sampling, or train (batch norm by the batch)"
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        steps = self.sample_steps or self.T
        if self.grad_steps is not None and self.grad_steps > steps:
            raise ValueError(f"grad_steps must be in 1..{steps}, the steps of the chain; got {self.grad_steps}")


class ImageCritic(DiffusionMethod):
    """Base of methods 1 and 2."""

    Config = ImageCriticConfig
    config: ImageCriticConfig
    fine_tunes = True

    @classmethod
    def pretrained_critic(cls, config):
        return "gan" if config.critic_start == "pretrained" else None

    def networks(self, given):
        size = self.image_size()
        return {
            "denoiser": given["denoiser"] if "denoiser" in given else self.make_denoiser(),
            "critic": given["critic"]
            if "critic" in given
            else nets.DCGANCritic(*size, width=self.config.critic_width, init="dcgan"),
        }

    def denoiser_optimizer(self, denoiser) -> FlatAdamW:
        return FlatAdamW(denoiser, self.config.lr, (self.config.adam_beta1, 0.999))

    def generate(self, state: State, batch: Batch, key: random.Key) -> torch.Tensor:
        """Images [N, C, H, W] as the critic sees them, made by the chain, as many as the batch has."""
        c, denoiser = self.config, state["denoiser"]
        options = {**self.reverse(state), **self.guidance(batch.labels), "clip_x0": c.clip_x0 and c.chain_clip_x0}
        options |= dict(recompute=c.recompute, grad_steps=c.grad_steps)
        with evaluating(denoiser) if c.chain_mode == "eval" else nullcontext():
            return _generate(denoiser, batch.x, self.schedule, key, self._to_image, batch.first_sample, options)

    def _to_image(self, x: torch.Tensor) -> torch.Tensor:
        image = x if self.config.data_range == "signed" else x * 2 - 1
        return image if self.config.judged == "raw" else image.clamp(-1, 1)
