"""The gate for machines without a GPU: every Triton kernel becomes machine code, without spills, with wide accesses."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="triton is not installed")
ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize("sm", [80, 90, 100])
def test_every_kernel_compiles(sm):
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "tests.kernels.compile_all", str(sm)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stderr[-4000:]
    kernels = {k["label"]: k for k in map(json.loads, done.stdout.splitlines())}
    assert len(kernels) == 31
    for kernel in kernels.values():
        assert kernel["stack"] == 0 and kernel["local"] == 0, kernel
    # A thread moves two runs of four float32 in, and two out, each in one access (channels_last: of channels).
    for label in ("add_noise float32", "add_noise last float32"):
        assert kernels[label]["LDG.E.128"] == 2 and kernels[label]["STG.E.128"] == 2, kernels[label]
    assert kernels["interpolate float32"]["LDG.E.128"] == 4 and kernels["interpolate float32"]["STG.E.128"] == 2
    assert kernels["gradient_norm float32"]["LDG.E.128"] == 2
