"""Which code runs an op: the plain torch reference, C++ on the CPU, CUDA C++, or Triton.

The choice is made in Python before an op is called, so nothing is dispatched twice and torch.compile sees a plain call.
"""

from __future__ import annotations

import functools
import importlib.util
import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager

import torch

from diffgan_fast import _native

BACKENDS = ("reference", "cpu", "cuda", "triton")


class BackendError(RuntimeError):
    """A back end was asked for by name and cannot run here, or not on these tensors."""


@functools.cache
def _triton_reason() -> str | None:
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    if importlib.util.find_spec("diffgan_fast.kernels") is None:
        return "the kernels are not installed (pip install -e .)"
    if os.environ.get("TRITON_INTERPRET") != "1" and not torch.cuda.is_available():
        return "no CUDA device (TRITON_INTERPRET=1 runs the kernels slowly on the CPU)"
    return None


def unavailable(name: str) -> str | None:
    """None if back end `name` can run here, else the reason why not. ValueError for an unknown name."""
    if name == "reference":
        return None
    if name == "cpu":
        return _native.CPU_REASON
    if name == "cuda":
        return _native.CUDA_REASON
    if name == "triton":
        return _triton_reason()
    raise ValueError(f"backend must be one of auto, {', '.join(BACKENDS)}; got {name!r}")


def _checked(name: str) -> str:
    if name != "auto" and (reason := unavailable(name)):
        raise BackendError(f"back end {name!r} is not available: {reason}")
    return name


_current = _checked(os.environ.get("DIFFGAN_FAST_BACKEND", "auto"))


TRITON_FROM = (8, 0)  # the least compute capability that Triton compiles for
_AUTO: dict[str, str] = {}  # what "auto" means for a device type, found once


def _fastest(device_type: str) -> str:
    if device_type == "cuda":
        fit = {"cuda": _native.cuda_fits(), "triton": torch.cuda.get_device_capability() >= TRITON_FROM}
        return next((name for name, fits in fit.items() if fits and unavailable(name) is None), "reference")
    if device_type == "cpu":
        if unavailable("cpu") is None:
            return "cpu"
        _native.warn_if_slow()
    return "reference"


_DEVICES = {"cpu": ("cpu",), "cuda": ("cuda",), "triton": ("cuda", "cpu")}


def resolve(device_type: str) -> str:
    """The back end that runs an op on tensors of this device type ("cpu", "cuda", …), under the current setting."""
    if _current == "auto":
        name = _AUTO.get(device_type)
        if name is None:
            name = _AUTO[device_type] = _fastest(device_type)
        return name
    if _current != "reference" and device_type not in _DEVICES[_current]:
        raise BackendError(f"back end {_current!r} does not run on {device_type} tensors")
    return _current


def backend(name: str) -> AbstractContextManager[None]:
    """Sets the back end of all ops: "auto", "reference", "cpu", "cuda" or "triton".

    Acts at once; used as a context manager, the earlier setting comes back at the end. The environment variable
    DIFFGAN_FAST_BACKEND gives the first setting. "auto" takes the fastest there is for a tensor's device and never
    fails; a named back end that cannot run here raises `BackendError` with the reason.
    """
    global _current
    before, _current = _current, _checked(name)

    @contextmanager
    def restore() -> Iterator[None]:
        global _current
        try:
            yield
        finally:
            _current = before

    return restore()


def info() -> dict:
    """What runs here: versions, and for each back end whether it is available, what it was built for, or why not."""
    built = _native.build_info()
    rows: dict[str, dict] = {}
    for name in BACKENDS:
        reason = unavailable(name)
        rows[name] = {"available": reason is None} | ({"reason": reason} if reason else {})
        rows[name] |= {k: v for k, v in built.get(name, {}).items() if k not in ("built", "reason")}
    if rows["cpu"]["available"]:
        rows["cpu"]["in_use"] = torch.ops.diffgan_fast.cpu_instruction_set()
    host = {"available": _native.host is not None} | {k: v for k, v in built.get("host", {}).items() if k != "built"}
    devices = ["cpu"] + [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {
        "version": built.get("version", "not built"),
        "torch": torch.__version__,
        "setting": _current,
        "devices": devices,
        "backends": rows,
        "host": host,
    }
