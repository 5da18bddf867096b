"""Fine-tuning a denoiser with a critic that judges noise: what methods 3, 3.5 and 4 share.

Source: "Exploring the Combination of Diffusion Models and Generative Adversarial Networks", §4.2. The critic tells the
true noise eps from the predicted noise eps_hat(x_t, t), or what follows from each; the denoiser is trained to pass.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch

from diffgan_fast import nets, random
from diffgan_fast.adversarial import GanLoss, critic_loss, generator_loss
from diffgan_fast.engine import Batch, FlatAdamW, State, TrainConfig, evaluating, frozen, option
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
    key: random.Key,
    *,
    cond: Mapping[str, Any] | None = None,
    prediction: Prediction = "eps",
    gan_loss: GanLoss = "nonsaturating",
    mse_weight: float = 0.0,
    first_sample: int = 0,
    shown: Callable[[torch.Tensor, torch.Tensor], torch.Tensor] = lambda eps, x_t: eps,
) -> tuple[torch.Tensor, Callable[[], torch.Tensor]]:
    """The two losses of a step from one run of the denoiser.

    Args:
        denoiser: its output at (x_t, t) is what `prediction` says; the critic sees the eps_hat that follows from it.
        critic: logits [N] = critic(shown(eps, x_t), t=t, x_t=x_t); it takes of t and x_t what it wants.
        x0, t, schedule, key, first_sample: as for `ops.add_noise`; t in 1..T.
        cond: what else the denoiser takes, by name.
        mse_weight: weight of |eps_hat - eps|^2 in the denoiser's loss.
        shown: what the critic sees of a noise, by default the noise itself.

    Returns:
        (critic's loss, a function that gives the denoiser's loss). Call the function after the critic's update: it
        judges the same eps_hat, with its graph, by the updated critic, and leaves the critic's gradients alone.
    """
    x_t, eps = add_noise(x0, t, schedule, key, return_noise=True, first_sample=first_sample)
    eps_hat = predicted_noise(denoiser(x_t, t, **(cond or {})), x_t, t, schedule, prediction)
    fake = shown(eps_hat, x_t)
    loss = _critic_loss(critic, shown(eps, x_t), fake, t, x_t, gan_loss)
    return loss, lambda: _denoiser_loss(critic, fake, t, x_t, gan_loss, eps, eps_hat, mse_weight)


def _critic_loss(critic, real, fake, t, x_t, gan_loss):
    # real and fake go in apart: in one batch, batch norm would mix their statistics
    return critic_loss(critic(real, t=t, x_t=x_t), critic(fake.detach(), t=t, x_t=x_t), gan_loss)


def _denoiser_loss(critic, fake, t, x_t, gan_loss, eps, eps_hat, mse_weight):
    with frozen(critic):
        fooled = generator_loss(critic(fake, t=t, x_t=x_t), gan_loss)
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
    critic_depth: int = option(1, "convolutions of the critic at each resolution", low=1)
    gan_loss: GanLoss = option("nonsaturating", "loss of the critic and the denoiser")
    mse_weight: float = option(0.0, "weight of the noise-prediction loss beside the adversarial one", low=0)
    inputs: Literal["eps", "eps,t", "eps,x_t", "eps,x_t,t"] = option("eps", "what the critic sees")
    forwards: Literal["one", "two"] = option(
        "one",
        "runs of the denoiser a step: one for both losses, or one each as in the source's code (eval mode for the "
        "critic)",
    )


class NoiseCritic(DiffusionMethod):
    """Base of methods 3, 3.5 and 4."""

    Config: ClassVar[type[TrainConfig]] = NoiseCriticConfig
    config: NoiseCriticConfig
    fine_tunes = True

    def networks(self, given):
        return {
            "denoiser": given["denoiser"] if "denoiser" in given else self.make_denoiser(),
            "critic": given["critic"] if "critic" in given else self.make_critic(),
        }

    def make_critic(self) -> nets.DCGANCritic:
        c = self.config
        inputs = ("x", *(i for i in ("x_t", "t") if i in c.inputs.split(",")))
        return nets.DCGANCritic(
            *self.image_size(),
            width=c.critic_width,
            depth=c.critic_depth,
            inputs=inputs,
            T=self.schedule.T,
            init=c.critic_init,
        )

    def shown(self, eps: torch.Tensor, x_t: torch.Tensor, t: torch.Tensor, key: random.Key, first: int) -> torch.Tensor:
        """What the critic sees of a noise: the noise itself."""
        return eps

    def phase(self, step):
        """Whether the critic is trained, and whether the denoiser is: at first the critic trains alone."""
        return True, step >= self.config.critic_steps

    def optimizers(self, nets):
        return {
            "denoiser": FlatAdamW(nets["denoiser"], self.config.lr, BETAS),
            "critic": FlatAdamW(nets["critic"], self.config.critic_lr, BETAS),
        }

    def step(self, state: State, batch: Batch, key: random.Key):
        c, x0, first = self.config, self.to_model(batch.x), batch.first_sample
        denoiser, critic = state["denoiser"], state["critic"]
        t = self.draw_t(len(x0), key, first, x0.device)
        x_t, eps = add_noise(x0, t, self.schedule, random.fold_in(key, "noise"), return_noise=True, first_sample=first)
        cond = self.condition(batch.labels, key, first)

        def predict():
            eps_hat = predicted_noise(denoiser(x_t, t, **cond), x_t, t, self.schedule, c.prediction)
            return eps_hat, self.shown(eps_hat, x_t, t, key, first)

        judges, joint = self.phase(state.step)
        shared = joint and c.forwards == "one"
        logged = {}
        if shared:
            eps_hat, fake = predict()
        if judges:
            if not shared:
                with torch.no_grad(), evaluating(*([denoiser] if c.forwards == "two" else [])):
                    _, fake = predict()
            real = self.shown(eps, x_t, t, key, first)
            logged["critic_loss"] = _critic_loss(critic, real, fake, t, x_t, c.gan_loss)
            state.update("critic", logged["critic_loss"])
        if joint:
            if not shared:
                eps_hat, fake = predict()
            logged["denoiser_loss"] = _denoiser_loss(critic, fake, t, x_t, c.gan_loss, eps, eps_hat, c.mse_weight)
            state.update("denoiser", logged["denoiser_loss"])
        return logged

    def diagnose(self, state, batch, key):
        return noise_levels(self, state.sampling_net("denoiser"), batch, key)
