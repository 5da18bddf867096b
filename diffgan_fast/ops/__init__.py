"""The fused ops. Raw ops (`torch.ops.diffgan_fast.*`) are private; these functions are the interface."""

from diffgan_fast.ops.loss import denoising_loss, noise_mse
from diffgan_fast.ops.noise import add_noise, affine_noise, noise_pair
from diffgan_fast.ops.penalty import gradient_penalty, interpolate, norm_penalty, r1_penalty
from diffgan_fast.ops.step import ddim_step, ddpm_step, posterior_step

__all__ = [
    "add_noise",
    "affine_noise",
    "ddim_step",
    "ddpm_step",
    "denoising_loss",
    "gradient_penalty",
    "interpolate",
    "noise_mse",
    "noise_pair",
    "norm_penalty",
    "posterior_step",
    "r1_penalty",
]
