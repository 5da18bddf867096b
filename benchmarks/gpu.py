"""`python -m benchmarks.gpu`: everything that a machine with a GPU is for, in one command.

Stages, each bounded in time, each with a log; one that fails is reported and the others still run:
    build        `pip install --no-build-isolation --no-deps -e .`, if csrc/ is newer than the built CUDA library
    pytest       the whole suite, the tests marked `gpu` with it
    check-*      `benchmarks.sanitize`: every op of a back end on odd sizes, plain and under compute-sanitizer
    random …     the benchmarks, those of whole steps without torch.compile, which takes minutes a network

Logs, tables and `gpu.json` (result, seconds and GPU readings of each stage) go to benchmarks/results/<machine>/; if the
variable OUT names a folder, all of that is packed into one archive there after every stage. Exit code: 0, 1 if a stage
failed or was not reached, 2 without a GPU.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from dataclasses import dataclass, field
from pathlib import Path

import torch

from benchmarks import machine, report
from benchmarks.__main__ import NAMES, OPS
from diffgan_fast.engine.gpu import state as gpu_state

PYTHON = [sys.executable, "-m"]
HOSTS = ("conv", "norm", "metrics")  # what is measured of the CPU alone, or mostly
MAIN = {"1024x3x32x32", "128x1x28x28"}  # the shapes of the short table


@dataclass(frozen=True)
class Stage:
    """A command with the most seconds that it may take."""

    name: str
    command: list[str]
    limit_s: int
    environment: dict[str, str] = field(default_factory=dict)


def needs_build() -> bool:
    """Whether the CUDA library is missing or older than its sources."""
    library = machine.ROOT / "diffgan_fast" / "_C_cuda.so"
    sources = [machine.ROOT / "setup.py", *(path for path in (machine.ROOT / "csrc").rglob("*") if path.is_file())]
    return not library.exists() or any(path.stat().st_mtime > library.stat().st_mtime for path in sources)


def stages(out: Path) -> list[Stage]:
    """All stages, in order."""
    found = []
    if needs_build():
        install = [*PYTHON, "pip", "install", "-q", "--no-build-isolation", "--no-deps", "-e", "."]
        found.append(Stage("build", install, 300, {"DIFFGAN_FAST_CUDA": "1"}))
    count = str(max(1, min(8, (os.cpu_count() or 1) // 2)))
    workers = ["-n", count, "--dist", "worksteal"] if importlib.util.find_spec("xdist") else []
    found.append(Stage("pytest", [*PYTHON, "pytest", "-q", "-ra", "--durations=10", *workers], 560))
    sanitizer = shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"
    for backend in ("cuda", "triton"):
        ops = [*PYTHON, "benchmarks.sanitize", backend]
        found.append(Stage(f"check-{backend}", ops, 200))  # it also fills Triton's cache for the slow runs below
        for tool in ("memcheck", "racecheck"):
            # Every tensor gets an allocation of its own: a pool would hide accesses past its end.
            alone = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
            # what torch asks of the driver before there is a context is an error to it, and none of a kernel
            quiet = ["--report-api-errors", "no"] if tool == "memcheck" else []
            watched = [sanitizer, "--tool", tool, *quiet, "--error-exitcode", "9", "--print-limit", "20", *ops]
            found.append(Stage(f"check-{backend}-{tool}", watched, 300, alone))
    for name in (name for name in NAMES if name not in HOSTS):
        command = [*PYTHON, "benchmarks", name, "--device", "cuda", "--out", str(out)]
        found.append(Stage(name, command + ["--no-compile"] * (name not in OPS), 300))
    return found


def _busiest(states: list[dict]) -> dict:
    """The reading with the highest power, and every throttle reason that was seen."""
    states = [state for state in states if isinstance(state.get("power_w"), float)]
    if not states:
        return {}
    seen = sorted({state.get("throttle_reasons", "not readable") for state in states})
    return max(states, key=lambda state: state["power_w"]) | {"throttle_reasons": seen}


def run_stage(stage: Stage, log: Path, limit_s: float) -> dict:
    """Runs a stage for at most `limit_s` seconds; what it came to, with its log's last line and the GPU's readings."""
    start, states = time.monotonic(), []
    with log.open("w") as file:
        try:
            process = subprocess.Popen(
                stage.command, cwd=machine.ROOT, env=os.environ | stage.environment, stdout=file,
                stderr=subprocess.STDOUT, start_new_session=True,
            )  # fmt: skip
        except OSError as error:
            return {"stage": stage.name, "result": f"failed: {error}", "seconds": 0.0, "last_line": "", "gpu": {}}
        result = None
        while result is None:
            try:
                code = process.wait(timeout=min(1.0, max(0.01, limit_s - (time.monotonic() - start))))
                result = "ok" if code == 0 else f"failed ({code})"
            except subprocess.TimeoutExpired:
                states.append(gpu_state())
                if time.monotonic() - start >= limit_s:
                    os.killpg(process.pid, signal.SIGKILL)  # the group that this call started
                    process.wait()
                    result = f"over {limit_s:.0f} s"
    lines = log.read_text(errors="replace").strip().splitlines()
    return {"stage": stage.name, "result": result, "seconds": round(time.monotonic() - start, 1),
            "last_line": lines[-1] if lines else "", "gpu": _busiest(states)}  # fmt: skip


def pack(folder: Path) -> None:
    """Packs the results into one archive in $OUT, if that is set."""
    if target := os.environ.get("OUT"):
        with tarfile.open(Path(target) / f"{folder.name}.tar.gz", "w:gz") as archive:
            archive.add(folder, folder.name)


def short_table(folder: Path) -> str:
    """Our rows at the main sizes, of every benchmark that left a result."""
    rows = []
    for name in NAMES:
        path = folder / f"{name}.json"
        if path.exists():
            found = json.loads(path.read_text())["rows"]
            rows += [r for r in found if r["shape"] in MAIN and (r["provider"].startswith("dgf") or name == "training")]
    return report.table(rows) if rows else "no results"


def main(argv: list[str] | None = None) -> int:
    """Runs the chosen stages and prints two short tables. Returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    parser.add_argument("--out", type=Path, default=machine.RESULTS, help="folder of the results")
    parser.add_argument("--stages", nargs="+", metavar="NAME", help="only stages whose names start with one of these")
    parser.add_argument("--budget", type=float, default=float("inf"), help="seconds for all stages together")
    arguments = parser.parse_args(argv)
    if not torch.cuda.is_available():
        print("no GPU: torch sees no CUDA device here", file=sys.stderr)
        return 2
    out = arguments.out.resolve()
    folder = out / machine.slug("cuda")
    (folder / "logs").mkdir(parents=True, exist_ok=True)
    end = time.monotonic() + arguments.budget
    done: list[dict] = []
    chosen = tuple(arguments.stages or ("",))
    for stage in (s for s in stages(out) if s.name.startswith(chosen)):
        left = min(stage.limit_s, end - time.monotonic())
        if left <= 0:
            done.append({"stage": stage.name, "result": "not reached", "seconds": 0.0, "last_line": "", "gpu": {}})
            continue
        print(f"{stage.name} …", flush=True)
        done.append(run_stage(stage, folder / "logs" / f"{stage.name}.log", left))
        summary = {"meta": machine.describe("cuda"), "stages": done}
        (folder / "gpu.json").write_text(json.dumps(summary, indent=1) + "\n")
        pack(folder)
    print(short_table(folder))
    for row in done:
        print(f"{row['stage']:24} {row['result']:16} {row['seconds']:7.1f} s  {row['last_line'][:90]}")
    return int(any(row["result"] != "ok" for row in done))


if __name__ == "__main__":
    sys.exit(main())
