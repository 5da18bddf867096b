"""denoising-diffusion-pytorch around a network of ours, for the benchmarks of training steps and of sampling."""

from __future__ import annotations

import importlib.util
import sys
from types import ModuleType

import torch
from torch import Tensor, nn

PACKAGE = "denoising_diffusion_pytorch"


def installed() -> bool:
    """Whether the package is there."""
    return importlib.util.find_spec(PACKAGE) is not None


class Told(nn.Module):
    """A denoiser as the package's own U-Net: t counts from 0, and what it conditions itself on is not used."""

    self_condition = random_or_learned_sinusoidal_cond = False

    def __init__(self, net: nn.Module, channels: int):
        super().__init__()
        self.net, self.channels, self.out_dim = net, channels, channels

    def forward(self, x: Tensor, t: Tensor, x_self_cond: Tensor | None = None) -> Tensor:
        return self.net(x, t + 1)


def gaussian_diffusion(net: nn.Module, channels: int, size: int, T: int, device: torch.device) -> nn.Module:
    """The package's GaussianDiffusion with a linear schedule, predicting noise.

    Its module imports torchvision for a loader and a picture that are not used here; where that is missing, an empty
    module stands in for it meanwhile.
    """
    missing = importlib.util.find_spec("torchvision") is None
    if missing:
        sys.modules["torchvision"] = stand_in = ModuleType("torchvision")
        stand_in.transforms = stand_in.utils = None  # type: ignore[attr-defined]
    try:
        from denoising_diffusion_pytorch import GaussianDiffusion
    finally:
        if missing:
            del sys.modules["torchvision"]
    made = GaussianDiffusion(
        Told(net, channels), image_size=size, timesteps=T, beta_schedule="linear", objective="pred_noise"
    )
    return made.to(device)
