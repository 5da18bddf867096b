"""The raw op behind `diffgan_fast.random`: fills a tensor with numbers of a Philox stream."""

from __future__ import annotations

import enum

import torch

from diffgan_fast import _philox
from diffgan_fast.ops.dispatch import Op


class Draw(enum.IntEnum):
    """What a word becomes.

    The values are those of `Draw` in csrc/grid.h and kernels/random.py.
    """

    BITS = 0
    UNIFORM = 1
    NORMAL = 2
    INTEGERS = 3


def _reference(out, key, key_t, stream, first, draw, high) -> None:
    args = (out.numel(), key, key_t, stream, first)
    if draw == Draw.NORMAL:
        values = _philox.normals(*args, out.device)
    elif draw == Draw.UNIFORM:
        values = _philox.uniforms(*args, out.device)
    else:
        values = _philox.integers(*args, high, out.device)
    out.copy_(values.reshape(out.shape))


def _fake(out, key, key_t, stream, first, draw, high) -> None:
    return None


_RANDOM = Op(
    "random",
    "random_",
    "(Tensor(a!) out, SymInt key, Tensor? key_t, int stream, SymInt first, int draw, SymInt high) -> ()",
    _reference,
    _fake,
)


def fill_(out: torch.Tensor, draw: Draw, key: int, key_t: torch.Tensor | None, stream: int, first: int, high: int):
    """Fills a new contiguous tensor and returns it. `key_t` as `support.key_arguments` gives it."""
    _RANDOM.on(out.device.type)(out, key, key_t, stream, first, int(draw), high)
    return out


def _fold_reference(key, key_t, word, word_t) -> torch.Tensor:
    return _philox.fold_in(key if key_t is None else key_t, word if word_t is None else word_t)


def _fold_fake(key, key_t, word, word_t) -> torch.Tensor:
    return torch.empty_like(word_t if key_t is None else key_t)


_FOLD_IN = Op(
    "random",
    "fold_in",
    "(SymInt key, Tensor? key_t, SymInt word, Tensor? word_t) -> Tensor",
    _fold_reference,
    _fold_fake,
)


def fold_in(key: int | torch.Tensor, word: int | torch.Tensor) -> torch.Tensor:
    """`random.fold_in` on the device: int64 keys of the broadcast shape. `key`, `word` or both are int64 tensors."""
    tensors = [v for v in (key, word) if isinstance(v, torch.Tensor)]
    spread = iter([v.contiguous() for v in torch.broadcast_tensors(*tensors)])
    arguments: list[int | torch.Tensor | None] = []
    for v in (key, word):
        arguments += (0, next(spread)) if isinstance(v, torch.Tensor) else (v - 2**64 if v >> 63 else v, None)
    return _FOLD_IN.on(tensors[0].device.type)(*arguments)


def standard_normal(x: torch.Tensor, key: int, key_t: torch.Tensor | None, first: int, stream: int = 0) -> torch.Tensor:
    """The noise of an op on x, in plain torch and in the dtype of the arithmetic: what the kernels make on the fly."""
    z = _philox.normals(x.numel(), key, key_t, stream, first, x.device).reshape(x.shape)
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    return torch.empty_like(x, dtype=dtype).copy_(z)  # in x's memory format
