"""Where a result was measured: the machine, versions, the revision of the code, and the GPU's state."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
import subprocess
import time
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
# Without these glibc gives large blocks back to the system after every call, and page faults are what gets measured.
ALLOCATOR = {"MALLOC_MMAP_THRESHOLD_": "2147483648", "MALLOC_TRIM_THRESHOLD_": "4294967296"}


def cpu_model() -> str:
    """The processor's name, and its family and model where the system gives them: virtual machines share names."""
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        text = ""
    found = {key: re.search(rf"^{key}\s*:\s*(.+)$", text, re.M) for key in ("model name", "cpu family", "model")}
    name, family, model = (match and match.group(1).strip() for match in found.values())
    if name is None:
        return platform.processor() or platform.machine()
    return f"{name}, family {family} model {model}" if family and model else name


def slug(device: str) -> str:
    """The folder name of this machine's results: cpu-<model>-<cores>-cores or gpu-<name>."""
    name = f"gpu-{torch.cuda.get_device_name()}" if device == "cuda" else f"cpu-{cpu_model()}-{os.cpu_count()}-cores"
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def version(package: str) -> str | None:
    """The installed version of a package, None without it."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _git(*arguments: str) -> str | None:
    try:
        done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()


def describe(device: str) -> dict:
    """What is saved beside every result."""
    changes = _git("status", "--porcelain", "--", ".", ":!benchmarks/results")
    return {
        "machine": slug(device),
        "device": device,
        "cpu": cpu_model(),
        "cores": os.cpu_count(),
        "gpu": torch.cuda.get_device_name() if device == "cuda" else None,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": version("triton"),
        "diffusers": version("diffusers"),
        "git": _git("rev-parse", "HEAD"),
        "dirty": None if changes is None else bool(changes),
        "date": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
    }
