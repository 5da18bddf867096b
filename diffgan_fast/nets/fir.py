"""Doubling and halving of images with the filter [1, 3, 3, 1], which lets fewer aliases through than one pixel in two.

Each is one depthwise convolution with a fixed kernel: gradients of every order hold. Outside the image there are zeros.

Source: Zhang 2019, "Making convolutional networks shift-invariant again"; Karras et al. 2020 (StyleGAN2), App. B.
"""

from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor


@lru_cache
def _kernel(dtype: torch.dtype, device: torch.device) -> Tensor:
    with torch.inference_mode(False):  # so that it may take part in training, whoever asks first
        # 1, 3, 3, 1, without a copy from the host, which a CUDA graph could not hold
        taps = 4 - (2 * torch.arange(4, dtype=dtype, device=device) - 3).abs()
        return torch.outer(taps, taps)[None, None] / 64  # exact in every float type


def _per_channel(x: Tensor) -> Tensor:
    """The kernel once for each channel of `x`; its sum is 1."""
    return _kernel(x.dtype, x.device).expand(x.shape[1], 1, 4, 4)


def fir_blur(x: Tensor, *, padding: int = 2, gain: float = 1.0) -> Tensor:
    """[N, C, H, W] -> [N, C, H + 2 padding - 3, …]: filtered, times `gain`.

    As it is, it comes before a 3x3 conv of stride 2, which then halves the image. With padding=1 and gain=4 it comes
    after a transposed one of 3x3 and stride 2, which together double it.
    """
    return F.conv2d(x, gain * _per_channel(x), padding=padding, groups=x.shape[1])


def fir_down(x: Tensor) -> Tensor:
    """[N, C, H, W] -> [N, C, H // 2, W // 2]: filtered, then every second pixel. H and W are at least 2."""
    return F.conv2d(x, _per_channel(x), stride=2, padding=1, groups=x.shape[1])


def fir_up(x: Tensor) -> Tensor:
    """[N, C, H, W] -> [N, C, 2H, 2W]: zeros between the pixels, then filtered with four times the kernel."""
    return F.conv_transpose2d(x, 4 * _per_channel(x), stride=2, padding=1, groups=x.shape[1])
