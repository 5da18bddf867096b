"""In which precision a step's networks compute. Weights, losses, penalties, gradients and optimisers are float32."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal, get_args

import torch

Precision = Literal["fp32", "tf32", "bf16", "fp16"]
_HALF = {"bf16": torch.bfloat16, "fp16": torch.float16}


def check(precision: Precision, device: torch.device) -> None:
    """ValueError for a precision that there is not, or that a device does not have."""
    if precision not in get_args(Precision):
        raise ValueError(f"precision must be one of {', '.join(get_args(Precision))}; got {precision!r}")
    if precision == "tf32" and device.type != "cuda":
        raise ValueError(f"precision must be fp32, bf16 or fp16 on {device.type!r}; got 'tf32', which is CUDA's")


@contextmanager
def reduced(precision: Precision, device: torch.device) -> Iterator[None]:
    """What a step runs in: autocast of its networks, or TF32 for products of float32; torch's settings come back."""
    if precision == "tf32":
        with _tf32():
            yield
        return
    # without the cache: a weight that was cast before its update, or without a graph, must not be found again
    half = _HALF.get(precision)
    with torch.autocast(device.type, half, enabled=half is not None, cache_enabled=False):
        yield


@contextmanager
def _tf32() -> Iterator[None]:
    convolutions: Any = torch.backends.cudnn.conv  # type: ignore[attr-defined]
    before = torch.get_float32_matmul_precision(), convolutions.fp32_precision
    torch.set_float32_matmul_precision("high")
    convolutions.fp32_precision = "tf32"
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before[0])
        convolutions.fp32_precision = before[1]


def full(device: torch.device) -> torch.autocast:
    """Leaves the autocast of `reduced`: for backward passes and updates."""
    return torch.autocast(device.type, enabled=False)


def scaler(precision: Precision, device: torch.device) -> torch.amp.GradScaler:
    """Of the loss of one optimiser: float16 has no small gradients. Of other precisions it leaves all as it is."""
    return torch.amp.GradScaler(device.type, enabled=precision == "fp16")
