"""Method 3.5: method 3 with a critic that is told t ("Exploring the Combination of Diffusion Models and GANs", §4.2).

t enters the critic as a constant plane beside the noise.
"""

from dataclasses import dataclass
from typing import ClassVar, Literal

from diffgan_fast.engine import option
from diffgan_fast.methods.noise_critic import NoiseCritic, NoiseCriticConfig, losses

__all__ = ["Method35", "losses"]


@dataclass(kw_only=True)
class Config(NoiseCriticConfig):
    PRESETS: ClassVar = {
        name: {**settings, "critic_init": "dcgan"} if name in ("student", "as-coded") else settings
        for name, settings in NoiseCriticConfig.PRESETS.items()
    }
    inputs: Literal["eps", "eps,t", "eps,x_t", "eps,x_t,t"] = option("eps,t", "what the critic sees")


class Method35(NoiseCritic):
    name, help, Config = "method3.5", "method 3 with a critic that is told the time step", Config
