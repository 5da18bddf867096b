"""Philox4x32-10 and its uses in plain torch (int64, any device) and in Python ints: the oracle of the kernels."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

_M0, _M1, _W0, _W1, _MASK = 0xD2511F53, 0xCD9E8D57, 0x9E3779B9, 0xBB67AE85, 0xFFFFFFFF


def block_ints(counter: Sequence[int], key: Sequence[int]) -> tuple[int, int, int, int]:
    """The four words of one counter (four words) under one key (two words), as Python ints."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        p0, p1 = _M0 * c0, _M1 * c2
        c0, c1, c2, c3 = (p1 >> 32) ^ c1 ^ k0, p1 & _MASK, (p0 >> 32) ^ c3 ^ k1, p0 & _MASK
        k0, k1 = (k0 + _W0) & _MASK, (k1 + _W1) & _MASK
    return c0, c1, c2, c3


def block(c0, c1, c2, c3, k0, k1):
    """The four words (int64 tensors in [0, 2^32)) of counter and key words, which broadcast."""
    for _ in range(10):
        # int64 products wrap modulo 2^64, which leaves both halves right once they are masked
        p0, p1 = c0 * _M0, c2 * _M1
        c0, c1, c2, c3 = ((p1 >> 32) & _MASK) ^ c1 ^ k0, p1 & _MASK, ((p0 >> 32) & _MASK) ^ c3 ^ k1, p0 & _MASK
        k0, k1 = (k0 + _W0) & _MASK, (k1 + _W1) & _MASK
    return c0, c1, c2, c3


def fold_in(key, word):
    """The key of a key and a word of data: ints, or int64 tensors, which broadcast."""
    w0, w1, _, _ = block(word & _MASK, (word >> 32) & _MASK, 0xF01D, 1, key & _MASK, (key >> 32) & _MASK)
    return (w0 | (w1 << 32)) & (2**63 - 1)


def words(n: int, key: int, key_t: torch.Tensor | None, stream: int, first: int, device) -> torch.Tensor:
    """Words first … first + n of a stream as int64 [n]; with one key a sample, each sample counts from `first`."""
    keys = torch.tensor([key], dtype=torch.int64, device=device) if key_t is None else key_t.reshape(-1)
    samples = keys.numel()
    index = first + torch.arange(n // samples if samples else 0, dtype=torch.int64, device=device)
    lowest = first // 4
    blocks = torch.arange(lowest, lowest + (index.numel() + first % 4 + 3) // 4, dtype=torch.int64, device=device)
    w = block(
        blocks & _MASK, (blocks >> 32) & _MASK, stream, 0, (keys & _MASK)[:, None], ((keys >> 32) & _MASK)[:, None]
    )
    w = torch.stack(torch.broadcast_tensors(*w), -1).reshape(samples, -1)
    return w[:, index - 4 * lowest].reshape(-1)


def normals(n: int, key: int, key_t: torch.Tensor | None, stream: int, first: int, device) -> torch.Tensor:
    """Standard normals in float64 [n], by the formula."""
    if n == 0:
        return torch.empty(0, dtype=torch.float64, device=device)
    samples = 1 if key_t is None else key_t.numel()
    per, skip = n // samples, first % 4
    whole = (per + skip + 3) // 4 * 4  # whole blocks: a pair needs both of its words
    w = words(samples * whole, key, key_t, stream, first - skip, device).reshape(samples, whole // 2, 2)
    r = torch.sqrt(-2 * torch.log(((w[..., 0] >> 9).double() + 0.5) * 2.0**-23))
    theta = w[..., 1].double() * (2 * math.pi * 2.0**-32)
    z = torch.stack((r * torch.cos(theta), r * torch.sin(theta)), -1).reshape(samples, whole)
    return z[:, skip : skip + per].reshape(-1)


def uniforms(n: int, key: int, key_t: torch.Tensor | None, stream: int, first: int, device) -> torch.Tensor:
    """Uniform numbers in [0, 1) in float64 [n]."""
    return (words(n, key, key_t, stream, first, device) >> 8).double() * 2.0**-24


def integers(n: int, key: int, key_t: torch.Tensor | None, stream: int, first: int, high: int, device) -> torch.Tensor:
    """int64 [n] in [0, high), high <= 2^32: the product is taken in halves, since it may pass 2^63."""
    w = words(n, key, key_t, stream, first, device)
    hi, lo = high >> 16, high & 0xFFFF
    return (w * hi + ((w * lo) >> 16)) >> 16
