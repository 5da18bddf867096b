"""Loads the native libraries that the build left beside this file, and knows why one is missing."""

from __future__ import annotations

import json
import os
import warnings
from pathlib import Path

import torch

_HERE = Path(__file__).resolve().parent
INSTRUCTION_SETS = ("baseline", "avx2", "avx512")


def build_info() -> dict:
    """What `setup.py` built, with the reason for every part that it left out. Empty if nothing was ever built."""
    path = _HERE / "_build_info.json"
    return json.loads(path.read_text()) if path.exists() else {}


def _load(name: str) -> str | None:
    """Loads one library. Returns None, or the reason why it is not there."""
    path = _HERE / f"_C_{name}.so"
    info = build_info().get(name, {})
    if not path.exists():
        return info.get("reason") or "not built (install the package with `pip install -e .`)"
    try:
        torch.ops.load_library(str(path))
    except OSError as error:
        return f"built for torch {info.get('torch')}, does not load with torch {torch.__version__}: {error}"
    return None


def _load_cpu() -> str | None:
    wanted = os.environ.get("DIFFGAN_FAST_CPU")
    if wanted is not None and wanted not in INSTRUCTION_SETS:
        raise ValueError(f"DIFFGAN_FAST_CPU={wanted!r}: expected one of {', '.join(INSTRUCTION_SETS)}")
    reason = _load("cpu")
    if reason is None and wanted and (used := torch.ops.diffgan_fast.cpu_instruction_set()) != wanted:
        raise ValueError(f"DIFFGAN_FAST_CPU={wanted!r}: this processor or this build offers only {used!r}")
    return reason


def _load_cuda() -> str | None:
    if torch.version.cuda is None:
        return "this torch has no CUDA"
    if not torch.cuda.is_available():
        return "torch sees no CUDA device"
    return _load("cuda")


def cuda_fits() -> bool:
    """Whether the CUDA library has code for the current device."""
    archs = build_info().get("cuda", {}).get("archs", [])
    return runs_on(archs, torch.cuda.get_device_capability())


def runs_on(archs: list[str], capability: tuple[int, int]) -> bool:
    """Whether code for `archs` runs on a device: sm_XY of the same generation and no later, or compute_XY no later."""
    built = [(kind, divmod(int(number), 10)) for kind, number in (arch.split("_") for arch in archs)]
    return any(of <= capability and (kind == "compute" or of[0] == capability[0]) for kind, of in built)


LIBRARY = torch.library.Library("diffgan_fast", "DEF")
LIBRARY.define("cpu_instruction_set() -> str")
LIBRARY.define("philox4x32(Tensor counter, Tensor key) -> Tensor")

CPU_REASON = _load_cpu()
CUDA_REASON = _load_cuda()

try:
    from diffgan_fast import _host as host  # type: ignore[attr-defined]  # compiled, where it could be
except ImportError:
    host = None  # NumPy arrays then come from the torch reference


def warn_if_slow() -> None:
    """Says once, when "auto" has nothing faster than the reference for the CPU, why that is so."""
    if CPU_REASON is not None:
        warnings.warn(f"diffgan_fast runs its plain torch reference on the CPU: {CPU_REASON}", stacklevel=3)
