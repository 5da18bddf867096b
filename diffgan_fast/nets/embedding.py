"""How a time step enters a network: as sines and cosines, or as one fraction of T."""

import math
from functools import lru_cache

import torch
from torch import Tensor

from diffgan_fast.ops.sinusoids import sinusoids


@lru_cache
def _frequencies(half: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    with torch.inference_mode(False):  # so that it may take part in training, whoever asks first
        k = torch.arange(half, dtype=dtype, device=device)
        return torch.exp(k * (-math.log(10000) / (half - 1)))


def sinusoidal(t: Tensor, dim: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """The sinusoidal position embedding of the time steps `t`.

    With h = dim / 2 and ω_k = 10000^(-k / (h - 1)) for k = 0 … h - 1, row n is
    [sin(t_n ω_0) … sin(t_n ω_(h-1)), cos(t_n ω_0) … cos(t_n ω_(h-1))].

    Args:
        t: [N], integers or floats.
        dim: an even number, at least 4.
        dtype: of the result. The arithmetic is float32, float64 for float64.

    Returns:
        [N, dim], each value in [-1, 1].

    Raises:
        ValueError: `dim` is odd or below 4.

    Source: Vaswani et al. 2017, §3.5, in the form DDPM uses it (Ho et al. 2020, App. B).
    """
    if dim < 4 or dim % 2:
        raise ValueError(f"dim is {dim}; it must be even and at least 4")
    half = dim // 2
    compute = torch.promote_types(dtype, torch.float32)
    return sinusoids(t.to(compute), _frequencies(half, compute, t.device)).to(dtype)


def time_fraction(t: Tensor, T: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """(t - 1) / T: the one scalar that the `student` networks see, whose authors count t from 0.

    Args:
        t: [N] int64, 1 … T.
        T: the number of time steps.
        dtype: of the result. The arithmetic is float32, float64 for float64.

    Returns:
        [N], each value in [0, 1).

    Source: the notebooks of "Exploring the Combination of Diffusion Models and Generative Adversarial
    Networks", which write t / T for t = 0 … T - 1.
    """
    compute = torch.promote_types(dtype, torch.float32)
    return ((t - 1).to(compute) / T).to(dtype)
