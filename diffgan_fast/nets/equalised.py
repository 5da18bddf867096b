"""Layers with an equalised learning rate (Karras et al. 2018, §4.1): weights of variance 1, scaled as they are used.

Adam changes every weight by about the learning rate; so each moves by the same part of what it started with, however
many inputs its layer has.
"""

import torch
from torch import Tensor, nn
from torch.nn.functional import leaky_relu, linear

from diffgan_fast.ops.conv import conv2d

SLOPE = 0.2  # of all LeakyReLUs of StyleGAN2


def leaky(x: Tensor) -> Tensor:
    """LeakyReLU, times √2: as large as what goes in (Karras et al. 2020, their code)."""
    return leaky_relu(x, SLOPE) * 2**0.5


class EqualisedLinear(nn.Module):
    """A linear layer of weights N(0, 1) / `rate`, scaled by `rate` / √here: it learns at `rate` times the usual."""

    def __init__(self, here: int, out: int, rate: float = 1.0, bias: float = 0.0):
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(out, here) / rate), nn.Parameter(torch.full((out,), bias))
        self.scale, self.rate = rate / here**0.5, rate

    def forward(self, x: Tensor) -> Tensor:
        """[N, here] -> [N, out]."""
        return linear(x, self.weight * self.scale, self.bias * self.rate)


class EqualisedConv2d(nn.Module):
    """A convolution of weights N(0, 1), scaled by 1 / √(here · kernel²), with a padding of kernel // 2 if not told."""

    def __init__(
        self, here: int, out: int, kernel: int, *, stride: int = 1, padding: int | None = None, bias: bool = True
    ):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(out, here, kernel, kernel))
        self.bias = nn.Parameter(torch.zeros(out)) if bias else None
        self.scale, self.stride = (here * kernel**2) ** -0.5, stride
        self.padding = kernel // 2 if padding is None else padding

    def forward(self, x: Tensor) -> Tensor:
        """[N, here, H, W] -> [N, out, H', W']."""
        return conv2d(x, self.weight * self.scale, self.bias, stride=self.stride, padding=self.padding)
