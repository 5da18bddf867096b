"""Registration of the raw ops (`torch.ops.diffgan_fast.*`) and the choice of a back end for a call.

An op has one schema and up to four implementations of it: the reference (a Python function), C++ for the CPU and CUDA
C++ (both under the op's own name), and Triton (under `<name>_triton`). Raw ops are private: they know nothing of
gradients, ranges or friendly errors. Those live in the public function of the op's file.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable

import torch

from diffgan_fast._native import LIBRARY
from diffgan_fast.backends import resolve


class Op:
    """One raw op. `op.on(device_type)` is the callable that runs it there under the current back end."""

    def __init__(self, stem: str, name: str, schema: str, reference: Callable, fake: Callable):
        self.reference = reference
        for suffix in ("", "_triton"):
            LIBRARY.define(f"{name}{suffix}{schema}", tags=(torch.Tag.pt2_compliant_tag,))
            torch.library.register_fake(f"diffgan_fast::{name}{suffix}", fake, lib=LIBRARY)

        def run_triton(*args, **kwargs):
            kernels = importlib.import_module(f"diffgan_fast.kernels.{stem}")
            return getattr(kernels, name)(*args, **kwargs)

        LIBRARY.impl(f"{name}_triton", run_triton, "CompositeExplicitAutograd")
        native = getattr(torch.ops.diffgan_fast, name).default
        triton = getattr(torch.ops.diffgan_fast, f"{name}_triton").default
        self._table = {"reference": reference, "cpu": native, "cuda": native, "triton": triton}

    def on(self, device_type: str) -> Callable:
        return self._table[resolve(device_type)]
