"""Fine-tuning a denoiser with a critic that judges noise: what methods 3 and 3.5 share.

Source: "Exploring the Combination of Diffusion Models and Generative Adversarial Networks", §4.2. The critic tells the
true noise eps from the predicted noise eps_hat(x_t, t); the denoiser is trained to pass as true noise.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch

from diffgan_fast import nets, random
from diffgan_fast.adversarial import GanLoss, critic_loss, generator_loss
from diffgan_fast.engine import Batch, FlatAdamW, State, evaluating, option
from diffgan_fast.methods.diffusion import STUDENT, DiffusionConfig, DiffusionMethod, noise_levels, predicted_noise
from diffgan_fast.ops import add_noise
from diffgan_fast.schedule import Prediction, Schedule

BETAS = (0.5, 0.999)  # of both optimisers (Radford et al. 2016), as the source's code has them


def losses(
    denoiser: Callable[..., torch.Tensor],
    critic: Callable[..., torch.Tensor],
    x0: torch.Tensor,
    t: torch.Tensor,
    schedule: Schedule,
    key: int,
    *,
    prediction: Prediction = "eps",
    gan_loss: GanLoss = "nonsaturating",
    mse_weight: float = 0.0,
    first_sample: int = 0,
) -> tuple[torch.Tensor, Callable[[], torch.Tensor]]:
    """The two losses of a step from one run of the denoiser.

    Args:
        denoiser: its output at (x_t, t) is what `prediction` says; the critic sees the eps_hat that follows from it.
        critic: logits [N] = critic(eps, t=t, x_t=x_t); it takes of t and x_t what it wants.
        x0, t, schedule, key, first_sample: as for `ops.add_noise`; t in 1..T.
        mse_weight: weight of |eps_hat - eps|^2 in the denoiser's loss.

    Returns:
        (critic's loss, a function that gives the denoiser's loss). Call the function after the critic's update: it
        judges the same eps_hat, with its graph, by the updated critic.
    """
    x_t, eps = add_noise(x0, t, schedule, key, return_noise=True, first_sample=first_sample)
    eps_hat = predicted_noise(denoiser(x_t, t), x_t, t, schedule, prediction)
    loss = _critic_loss(critic, eps, eps_hat, t, x_t, gan_loss)
    return loss, lambda: _denoiser_loss(critic, eps, eps_hat, t, x_t, gan_loss, mse_weight)


def _critic_loss(critic, eps, eps_hat, t, x_t, gan_loss):
    # real and fake go in apart: in one batch, batch norm would mix their statistics
    return critic_loss(critic(eps, t=t, x_t=x_t), critic(eps_hat.detach(), t=t, x_t=x_t), gan_loss)


def _denoiser_loss(critic, eps, eps_hat, t, x_t, gan_loss, mse_weight):
    fooled = generator_loss(critic(eps_hat, t=t, x_t=x_t), gan_loss)
    return fooled + mse_weight * (eps_hat - eps).square().mean() if mse_weight else fooled


@dataclass(kw_only=True)
class NoiseCriticConfig(DiffusionConfig):
    PRESETS: ClassVar[dict[str, dict[str, Any]]] = {
        # 1 epoch of MNIST for the critic alone and 4 for both, at batch 128, counted in images seen
        "paper": dict(steps=2344, critic_steps=469, T=300, schedule="linear", ema=0.0),
        "student": dict(STUDENT, steps=2344, critic_steps=469, ema=0.0),
        # the notebook: 20 epochs, the denoiser from epoch 1 on, and run twice a step
        "as-coded": dict(STUDENT, steps=9380, critic_steps=469, ema=0.0, forwards="two"),
    }

    lr: float = option(1e-5, "learning rate of the denoiser", low=0)
    critic_lr: float = option(1e-4, "learning rate of the critic", low=0)
    critic_steps: int = option(400, "first steps, in which the critic trains alone", unit="steps", low=0)
    critic_init: Literal["default", "dcgan"] = option(
        "default", "initial weights of the critic: torch's, or N(0, 0.02)"
    )
    critic_width: int = option(64, "channels of the critic's first convolution", low=1)
    gan_loss: GanLoss = option("nonsaturating", "loss of the critic and the denoiser")
    mse_weight: float = option(0.0, "weight of the noise-prediction loss beside the adversarial one", low=0)
    inputs: Literal["eps", "eps,t", "eps,x_t", "eps,x_t,t"] = option("eps", "what the critic sees")
    forwards: Literal["one", "two"] = option(
        "one",
        "runs of the denoiser a step: one for both losses, or one each as in the source's code (eval mode for the "
        "critic)",
    )


class NoiseCritic(DiffusionMethod):
    """Base of methods 3 and 3.5."""

    Config = NoiseCriticConfig
    config: NoiseCriticConfig
    fine_tunes = True

    def networks(self, given):
        inputs = ("x", *(i for i in ("x_t", "t") if i in self.config.inputs.split(",")))
        if self.points:
            raise ValueError(
                f"data must be images [N, C, S, S] for method {self.name!r}, got points {list(self.shape)}"
            )
        channels, size, _ = self.shape
        critic = (
            given["critic"]
            if "critic" in given
            else nets.DCGANCritic(
                channels,
                size,
                width=self.config.critic_width,
                inputs=inputs,
                T=self.schedule.T,
                init=self.config.critic_init,
            )
        )
        return {"denoiser": given["denoiser"] if "denoiser" in given else self.make_denoiser(), "critic": critic}

    def optimizers(self, nets):
        return {
            "denoiser": FlatAdamW(nets["denoiser"], self.config.lr, BETAS),
            "critic": FlatAdamW(nets["critic"], self.config.critic_lr, BETAS),
        }

    def step(self, state: State, batch: Batch, key: int):
        c, x0, first = self.config, self.to_model(batch.x), batch.first_sample
        denoiser, critic = state["denoiser"], state["critic"]
        t = self.draw_t(len(x0), key, first, x0.device)
        x_t, eps = add_noise(x0, t, self.schedule, random.fold_in(key, "noise"), return_noise=True, first_sample=first)

        def predict():
            return predicted_noise(denoiser(x_t, t), x_t, t, self.schedule, c.prediction)

        joint = state.step >= c.critic_steps  # before that the critic trains alone

        if joint and c.forwards == "one":
            eps_hat = predict()
        else:
            with torch.no_grad(), evaluating(*([denoiser] if c.forwards == "two" else [])):
                eps_hat = predict()
        loss = _critic_loss(critic, eps, eps_hat, t, x_t, c.gan_loss)
        state.update("critic", loss)
        logged = {"critic_loss": loss}
        if joint:
            if c.forwards == "two":
                eps_hat = predict()
            loss = _denoiser_loss(critic, eps, eps_hat, t, x_t, c.gan_loss, c.mse_weight)
            state.update("denoiser", loss)
            logged["denoiser_loss"] = loss
        return logged

    def diagnose(self, state, batch, key):
        return noise_levels(self, state.sampling_net("denoiser"), self.to_model(batch.x), key)
