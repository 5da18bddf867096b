"""What the compiler says of the CUDA kernels, and what the built library asks of its surroundings. No GPU needed."""

import importlib.util
import re
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from unittest import mock

import pytest

ROOT = Path(__file__).resolve().parents[2]
LIBRARY = ROOT / "diffgan_fast/_C_cuda.so"
ARCHS = ("sm_80", "sm_90", "sm_100")
STEMS = ("loss", "noise", "penalty", "random", "step")


class Recorder:
    """Stands in for setup.py's Ninja and notes what would be compiled, and how."""

    def __init__(self):
        self.jobs: dict[Path, list[str]] = {}

    def compile(self, rule, source, flags, tag=""):
        self.jobs[source] = flags
        return source

    def rule(self, *args, **kwargs):
        pass

    link = run = rule


def recorded_jobs() -> dict[Path, list[str]]:
    """The sources and flags of setup.py's CUDA library."""
    spec = importlib.util.spec_from_file_location("diffgan_fast_setup", ROOT / "setup.py")
    module = importlib.util.module_from_spec(spec)
    with mock.patch("setuptools.setup"):
        spec.loader.exec_module(module)
    recorder = Recorder()
    module.cuda_library(recorder, Path("unused.so"))
    return recorder.jobs


def compile_device_code(nvcc: str, source: Path, flags: list[str], folder: Path) -> str:
    """ptxas's report on one source, all architectures. Host code and PTX for later GPUs are left out."""
    kept = [f for f in flags if not f.startswith("--threads") and not re.search(r"code=compute_\d+$", f)]
    out = folder / (source.stem + ".fatbin")
    command = [nvcc, *kept, "-Xptxas", "-v", "-fatbin", str(source), "-o", str(out)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    report = done.stdout + done.stderr
    assert done.returncode == 0, report[-4000:]
    return report


@pytest.fixture(scope="module")
def reports(tmp_path_factory):
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        pytest.skip("no nvcc on the PATH: the CUDA sources were not compiled")
    folder = tmp_path_factory.mktemp("cubins")
    jobs = recorded_jobs()
    with ThreadPoolExecutor(2) as pool:
        runs = {source.stem: pool.submit(compile_device_code, nvcc, source, f, folder) for source, f in jobs.items()}
        return {stem: run.result() for stem, run in runs.items()}


def test_setup_compiles_every_source(reports):
    assert sorted(reports) == sorted(STEMS) == sorted(p.stem for p in (ROOT / "csrc/cuda").glob("*.cu"))


@pytest.mark.parametrize("stem", STEMS)
def test_kernels_keep_everything_in_registers(reports, stem):
    pattern = re.compile(
        r"Compiling entry function '(\S+)' for '(\w+)'"
        r".*?(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads.*?Used (\d+) registers",
        re.DOTALL,
    )
    kernels = pattern.findall(reports[stem])
    assert {arch for _, arch, *_ in kernels} == set(ARCHS)
    assert len(kernels) == reports[stem].count("Compiling entry function")
    for name, arch, frame, stores, loads, registers in kernels:
        assert (frame, stores, loads) == ("0", "0", "0"), (name, arch)
        assert int(registers) <= 128, (name, arch)  # a block of 256 threads at least twice on a multiprocessor


def test_no_compiler_warnings(reports):
    assert not [line for report in reports.values() for line in report.splitlines() if "warning" in line]


def test_library_needs_only_the_stable_abi():
    if not LIBRARY.exists():
        pytest.skip("the CUDA library is not built here")
    nm = shutil.which("nm")
    if nm is None:
        pytest.skip("no nm (binutils) on the PATH")
    listing = subprocess.run([nm, "-D", "--undefined-only", str(LIBRARY)], capture_output=True, text=True, check=True)
    names = [line.split()[-1] for line in listing.stdout.splitlines()]
    assert any(name.startswith("aoti_torch_") for name in names)
    # _ZNS, _ZS, ...: the C++ library; @: versioned symbols of libc and the compiler; then weak hooks
    allowed = re.compile(
        r"aoti_torch_|torch_|_Z(N?K?S|TIS|TVS)|\S+@(GLIBC|GLIBCXX|CXXABI|GCC)_|_ITM_|__gmon_start__$|__cxa_finalize"
    )
    assert not [name for name in names if not allowed.match(name)]
