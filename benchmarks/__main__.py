"""`python -m benchmarks NAME`: one benchmark, measured in fresh processes. Prints a table and saves it."""

from __future__ import annotations

import argparse
import importlib
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

import diffgan_fast as dgf
from benchmarks import machine, report
from benchmarks.cases import NATIVE, Options
from diffgan_fast import backends
from diffgan_fast.engine.gpu import state as gpu_state

OPS = ("random", "noise", "step", "loss", "penalty")
NAMES = (
    *OPS,
    "conv",
    "norm",
    "training",
    "steps",
    "points",
    "chain",
    "sampling",
    "metrics",
    "ddgan",
    "instance_noise",
)  # whole steps too


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("benchmark", choices=NAMES)
    parser.add_argument("--device", choices=tuple(NATIVE), default="cpu")
    parser.add_argument("--threads", type=int, nargs="+", help="CPU threads, each measured in processes of its own "
                        "(default: 1 and all cores; on a GPU torch's default)")  # fmt: skip
    parser.add_argument("--processes", type=int, help="best of how many (default: 1, for ops on the CPU 3)")
    parser.add_argument("--quick", action="store_true", help="tiny sizes, a few calls: only shows that it works")
    parser.add_argument("--no-compile", action="store_true", help="leave torch.compile out")
    parser.add_argument("--out", type=Path, default=machine.RESULTS, help="folder of the results")
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)  # the file that one measuring process writes
    arguments = parser.parse_args(argv)
    if arguments.threads is None:
        threads = {torch.get_num_threads()} if arguments.device == "cuda" else {1, os.cpu_count() or 1}
        if arguments.benchmark in ("chain", "metrics"):  # minutes a row
            threads = {max(threads)}
        arguments.threads = sorted(threads)
    if arguments.processes is None:
        once = arguments.quick or arguments.device == "cuda" or arguments.benchmark not in OPS
        arguments.processes = 1 if once else 3
    return arguments


def say_what_runs(device: str) -> bool:
    """Prints the files and back ends in use. False, with the reason, if the device's native library is missing."""
    info = dgf.info()
    print(f"diffgan_fast {info['version']} from {dgf.__file__}, torch {info['torch']}")
    for name, about in info["backends"].items():
        print(f"  {name}: " + ", ".join(f"{k} {v}" for k, v in about.items() if k != "available"))
    reason = "torch sees no CUDA device" if device == "cuda" and not torch.cuda.is_available() else None
    reason = reason or backends.unavailable(device)
    if reason:
        print(f"error: nothing to measure on {device}: {reason}", file=sys.stderr)
    return reason is None


def work(arguments: argparse.Namespace) -> None:
    """One measuring process: sets the threads, measures, writes its rows."""
    threads = arguments.threads[0]
    torch.set_num_threads(threads)
    if not arguments.no_compile:
        from torch._inductor import config

        config.cpp.threads = threads  # part of the key under which compiled code is cached
    options = Options(arguments.device, threads, arguments.quick, not arguments.no_compile)
    rows = importlib.import_module(f"benchmarks.{arguments.benchmark}").run(options)
    arguments.worker.write_text(json.dumps(rows))


def measure(arguments: argparse.Namespace) -> list[dict]:
    """The rows of all measuring processes, each started afresh."""
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "rows.json"
        for threads in arguments.threads:
            for process in range(arguments.processes):
                print(f"{threads} threads, process {process + 1} of {arguments.processes}", flush=True)
                command = [sys.executable, "-m", "benchmarks", arguments.benchmark, "--device", arguments.device,
                           "--threads", str(threads), "--worker", str(path)]  # fmt: skip
                command += ["--quick"] * arguments.quick + ["--no-compile"] * arguments.no_compile
                blas = {"OPENBLAS_NUM_THREADS": str(threads)}  # NumPy's and SciPy's own
                subprocess.run(command, cwd=machine.ROOT, env=os.environ | machine.ALLOCATOR | blas, check=True)
                rows += json.loads(path.read_text())
    return rows


def main(argv: list[str] | None = None) -> int:
    """Returns the exit code: 1 if there is nothing to measure, or if a back end of ours computed something wrong."""
    arguments = parse(argv)
    if arguments.worker:
        work(arguments)
        return 0
    if not say_what_runs(arguments.device):
        return 1
    meta = machine.describe(arguments.device) | {"threads": arguments.threads, "processes": arguments.processes,
                                                 "quick": arguments.quick, "allocator": machine.ALLOCATOR,
                                                 "info": dgf.info()}  # fmt: skip
    states = [gpu_state()]
    try:
        rows = report.with_ratios(report.best(measure(arguments)))
    except subprocess.CalledProcessError as error:
        print(f"error: a measuring process ended with {error.returncode}; its message is above", file=sys.stderr)
        return 1
    meta["gpu_state"] = [*states, gpu_state()]
    print(report.table(rows))
    for path in report.save(arguments.out.resolve(), arguments.benchmark, rows, meta):
        print(path)
    wrong = report.red(rows)
    for row in wrong:
        print(f"{row['case']} {row['shape']} {row['provider']}: {row['status']}", file=sys.stderr)
    return int(any(row["provider"].startswith("dgf-") for row in wrong))


if __name__ == "__main__":
    sys.exit(main())
