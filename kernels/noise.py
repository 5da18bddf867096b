"""Forward noising in Triton: the raw ops `add_noise` and `noise_pair` (see diffgan_fast/ops/noise.py)."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from diffgan_fast.kernels import core
from diffgan_fast.kernels.random import normal4, plus_noise


@triton.jit(do_not_specialize=core.CHANGING)
def _add_noise(
    x, out, noise, sigma, rows, n_rows, t, row: tl.int64, inner,
    keys, key: tl.int64, first_block: tl.int64, n, sample, channels, plane,
    PER_BLOCK: tl.constexpr, SHIFT: tl.constexpr, ALIGNED: tl.constexpr, WIDE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """out = a x + s sigma z;  rows (a, s). The noise is stored too if there is a place for it."""
    e, at, valid, counter, owner = core.tile(n, sample, channels, plane, first_block, SHIFT, ALIGNED, WIDE, BLOCK)
    v = tl.load(x + at, mask=valid).to(tl.float32)
    rows, exists = core.rows_of(rows, n_rows, t, row, inner, e, valid, 2, PER_BLOCK)
    mean = core.column(rows, exists, 0) * v
    s = core.column(rows, exists, 1) * sigma
    if noise is None:
        v = plus_noise(mean, s, keys, key, counter, owner, 0)
    else:
        z = normal4(keys, key, counter, owner, 0)
        core.store(noise + at, z, valid)
        v = tl.where(s == 0, mean, tl.fma(s, z, mean))
    core.store(out + at, v, valid)


@triton.jit(do_not_specialize=core.CHANGING)
def _noise_pair(
    x, previous, current, rows, n_rows, t, row: tl.int64, inner,
    keys, key: tl.int64, first_block: tl.int64, n, sample, channels, plane,
    PER_BLOCK: tl.constexpr, SHIFT: tl.constexpr, ALIGNED: tl.constexpr, WIDE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """previous = a0 x + s0 z0, current = a1 previous + s1 z1;  rows (a0, s0, a1, s1), z1 from stream 1."""
    e, at, valid, counter, owner = core.tile(n, sample, channels, plane, first_block, SHIFT, ALIGNED, WIDE, BLOCK)
    v = tl.load(x + at, mask=valid).to(tl.float32)
    rows, exists = core.rows_of(rows, n_rows, t, row, inner, e, valid, 4, PER_BLOCK)
    v = plus_noise(core.column(rows, exists, 0) * v, core.column(rows, exists, 1), keys, key, counter, owner, 0)
    core.store(previous + at, v, valid)
    v = plus_noise(core.column(rows, exists, 2) * v, core.column(rows, exists, 3), keys, key, counter, owner, 1)
    core.store(current + at, v, valid)


def add_noise(
    x: torch.Tensor, rows: torch.Tensor, t: torch.Tensor | None, row: int, sigma: float, key: int,
    key_t: torch.Tensor | None, first: int, return_noise: bool,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """(x_t, noise), the noise empty unless asked for. float32, bfloat16 and float16; there is no float64 here."""
    core.check_float(x)
    noise = core.noise_arguments(x, key, key_t, first)
    named = noise | core.row_arguments(x, rows, 2, t, row, noise)
    out, z = torch.empty_like(x), torch.empty_like(x) if return_noise else None
    core.launch(_add_noise, x.device, core.programs(noise), x=x, out=out, noise=z, sigma=sigma, **named)
    return out, x.new_empty(0) if z is None else z


def noise_pair(
    x: torch.Tensor, rows: torch.Tensor, t: torch.Tensor | None, row: int, key: int,
    key_t: torch.Tensor | None, first: int,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """(x_{t-1}, x_t) drawn jointly. float32, bfloat16 and float16; there is no float64 here."""
    core.check_float(x)
    noise = core.noise_arguments(x, key, key_t, first)
    named = noise | core.row_arguments(x, rows, 4, t, row, noise)
    previous, current = torch.empty_like(x), torch.empty_like(x)
    core.launch(_noise_pair, x.device, core.programs(noise), x=x, previous=previous, current=current, **named)
    return previous, current
