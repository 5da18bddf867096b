"""Method 4: a critic on the next image of the chain ("Exploring the Combination of Diffusion Models and GANs", §4.2).

The critic tells x_{t-1} made with the true noise from x_{t-1} made with the predicted one. Both come out of the same
`ddpm_step` with the same key, so that they differ by -beta_t / sqrt(alpha_t (1 - abar_t)) (eps_hat - eps) alone: about
1/T of the noise, which is why the source's critic saw no difference.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch

from diffgan_fast import random
from diffgan_fast.engine import option
from diffgan_fast.methods import noise_critic
from diffgan_fast.methods.noise_critic import NoiseCritic, NoiseCriticConfig
from diffgan_fast.ops import ddpm_step
from diffgan_fast.schedule import Schedule


def _next(eps, x_t, t, schedule, key, first_sample):
    key = random.fold_in(key, "step")
    return ddpm_step(x_t, eps, t, schedule, key, variance="beta", first_sample=first_sample)


def losses(
    denoiser: Callable[..., torch.Tensor],
    critic: Callable[..., torch.Tensor],
    x0: torch.Tensor,
    t: torch.Tensor,
    schedule: Schedule,
    key: random.Key,
    *,
    first_sample: int = 0,
    **options: Any,
) -> tuple[torch.Tensor, Callable[[], torch.Tensor]]:
    """As `method3.losses`, with a critic of x_{t-1}: logits [N] = critic(x_{t-1}, t=t, x_t=x_t).

    Both x_{t-1} have the step's noise of `fold_in(key, "step")` and variance beta_t.
    """
    return noise_critic.losses(
        denoiser,
        critic,
        x0,
        t,
        schedule,
        key,
        first_sample=first_sample,
        shown=lambda eps, x_t: _next(eps, x_t, t, schedule, key, first_sample),
        **options,
    )


@dataclass(kw_only=True)
class Method4Config(NoiseCriticConfig):
    PRESETS: ClassVar = {
        "paper": {**NoiseCriticConfig.PRESETS["paper"], "critic_steps": 0},
        "student": {**NoiseCriticConfig.PRESETS["student"], "critic_steps": 0},
        # the notebook: 10 epochs, the critic trained in the first of every five, the denoiser in all
        "as-coded": {
            **NoiseCriticConfig.PRESETS["as-coded"],
            **dict(steps=4690, critic_steps=0, critic_on=469, critic_off=1876),
        },
        # the source also tried a deeper, wider critic, of which it tells no more
        "deep-critic": {
            **NoiseCriticConfig.PRESETS["student"],
            **dict(critic_steps=0, critic_width=128, critic_depth=2),
        },
    }
    critic_steps: int = option(0, "first steps, in which the critic trains alone", unit="steps", low=0)
    critic_on: int = option(1, "steps in which the critic trains, in turn with critic_off", unit="steps", low=1)
    critic_off: int = option(0, "steps in which it rests", unit="steps", low=0)
    inputs: Literal["x_prev", "x_prev,t", "x_prev,x_t", "x_prev,x_t,t"] = option(  # type: ignore[assignment]
        "x_prev", "what the critic sees"
    )


class Method4(NoiseCritic):
    name, help, Config = "method4", "fine-tune a denoiser with a critic of the next image in the chain", Method4Config
    config: Method4Config

    def shown(self, eps, x_t, t, key, first):
        return _next(eps, x_t, t, self.schedule, key, first)

    def phase(self, step):
        turn = step % (self.config.critic_on + self.config.critic_off) < self.config.critic_on
        _, joint = super().phase(step)
        return turn or not joint, joint
