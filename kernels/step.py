"""A reverse step in Triton: the raw op `step` (see diffgan_fast/ops/step.py)."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from diffgan_fast.kernels import core
from diffgan_fast.kernels.random import plus_noise


@triton.jit(do_not_specialize=core.CHANGING)
def _step(
    x, e_hat, e_uncond, logit_grad, out, guidance_scale, logit_scale, rows, n_rows, t, row: tl.int64, inner,
    keys, key: tl.int64, first_block: tl.int64, n, sample, channels, plane, CLIP: tl.constexpr,
    PER_BLOCK: tl.constexpr, SHIFT: tl.constexpr, ALIGNED: tl.constexpr, WIDE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Rows (A, B, s, G, px, pe, c0, cx): A x + B e' + s z, or with CLIP c0 clamp(px x + pe e') + cx x + s z."""
    e, at, valid, counter, owner = core.tile(n, sample, channels, plane, first_block, SHIFT, ALIGNED, WIDE, BLOCK)
    v = tl.load(x + at, mask=valid).to(tl.float32)
    guided = tl.load(e_hat + at, mask=valid).to(tl.float32)
    rows, exists = core.rows_of(rows, n_rows, t, row, inner, e, valid, 8, PER_BLOCK)
    if e_uncond is not None:
        u = tl.load(e_uncond + at, mask=valid).to(tl.float32)
        guided = tl.fma(guided - u, guidance_scale, u)
    if logit_grad is not None:
        g = tl.load(logit_grad + at, mask=valid).to(tl.float32)
        guided = tl.fma(g, core.column(rows, exists, 3) * logit_scale, guided)
    if CLIP:
        x0 = tl.fma(v, core.column(rows, exists, 4), core.column(rows, exists, 5) * guided)
        x0 = tl.where(x0 < -1.0, -1.0, tl.where(x0 > 1.0, 1.0, x0))  # a NaN stays one
        mean = tl.fma(x0, core.column(rows, exists, 6), core.column(rows, exists, 7) * v)
    else:
        mean = tl.fma(v, core.column(rows, exists, 0), core.column(rows, exists, 1) * guided)
    v = plus_noise(mean, core.column(rows, exists, 2), keys, key, counter, owner, 0)
    core.store(out + at, v, valid)


def step(
    x: torch.Tensor, e: torch.Tensor, e_uncond: torch.Tensor | None, logit_grad: torch.Tensor | None,
    rows: torch.Tensor, t: torch.Tensor | None, row: int, guidance_scale: float, logit_scale: float, clip: bool,
    key: int, key_t: torch.Tensor | None, first: int,
) -> torch.Tensor:  # fmt: skip
    """x one step back. float32, bfloat16 and float16; there is no float64 here."""
    core.check_float(x)
    for name, y in (("e", e), ("e_uncond", e_uncond), ("logit_grad", logit_grad)):
        core.check_like(x, y, name)
    noise = core.noise_arguments(x, key, key_t, first)
    named = noise | core.row_arguments(x, rows, 8, t, row, noise)
    named |= {"guidance_scale": guidance_scale, "logit_scale": logit_scale, "CLIP": clip}
    out = torch.empty_like(x)
    tensors = {"x": x, "e_hat": e, "e_uncond": e_uncond, "logit_grad": logit_grad, "out": out}
    core.launch(_step, x.device, core.programs(noise), **tensors, **named)
    return out
