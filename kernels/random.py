"""Philox4x32-10 and Box-Muller in Triton, the text of csrc/philox.h once more, and the raw op `random_`.

The polynomials are written out because Triton's logarithm, sine and cosine lower to approximations that differ between
its interpreter and GPUs. Only the square root is the GPU's own, within one unit in the last place.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from diffgan_fast.kernels import core

# What a word becomes: the values of `Draw` in diffgan_fast/ops/random.py.
_BITS, _UNIFORM, _NORMAL, _INTEGERS = (tl.constexpr(i) for i in range(4))


@triton.jit
def rounds(c0, c1, c2, c3, k0, k1):
    """Ten rounds on four counter words under a key of two (the low halves of whatever integers).

    tl.philox gives the same bits, but multiplies twice for the two halves of each product: a tenth more instructions.
    """
    c0, c1, k0, k1 = c0.to(tl.uint32), c1.to(tl.uint32), k0.to(tl.uint32), k1.to(tl.uint32)
    for _ in tl.static_range(10):
        p0 = c0.to(tl.uint64) * 0xD2511F53
        p1 = c2.to(tl.uint64) * 0xCD9E8D57
        c0 = (p1 >> 32).to(tl.uint32) ^ c1 ^ k0
        c1 = p1.to(tl.uint32)
        c2 = (p0 >> 32).to(tl.uint32) ^ c3 ^ k1
        c3 = p0.to(tl.uint32)
        k0 += 0x9E3779B9
        k1 += 0xBB67AE85
    return c0, c1, c2, c3


@triton.jit
def words(keys, key, counter, owner, STREAM: tl.constexpr):
    """The four words of each Philox block `counter` (int64), under `key` or the keys of the samples `owner`."""
    key = core.wide(key) if keys is None else tl.load(keys + owner)
    c2, c3 = tl.full([], STREAM, tl.uint32), tl.full([], 0, tl.uint32)
    return rounds(counter, counter >> 32, c2, c3, key, key >> 32)


@triton.jit
def log_unit(x):
    """ln(x) for x in (0, 1): the mantissa is brought into [sqrt(1/2), sqrt(2)), then a polynomial (Cephes)."""
    # Adding 1 - sqrt(1/2) in units of the last place carries into the exponent just where the mantissa is >= sqrt(2).
    shifted = x.to(tl.int32, bitcast=True) + (0x3F800000 - 0x3F3504F3)
    n = ((shifted >> 23) - 127).to(tl.float32)
    f = ((shifted & 0x007FFFFF) + 0x3F3504F3).to(tl.float32, bitcast=True) - 1.0
    z = f * f
    p = tl.fma(f, 7.0376836292e-2, -1.1514610310e-1)
    p = tl.fma(p, f, 1.1676998740e-1)
    p = tl.fma(p, f, -1.2420140846e-1)
    p = tl.fma(p, f, 1.4249322787e-1)
    p = tl.fma(p, f, -1.6668057665e-1)
    p = tl.fma(p, f, 2.0000714765e-1)
    p = tl.fma(p, f, -2.4999993993e-1)
    p = tl.fma(p, f, 3.3333331174e-1)
    y = f * z * p
    y = tl.fma(n, -2.12194440e-4, y)
    y = tl.fma(z, -0.5, y)
    return tl.fma(n, 0.693359375, y + f)


@triton.jit
def box_muller(w0, w1):
    """Two independent standard normals from two words."""
    u = tl.fma((w0 >> 9).to(tl.int32).to(tl.float32), 1.1920928955078125e-7, 5.9604644775390625e-8)
    r = tl.sqrt(-2.0 * log_unit(u))
    # theta = quadrant * pi/2 + x with |x| <= pi/4, split in integers and so without rounding.
    quadrant = (w1 + 0x20000000) >> 30
    x = (w1 - (quadrant << 30)).to(tl.int32, bitcast=True).to(tl.float32) * 1.4629180792671596e-9
    z = x * x
    sp = tl.fma(z, -1.9515295891e-4, 8.3321608736e-3)
    sp = tl.fma(sp, z, -1.6666654611e-1)
    sp = tl.fma(sp * z, x, x)
    cp = tl.fma(z, 2.443315711809948e-5, -1.388731625493765e-3)
    cp = tl.fma(cp, z, 4.166664568298827e-2)
    cp = tl.fma(cp * z, z, tl.fma(z, -0.5, 1.0))
    # Quadrant q: (cos, sin) = (c, s), (-s, c), (-c, -s), (s, -c) for q = 0..3; the sign goes into the top bit.
    odd = (quadrant & 1) != 0
    c = tl.where(odd, sp, cp).to(tl.uint32, bitcast=True) ^ (((quadrant + 1) & 2) << 30)
    s = tl.where(odd, cp, sp).to(tl.uint32, bitcast=True) ^ ((quadrant & 2) << 30)
    return r * c.to(tl.float32, bitcast=True), r * s.to(tl.float32, bitcast=True)


@triton.jit
def rows4(v0, v1, v2, v3):
    """[BLOCK, 4] from four vectors, its columns: a thread keeps what it has."""
    return tl.reshape(tl.join(tl.join(v0, v2), tl.join(v1, v3)), (v0.shape[0], 4))


@triton.jit
def normal4(keys, key, counter, owner, STREAM: tl.constexpr):
    """The four standard normals of each Philox block, [BLOCK, 4]."""
    w0, w1, w2, w3 = words(keys, key, counter, owner, STREAM)
    z0, z1 = box_muller(w0, w1)
    z2, z3 = box_muller(w2, w3)
    return rows4(z0, z1, z2, z3)


@triton.jit
def plus_noise(mean, scale, keys, key, counter, owner, STREAM: tl.constexpr):
    """mean + scale z; where the scale is 0, `mean` bit for bit. One scale for all that is 0 saves making the noise."""
    if scale.type.is_block():
        z = normal4(keys, key, counter, owner, STREAM)
        out = tl.where(scale == 0, mean, tl.fma(scale, z, mean))
    else:
        out = mean
        if scale != 0:
            out = tl.fma(scale, normal4(keys, key, counter, owner, STREAM), mean)
    return out


@triton.jit(do_not_specialize=core.CHANGING)
def _random(
    out, high: tl.int64, keys, key: tl.int64, first_block: tl.int64, n, sample, channels, plane,
    STREAM: tl.constexpr, DRAW: tl.constexpr,
    SHIFT: tl.constexpr, ALIGNED: tl.constexpr, WIDE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    _, at, valid, counter, owner = core.tile(n, sample, channels, plane, first_block, SHIFT, ALIGNED, WIDE, BLOCK)
    if DRAW == _NORMAL:
        v = normal4(keys, key, counter, owner, STREAM)
    else:
        w0, w1, w2, w3 = words(keys, key, counter, owner, STREAM)
        w = rows4(w0, w1, w2, w3)
        if DRAW == _UNIFORM:
            v = (w >> 8).to(tl.int32).to(tl.float32) * 5.9604644775390625e-8
        elif DRAW == _INTEGERS:
            v = (w.to(tl.uint64) * high.to(tl.uint64)) >> 32
        else:
            v = w
    core.store(out + at, v, valid)


@triton.jit(do_not_specialize=["key", "word", "n"])
def _fold_in(keys, key: tl.int64, data, word: tl.int64, out, n, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    valid = i < n
    k = tl.full([BLOCK], 0, tl.int64) + key if keys is None else tl.load(keys + i, mask=valid, other=0)
    w = tl.full([BLOCK], 0, tl.int64) + word if data is None else tl.load(data + i, mask=valid, other=0)
    c2, c3 = tl.full([BLOCK], 0xF01D, tl.uint32), tl.full([BLOCK], 1, tl.uint32)
    w0, w1, _, _ = rounds(w, w >> 32, c2, c3, k, k >> 32)
    folded = (w0.to(tl.int64) | w1.to(tl.int64) << 32) & 0x7FFFFFFFFFFFFFFF
    tl.store(out + i, folded, mask=valid)


@triton.jit
def _philox4x32(counter, keys, out, n, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    valid = i < n
    c0 = tl.load(counter + 4 * i, mask=valid, other=0)
    c1 = tl.load(counter + 4 * i + 1, mask=valid, other=0)
    c2 = tl.load(counter + 4 * i + 2, mask=valid, other=0).to(tl.uint32)
    c3 = tl.load(counter + 4 * i + 3, mask=valid, other=0).to(tl.uint32)
    k0 = tl.load(keys + 2 * i, mask=valid, other=0)
    k1 = tl.load(keys + 2 * i + 1, mask=valid, other=0)
    w0, w1, w2, w3 = rounds(c0, c1, c2, c3, k0, k1)
    at = 4 * i[:, None] + tl.arange(0, 4)[None, :]
    tl.store(out + at, rows4(w0, w1, w2, w3).to(tl.int64), mask=valid[:, None])


def random_(
    out: torch.Tensor, key: int, key_t: torch.Tensor | None, stream: int, first: int, draw: int, high: int
) -> None:
    """Fills a contiguous tensor with numbers of a stream: raw words, uniforms, normals, or integers in [0, high).

    Numbers are float32, bfloat16 or float16 (there is no float64 here), words and integers int64.
    """
    if not out.is_contiguous():
        raise ValueError("random tensors are made contiguous")
    if draw in (_UNIFORM.value, _NORMAL.value):
        core.check_float(out)
    elif out.dtype != torch.int64:
        raise ValueError(f"words and integers are int64, got {out.dtype}")
    noise = core.noise_arguments(out, key, key_t, first)
    core.launch(_random, out.device, core.programs(noise), out=out, high=high, STREAM=stream, DRAW=draw, **noise)


def fold_in(key: int, key_t: torch.Tensor | None, word: int, word_t: torch.Tensor | None) -> torch.Tensor:
    """New keys, one for each of `key_t` and `word_t`, which have one shape; a number stands for whichever is None."""
    like = word_t if key_t is None else key_t
    assert like is not None
    out = torch.empty_like(like)
    n = out.numel()
    core.launch(_fold_in, out.device, triton.cdiv(n, core.BLOCK), key_t, key, word_t, word, out, n)
    return out


def philox4x32(counter: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
    """int64 counters [n, 4] and keys [n, 2], words each, to the words int64 [n, 4]: for the known-answer tests."""
    counter, key = counter.contiguous(), key.contiguous()
    out, n = torch.empty_like(counter), counter.shape[0]
    core.launch(_philox4x32, out.device, triton.cdiv(n, core.BLOCK), counter, key, out, n)
    return out
