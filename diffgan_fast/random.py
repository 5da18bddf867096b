"""Keys, and random tensors that are functions of a key and an index.

Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011). Number i of a stream depends on
(key, stream, i) alone: not on the device, the back end, the memory layout, the batch, or what was drawn before. A key
is an int in [0, 2^63), or an int64 tensor with one key, or one a sample (then sample n is what a batch of one with
key[n] would hold).
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Sequence
from typing import overload

import torch

from diffgan_fast import _philox
from diffgan_fast.ops.random import Draw, fill_
from diffgan_fast.ops.random import fold_in as fold_tensors
from diffgan_fast.ops.support import KEY_MASK, check_key, key_arguments

Key = int | torch.Tensor
Shape = int | Sequence[int]


def key(seed: int) -> int:
    """The key of a seed: any int, negative or large. Philox of the seed, so that near seeds give keys far apart."""
    if isinstance(seed, bool) or not isinstance(seed, int):
        raise ValueError(f"seed must be an int, got {seed!r}")
    return fold_in(seed & KEY_MASK, "seed", seed >> 63)


def key_from(generator: torch.Generator) -> int:
    """A key drawn from a torch.Generator, which moves on; for those who seed with `torch.manual_seed`."""
    return int(torch.randint(2**63 - 1, (), generator=generator, device=generator.device, dtype=torch.int64))


@overload
def fold_in(key: int, *data: int | str) -> int: ...
@overload
def fold_in(key: torch.Tensor, *data: int | str | torch.Tensor) -> torch.Tensor: ...
@overload
def fold_in(key: Key, *data: int | str | torch.Tensor) -> Key: ...
def fold_in(key: Key, *data: int | str | torch.Tensor) -> Key:
    """A new key from a key and data (a step number, a purpose): Philox of the data words under the key.

    Args:
        key: an int, or an int64 tensor.
        data: ints (taken modulo 2^64), strings (by their BLAKE2b-64), or int64 tensors. With a tensor anywhere the
            result is an int64 tensor of the broadcast shape on its device, equal to the int result bit for bit.

    Returns:
        An int in [0, 2^63), or an int64 tensor of such.
    """
    if not isinstance(key, torch.Tensor):
        check_key(key)
    elif key.dtype != torch.int64:
        raise ValueError(f"key must be an int in [0, 2**63) or an int64 tensor, got a tensor of {key.dtype}")
    for word in map(_data_word, data):
        if isinstance(key, torch.Tensor) or isinstance(word, torch.Tensor):
            key = fold_tensors(key, word)
        else:
            w = _philox.block_ints((word & 0xFFFFFFFF, word >> 32, 0xF01D, 1), (key & 0xFFFFFFFF, key >> 32))
            key = (w[0] | w[1] << 32) & KEY_MASK
    return key


def seed_torch(seed: int, device: torch.device) -> None:
    """Seeds torch's generators, for what draws from them (dropout): of the CPU and of one device.

    `torch.manual_seed` looks at all kinds of devices and seeds each of them, which takes a hundred times as long.
    """
    torch.default_generator.manual_seed(seed)
    if device.type == "cuda":
        index = torch.cuda.current_device() if device.index is None else device.index
        torch.cuda.default_generators[index].manual_seed(seed)


@functools.lru_cache(maxsize=1024)
def _name_word(name: str) -> int:
    return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), "little")


def _data_word(data: int | str | torch.Tensor) -> int | torch.Tensor:
    if isinstance(data, str):
        return _name_word(data)
    if isinstance(data, torch.Tensor):
        if data.dtype != torch.int64:
            raise ValueError(f"data must be ints, strings or int64 tensors, got a tensor of {data.dtype}")
        return data
    if isinstance(data, bool) or not isinstance(data, int):
        raise ValueError(f"data must be ints, strings or int64 tensors, got {data!r}")
    return data & (2**64 - 1)


def _make(draw: Draw, shape: Shape, key: Key, stream: int, first: int, high: int, dtype, device) -> torch.Tensor:
    if not 0 <= stream < 2**32:
        raise ValueError(f"stream must be in [0, 2**32), got {stream!r}")
    if not 0 <= first <= KEY_MASK:
        raise ValueError(f"first must be in [0, 2**63), got {first!r}")
    if device is None:
        device = key.device if isinstance(key, torch.Tensor) else "cpu"
    out = torch.empty((shape,) if isinstance(shape, int) else tuple(shape), dtype=dtype, device=device)
    samples = out.shape[0] if out.dim() else 1
    return fill_(out, draw, *key_arguments(key, out.device, samples, first), stream, first, high)


def normal(
    shape: Shape, key: Key, *, stream: int = 0, first: int = 0, dtype=torch.float32, device=None
) -> torch.Tensor:
    """Standard normals of `shape`, contiguous: numbers first, first + 1, … of a stream.

    Box-Muller on u = ((w0 >> 9) + 0.5)/2^23 and 2 pi w1/2^32; |z| <= 5.77; float32 arithmetic within 5e-6 of that
    formula (float64 where dtype is float64). dtype: float32, float64, float16 or bfloat16.
    """
    return _make(Draw.NORMAL, shape, key, stream, first, 0, dtype, device)


def uniform(
    shape: Shape, key: Key, *, stream: int = 0, first: int = 0, dtype=torch.float32, device=None
) -> torch.Tensor:
    """Uniform numbers in [0, 1), multiples of 2^-24 (rounded in half types). Arguments as `normal`."""
    return _make(Draw.UNIFORM, shape, key, stream, first, 0, dtype, device)


def randint(high: int, shape: Shape, key: Key, *, stream: int = 0, first: int = 0, device=None) -> torch.Tensor:
    """int64 integers in [0, high), 1 <= high <= 2^32, as (word · high) >> 32: a bias below high/2^32."""
    if not 1 <= high <= 2**32:
        raise ValueError(f"high must be in [1, 2**32], got {high!r}")
    return _make(Draw.INTEGERS, shape, key, stream, first, high, torch.int64, device)


def bits(n: Shape, key: Key, *, stream: int = 0, first: int = 0, device=None) -> torch.Tensor:
    """The raw 32-bit words, 0 … 2^32 - 1, as int64: the same on every back end, bit for bit."""
    return _make(Draw.BITS, n, key, stream, first, 2**32, torch.int64, device)
