"""What the public ops share: checks of arguments, coefficient rows in plain torch, and when autograd is needed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, overload

import torch
from torch.autograd import forward_ad
from torch.nn.utils.parametrizations import _SpectralNorm
from torch.nn.utils.spectral_norm import SpectralNorm

from diffgan_fast.graphs import NotCapturable

KEY_MASK = 2**63 - 1
FLOATS = (torch.float32, torch.float64, torch.float16, torch.bfloat16)


def check_key(key: Any) -> None:
    """ValueError unless `key` is an int in [0, 2^63)."""
    if isinstance(key, bool) or not isinstance(key, int | torch.SymInt) or not 0 <= key <= KEY_MASK:
        raise ValueError(f"key must be an int in [0, 2**63) or an int64 tensor, got {key!r}")


def key_arguments(
    key: int | torch.Tensor, device: torch.device, samples: int, first: int
) -> tuple[int, torch.Tensor | None]:
    """The pair (key, key_t) of the raw ops from a public `key`: an int, or int64 of one element or one a sample."""
    if isinstance(key, torch.Tensor):
        if key.dtype != torch.int64 or key.device != device:
            raise ValueError(f"key must be int64 on {device}, got {key.dtype} on {key.device}")
        if key.numel() == 1:
            return 0, key
        if key.dim() != 1 or key.numel() != samples:
            raise ValueError(
                f"key must hold one key, or one for each of {samples} samples; got shape {list(key.shape)}"
            )
        if first:
            raise ValueError("with one key a sample the noise does not depend on the batch: first_sample must be 0")
        return 0, key.contiguous()
    check_key(key)
    if device.type == "cuda" and not torch.compiler.is_compiling() and torch.cuda.is_current_stream_capturing():
        raise NotCapturable(
            "key is an int, which a CUDA graph would repeat at every replay: pass an int64 tensor on the device"
        )
    return key, None


def first_element(first_sample: int, x: torch.Tensor) -> int:
    """The number of x's first element in the global batch."""
    if first_sample == 0:
        return 0
    if isinstance(first_sample, bool) or not isinstance(first_sample, int | torch.SymInt) or first_sample < 0:
        raise ValueError(f"first_sample must be an int >= 0, got {first_sample!r}")
    return first_sample * (x.numel() // x.shape[0] if x.shape[0] else 0)


def dense(x: torch.Tensor, name: str) -> torch.Tensor:
    """x itself if it is contiguous or channels_last, else a contiguous copy. ValueError for what no op takes."""
    if not isinstance(x, torch.Tensor) or x.dtype not in FLOATS:
        got = f"a tensor of {x.dtype}" if isinstance(x, torch.Tensor) else type(x).__name__
        raise ValueError(f"{name} must be a float32, float64, float16 or bfloat16 tensor, got {got}")
    if x.dim() == 0:
        raise ValueError(f"{name} must have a batch dimension, got a scalar")
    if x.is_contiguous() or (x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last)):
        return x
    return x.contiguous()


@overload
def matching(x: torch.Tensor, y: torch.Tensor, name: str, like: str = "x") -> torch.Tensor: ...
@overload
def matching(x: torch.Tensor, y: None, name: str, like: str = "x") -> None: ...
def matching(x: torch.Tensor, y: torch.Tensor | None, name: str, like: str = "x") -> torch.Tensor | None:
    """y in x's memory format. ValueError unless it has x's shape, dtype and device."""
    if y is None:
        return None
    if y.shape != x.shape or y.dtype != x.dtype or y.device != x.device:
        raise ValueError(
            f"{name} must match {like} ({list(x.shape)}, {x.dtype}, {x.device}), "
            f"got {list(y.shape)}, {y.dtype}, {y.device}"
        )
    if y.stride() == x.stride():
        return y
    return y.contiguous(memory_format=torch.contiguous_format if x.is_contiguous() else torch.channels_last)


def t_arguments(
    t: int | torch.Tensor, x: torch.Tensor, low: int, high: int, name: str = "t"
) -> tuple[int, torch.Tensor | None]:
    """The pair (row, t) of the raw ops from a public `t`: an int, or int64 [N] or [N, C] on x's device."""
    if isinstance(t, torch.Tensor):
        if t.dtype != torch.int64 or t.device != x.device:
            raise ValueError(f"{name} must be an int or int64 on {x.device}, got {t.dtype} on {t.device}")
        if t.dim() not in (1, 2) or t.shape != x.shape[: t.dim()] or (t.dim() == 2 and x.dim() < 3):
            raise ValueError(f"{name} must be [N] or [N, C] for x of shape {list(x.shape)}, got {list(t.shape)}")
        return 0, t.contiguous()
    if isinstance(t, bool) or not isinstance(t, int | torch.SymInt):
        raise ValueError(f"{name} must be an int or an int64 tensor, got {t!r}")
    if not low <= t <= high:
        raise ValueError(f"{name} must be in {low}..{high}, got {t}")
    return t, None


