"""Method 3: a critic on the noise alone ("Exploring the Combination of Diffusion Models and GANs", §4.2).

The critic sees eps or eps_hat and nothing else. Since the best possible eps_hat has less variance than eps, such a
critic can tell even a perfect denoiser from noise: see the curve of log Var(eps_hat) by t in a run's report.
"""

from dataclasses import dataclass

from diffgan_fast.methods.noise_critic import NoiseCritic, NoiseCriticConfig, losses

__all__ = ["Method3", "losses"]


@dataclass(kw_only=True)
class Config(NoiseCriticConfig):
    pass


class Method3(NoiseCritic):
    name, help, Config = "method3", "fine-tune a denoiser with a critic that tells true from predicted noise", Config
