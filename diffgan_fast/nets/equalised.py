"""Layers with an equalised learning rate (Karras et al. 2018, §4.1): weights of variance 1, scaled as they are used.

Adam changes every weight by about the learning rate; so each moves by the same part of what it started with, however
many inputs its layer has.
"""

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from diffgan_fast.ops.conv import conv2d

SLOPE = 0.2  # of all LeakyReLUs
GAIN = (
    2**0.5
)  # before a LeakyReLU: what comes out is as large as what goes in (StyleGAN2 has it behind: it is the same)


class EqualisedLinear(nn.Module):
    """A linear layer of weights N(0, 1) / `rate`, scaled by `rate` / √here: it learns at `rate` times the usual.

    `gain` multiplies what comes out; `bias` is what the bias begins with.
    """

    def __init__(self, here: int, out: int, rate: float = 1.0, *, gain: float = 1.0, bias: float = 0.0):
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(out, here) / rate), nn.Parameter(torch.full((out,), bias))
        self.scale, self.rate = gain * rate / here**0.5, gain * rate

    def forward(self, x: Tensor) -> Tensor:
        """[N, here] -> [N, out]."""
        return linear(x, self.weight * self.scale, self.bias * self.rate)


class EqualisedConv2d(nn.Module):
    """A convolution of weights N(0, 1), scaled by 1 / √(here · kernel²), with a padding of kernel // 2 if not told.

    `gain` multiplies what comes out.
    """

    def __init__(
        self,
        here: int,
        out: int,
        kernel: int,
        *,
        stride: int = 1,
        padding: int | None = None,
        bias: bool = True,
        gain: float = 1.0,
    ):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(out, here, kernel, kernel))
        self.bias = nn.Parameter(torch.zeros(out)) if bias else None
        self.scale, self.gain, self.stride = gain * (here * kernel**2) ** -0.5, gain, stride
        self.padding = kernel // 2 if padding is None else padding

    def forward(self, x: Tensor) -> Tensor:
        """[N, here, H, W] -> [N, out, H', W']."""
        bias = None if self.bias is None else self.bias * self.gain
        return conv2d(x, self.weight * self.scale, bias, stride=self.stride, padding=self.padding)