def check_range(t: torch.Tensor, low: int, high: int | torch.Tensor, name: str = "t") -> None:
    """ValueError if a CPU tensor of steps leaves low..high. CUDA ones are not looked at: that would wait for them."""
    if t.device.type == "cpu" and t.numel() and not torch.compiler.is_compiling():
        least, most = (int(v) for v in torch.aminmax(t))
        if least < low or most > int(high):
            raise ValueError(f"{name} must be in {low}..{int(high)}, got values in {least}..{most}")


def call(run: Callable, t: torch.Tensor | None, low: int, high: int, *args):
    """Runs a raw op.

    The C++ kernels find a CPU t out of range by themselves, at no cost; here it becomes a ValueError.
    """
    try:
        return run(*args)
    except RuntimeError:
        if t is not None:
            check_range(t, low, high)
        raise


def differentiable(function: type[torch.autograd.Function]) -> Callable:
    """The call of an autograd.Function that is written with `setup_context` and, for forward mode, `tangent`.

    Three forms of one class, since torch has no single one that serves all: eager calls take the old form, which is
    100 µs faster (the separate `setup_context` binds its arguments by inspection); torch.func transforms need the
    separate form; torch.compile needs it too, and refuses a class that has a `jvp`.
    """

    class Separate(function):  # type: ignore[misc, valid-type]
        jvp = staticmethod(getattr(function, "tangent", torch.autograd.Function.jvp))

    class Eager(Separate):
        setup_context = staticmethod(torch.autograd.Function.setup_context)

        @staticmethod
        def forward(ctx, *args):
            output = function.forward(*args)
            function.setup_context(ctx, args, output)
            return output

    def apply(*args):
        if torch.compiler.is_compiling():
            return function.apply(*args)
        return (Separate if torch._C._are_functorch_transforms_active() else Eager).apply(*args)

    return apply


def needs_autograd(*tensors: torch.Tensor | None) -> bool:
    """Whether a call must go through its autograd.Function: an input needs gradients, or carries a tangent."""
    if torch.is_grad_enabled():
        for x in tensors:
            if x is not None and x.requires_grad:
                return True
    return forward_ad._current_level >= 0


def save_rows(ctx: Any, constants: tuple, *tensors: torch.Tensor | None) -> None:
    """Keeps the rows and t of a call, which lead its constants, and `tensors` for backward and tangent.

    As saved tensors, so that torch notices if one is changed in place before they are used.
    """
    rows, t, ctx.row = constants[:3]
    ctx.save_for_backward(rows, t, *tensors)
    ctx.save_for_forward(rows, t, *tensors)


def saved_rows(ctx: Any) -> tuple[torch.Tensor, torch.Tensor | None, int]:
    """What `save_rows` kept of the rows: the first arguments of `pick_rows`."""
    return ctx.saved_tensors[0], ctx.saved_tensors[1], ctx.row


def take(table: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    """Rows t of a table, [t.numel(), …]; NaN where t is out of range, which is never read."""
    flat, last = t.reshape(-1), table.shape[0] - 1
    bad = ((flat < 0) | (flat > last)).reshape(-1, *[1] * (table.dim() - 1))
    return table.index_select(0, flat.clamp(0, last)).masked_fill(bad, float("nan"))


def pick_rows(rows: torch.Tensor, t: torch.Tensor | None, row: int, like: torch.Tensor) -> list[torch.Tensor]:
    """The columns of the coefficient rows of a call, each shaped to broadcast against `like`.

    Row t where t is given (NaN where t is out of range), else row `row`, or one row a sample where row is -1.
    """
    shape: tuple[int, ...]
    if t is None:
        if row >= 0:
            return list(rows[row].unbind(0))
        picked, shape = rows, (rows.shape[0],)
    else:
        picked, shape = take(rows, t), t.shape
    return [c.reshape(*shape, *[1] * (like.dim() - len(shape))) for c in picked.unbind(1)]


def defined_rows(rows: torch.Tensor, t: torch.Tensor | None, row: int, x: torch.Tensor) -> list[torch.Tensor]:
    """`pick_rows` for a reference op: on the CPU an undefined row is an error, as it is in C++."""
    columns = pick_rows(rows, t, row, x)
    if x.device.type == "cpu" and not torch.compiler.is_compiling() and bool(columns[0].isnan().any()):
        raise RuntimeError("diffgan_fast: t is out of range")
    return columns


def estimates_spectrum(layer: torch.nn.Module) -> bool:
    """Whether a layer is a spectral norm in train mode, whose every call changes its weight."""
    old = any(isinstance(hook, SpectralNorm) for hook in layer._forward_pre_hooks.values())
    return layer.training and (old or isinstance(layer, _SpectralNorm))
