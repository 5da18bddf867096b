"""The parts of a gradient penalty in Triton: the raw ops `interpolate`, `gradient_norm` and `gradient_norm_grad` (see
diffgan_fast/ops/penalty.py).

In both layouts the elements of a sample lie together in memory, so that elements are numbered here by their place in
memory.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from diffgan_fast.kernels import core
from diffgan_fast.kernels.random import words

_CHANGING = ("key", "first", "n", "sample")


@triton.jit
def _tile(n, sample, WHOLE: tl.constexpr, WIDE: tl.constexpr, BLOCK: tl.constexpr):
    """The elements of this program [BLOCK, 4], whether they exist, and the samples that they belong to.

    WHOLE says that four neighbours share a sample: then the last two are [BLOCK, 1].
    """
    q = tl.program_id(0)
    if WIDE:
        q = q.to(tl.int64)
    e = 4 * (q * BLOCK + tl.arange(0, BLOCK))[:, None]
    at = e + tl.arange(0, 4)[None, :]
    if not WHOLE:
        e = at
    valid = e < n
    return at, valid, tl.where(valid, e // sample, 0)


@triton.jit(do_not_specialize=_CHANGING)
def _interpolate(
    real, fake, out, keys, key: tl.int64, first: tl.int64, n, sample,
    SAMPLE_KEYS: tl.constexpr, WHOLE: tl.constexpr, WIDE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """out = u real + (1 - u) fake, with u the uniform number `first` + sample, or number 0 of the sample's own key."""
    at, valid, sample = _tile(n, sample, WHOLE, WIDE, BLOCK)
    number = core.wide(first) + sample
    owner = 0
    if SAMPLE_KEYS:
        number = core.wide(0 * sample)
        owner = sample
    w0, w1, w2, w3 = words(keys, key, number >> 2, owner, 0)
    odd = (number & 1) != 0
    w = tl.where((number & 2) != 0, tl.where(odd, w3, w2), tl.where(odd, w1, w0))
    u = (w >> 8).to(tl.int32).to(tl.float32) * 5.9604644775390625e-8
    a = tl.load(real + at, mask=valid).to(tl.float32)
    b = tl.load(fake + at, mask=valid).to(tl.float32)
    core.store(out + at, tl.fma(u, a, (1.0 - u) * b), valid)


@triton.jit
def relative(norm, center):
    """1 - center / norm, where 1 - center / 0 counts as 0, and as 1 for center 0."""
    ratio = tl.where(norm == 0, 0.0, (norm - center) / tl.where(norm == 0, 1.0, norm))
    return tl.where(center == 0, 1.0, ratio)


@triton.jit(do_not_specialize=_CHANGING)
def _gradient_norm_grad(
    x, norms, scale, each, center, out, n, sample, WHOLE: tl.constexpr, WIDE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """out = scale each (1 - center / norm) x."""
    at, valid, sample = _tile(n, sample, WHOLE, WIDE, BLOCK)
    norm = tl.load(norms + sample)
    factor = tl.load(scale) * each * relative(norm, center)
    core.store(out + at, factor * tl.load(x + at, mask=valid).to(tl.float32), valid)


# `sample` is specialised, so that accesses are wide where it is a multiple of 16: it does not change from call to call.
@triton.jit(do_not_specialize=("samples", "pieces"))
def _square_sums(x, sums, samples, sample, pieces, COLUMNS: tl.constexpr, WIDE: tl.constexpr, BLOCK: tl.constexpr):
    """Sums of squares of pieces of COLUMNS elements, as many as make up a tile of 4 BLOCK; a sample has `pieces`."""
    ROWS: tl.constexpr = 4 * BLOCK // COLUMNS
    q = tl.program_id(0)
    piece = q % pieces
    s = q // pieces * ROWS + tl.arange(0, ROWS)
    if WIDE:
        s = s.to(tl.int64)
    e = (piece * COLUMNS + tl.arange(0, COLUMNS))[None, :]
    v = tl.load(x + s[:, None] * sample + e, mask=(s[:, None] < samples) & (e < sample), other=0.0).to(tl.float32)
    tl.store(sums + s * pieces + piece, tl.sum(v * v, 1).to(tl.float64), mask=s < samples)


def _cut(x: torch.Tensor, checked: dict) -> dict:
    """The arguments of `_tile`, from those of `core.tile`."""
    sample = max(x.numel() // max(x.shape[0], 1), 1)
    return {"n": checked["n"], "sample": sample, "WHOLE": sample % 4 == 0, "WIDE": checked["WIDE"]}


def _programs(x: torch.Tensor) -> int:
    return triton.cdiv(x.numel(), 4 * core.BLOCK)


def interpolate(
    real: torch.Tensor, fake: torch.Tensor, key: int, key_t: torch.Tensor | None, first_sample: int
) -> torch.Tensor:
    """u real + (1 - u) fake. float32, bfloat16 and float16; there is no float64 here."""
    core.check_float(real)
    core.check_like(real, fake, "fake")
    noise = core.noise_arguments(real, key, key_t, 0)
    named = _cut(real, noise) | {"keys": key_t, "key": key, "first": first_sample}
    out, own = torch.empty_like(real), noise["sample"] is not None
    core.launch(_interpolate, real.device, _programs(real), real=real, fake=fake, out=out, SAMPLE_KEYS=own, **named)
    return out


def gradient_norm(g: torch.Tensor, center: float) -> tuple[torch.Tensor, torch.Tensor]:
    """The mean of (norm - center)^2, and the norms [N]. float32, bfloat16 and float16; there is no float64 here.

    Deterministic: a program sums pieces in float32, and torch the pieces' sums in float64, both in a fixed order.
    """
    core.check_float(g)
    wide = core.noise_arguments(g, 0, None, 0)["WIDE"]
    samples, sample = g.shape[0], g.numel() // max(g.shape[0], 1)
    columns = min(4 * core.BLOCK, triton.next_power_of_2(max(sample, 1)))
    pieces = triton.cdiv(sample, columns)
    sums = torch.empty(samples, pieces, dtype=torch.float64, device=g.device)
    count = triton.cdiv(samples, 4 * core.BLOCK // columns) * pieces
    core.launch(_square_sums, g.device, count, g, sums, samples, sample, pieces, COLUMNS=columns, WIDE=wide)
    squares = sums.sum(1)
    norms = squares.sqrt()
    mean = squares.mean() if center == 0 else (norms - center).square().mean()
    return mean.float(), norms.float()


def gradient_norm_grad(g: torch.Tensor, norms: torch.Tensor, scale: torch.Tensor, center: float) -> torch.Tensor:
    """scale (2 / N) (1 - center / norm) g, with `scale` one number on g's device."""
    core.check_float(g)
    if norms.shape != g.shape[:1] or not norms.is_contiguous() or norms.device != g.device:
        raise ValueError(f"norms must be [{g.shape[0]}], contiguous and on {g.device}, got {list(norms.shape)}")
    if scale.numel() != 1 or scale.device != g.device:
        raise ValueError(f"scale must be one number on {g.device}, got {list(scale.shape)} on {scale.device}")
    named = _cut(g, core.noise_arguments(g, 0, None, 0)) | {"each": 2 / max(g.shape[0], 1), "center": center}
    out = torch.empty_like(g)
    core.launch(_gradient_norm_grad, g.device, _programs(g), x=g, norms=norms, scale=scale, out=out, **named)
    return out
