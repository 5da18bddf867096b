"""Sines and cosines of many phases: what sinusoidal embeddings are made of."""

from __future__ import annotations

import torch
from torch.autograd import forward_ad

from diffgan_fast._native import LIBRARY
from diffgan_fast.backends import resolve

LIBRARY.define("sinusoids(Tensor x, Tensor frequencies) -> Tensor")
_RAW = torch.ops.diffgan_fast


def sinusoids(x: torch.Tensor, frequencies: torch.Tensor) -> torch.Tensor:
    """[sin(x_n w_0) … sin(x_n w_(h-1)), cos(x_n w_0) … cos(x_n w_(h-1))] for every number of x.

    On the CPU one C++ pass for float32; elsewhere, and where x has gradients, plain torch.

    Args:
        x: [N], float32 or float64.
        frequencies: [h], like x, from 0 to 1; constants for gradients.

    Returns: [N, 2 h].
    Gradients: with respect to x, every order; forward mode too.
    """
    if (
        x.dtype == torch.float32
        and not torch.compiler.is_compiling()
        and not (x.requires_grad and torch.is_grad_enabled())
        and not torch._C._are_functorch_transforms_active()
        and forward_ad._current_level < 0
        and resolve(x.device.type) == "cpu"
    ):
        return _RAW.sinusoids.default(x.contiguous(), frequencies)
    phase = x[:, None] * frequencies
    return torch.cat([phase.sin(), phase.cos()], dim=1)
