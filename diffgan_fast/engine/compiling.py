"""Networks that are compiled while they train, each by itself and in place: no name in them changes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import nn

Compile = Literal["auto"] | bool
# dropout draws what it draws without: the chain runs a step twice, once with a graph and once without one
SETTINGS: dict[str, Any] = {"dynamic": False, "options": {"fallback_random": True}}


@contextmanager
def compiled(nets: Mapping[str, nn.Module], how: Compile, device: torch.device) -> Iterator[None]:
    """Networks compiled, at their first call, for as long as the block lasts. "auto": on CUDA.

    What has no parameters stays as it is: the noise of Diffusion-GAN is told an int key, and would be compiled for each
    one. Gradient penalties call a compiled critic eagerly, for compiled code has no double backward.
    """
    wanted = device.type == "cuda" if how == "auto" else how
    chosen: list[Any] = [net for net in nets.values() if wanted and any(True for _ in net.parameters())]
    before = [net._compiled_call_impl for net in chosen]
    for net in chosen:
        net.compile(**SETTINGS)
    try:
        yield
    finally:
        for net, call in zip(chosen, before, strict=True):
            net._compiled_call_impl = call
