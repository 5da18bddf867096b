"""The noise-prediction loss in Triton: the raw ops `residual` and `residual_mean` (see diffgan_fast/ops/loss.py)."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from diffgan_fast.kernels import core
from diffgan_fast.kernels.random import plus_noise


@triton.jit(do_not_specialize=core.CHANGING)
def _residual(
    x, y, scale, out, partial, rows, n_rows, t, row: tl.int64, inner,
    keys, key: tl.int64, first_block: tl.int64, n, sample, channels, plane,
    PER_BLOCK: tl.constexpr, SHIFT: tl.constexpr, ALIGNED: tl.constexpr, WIDE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """r = x + b y + s z;  rows (w, b, s).

    Writes scale w r to `out` and the program's sum of w r^2 to `partial`, each if it is given; no `scale` is 1.
    """
    e, at, valid, counter, owner = core.tile(n, sample, channels, plane, first_block, SHIFT, ALIGNED, WIDE, BLOCK)
    v = tl.load(x + at, mask=valid, other=0.0).to(tl.float32)
    rows, exists = core.rows_of(rows, n_rows, t, row, inner, e, valid, 3, PER_BLOCK)
    w = core.column(rows, exists, 0)
    r = plus_noise(v, core.column(rows, exists, 2), keys, key, counter, owner, 0)
    if y is not None:
        v = tl.load(y + at, mask=valid, other=0.0).to(tl.float32)
        r = tl.fma(v, core.column(rows, exists, 1), r)
    if out is not None:
        factor = w
        if scale is not None:
            factor = tl.load(scale).to(tl.float32) * w
        core.store(out + at, factor * r, valid)
    if partial is not None:
        total = tl.sum(tl.sum(tl.where(valid, w * (r * r), 0.0), 1), 0)
        tl.store(partial + tl.program_id(0), total.to(tl.float64))


def _arguments(x, y, rows, t, row, key, key_t, first) -> dict:
    core.check_float(x)
    core.check_like(x, y, "y")
    noise = core.noise_arguments(x, key, key_t, first)
    return {"x": x, "y": y} | noise | core.row_arguments(x, rows, 3, t, row, noise)


def residual(
    x: torch.Tensor, y: torch.Tensor | None, rows: torch.Tensor, t: torch.Tensor | None, row: int, scale: torch.Tensor,
    key: int, key_t: torch.Tensor | None, first: int,
) -> torch.Tensor:  # fmt: skip
    """scale w r, with `scale` one number on x's device. float32, bfloat16 and float16; there is no float64 here."""
    named = _arguments(x, y, rows, t, row, key, key_t, first)
    if scale.numel() != 1 or scale.device != x.device:
        raise ValueError(f"scale must be one number on {x.device}, got {list(scale.shape)} on {scale.device}")
    out = torch.empty_like(x)
    core.launch(_residual, x.device, core.programs(named), scale=scale, out=out, partial=None, **named)
    return out


def residual_mean(
    x: torch.Tensor, y: torch.Tensor | None, rows: torch.Tensor, t: torch.Tensor | None, row: int, keep: bool,
    key: int, key_t: torch.Tensor | None, first: int,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """The mean of w r^2, a scalar of the rows' type, and w r where `keep` asks for it (else an empty tensor).

    float32, bfloat16 and float16; there is no float64 here.

    Deterministic: a program sums its tile in float32, and torch the programs' sums in float64, both in a fixed order.
    """
    named = _arguments(x, y, rows, t, row, key, key_t, first)
    count = core.programs(named)
    partial = torch.empty(count, dtype=torch.float64, device=x.device)
    kept = torch.empty_like(x) if keep else x.new_empty(0)
    core.launch(_residual, x.device, count, scale=None, out=kept if keep else None, partial=partial, **named)
    return (partial.sum() / x.numel()).to(rows.dtype), kept
