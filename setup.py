"""Builds the native parts: diffgan_fast/_C_cpu.so and _C_cuda.so (torch's stable ABI) and _host.so (pybind11).

A plain `build_ext` writes one ninja file and runs it. What cannot be built is left out, and `_build_info.json` says why
(`diffgan-fast info` prints it): an install succeeds without a C++ compiler and without nvcc.

    DIFFGAN_FAST_CUDA=0|1         skip the CUDA library, or fail if it cannot be built (default: built if nvcc is found)
    DIFFGAN_FAST_CUDA_ARCHS=80;90;100    the GPU architectures (the last one also as PTX)
"""

import json
import os
import platform
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
VERSION = "0.1.0"
ARCHS = ("80", "90", "100")
DEFINES = ["-DTORCH_STABLE_ONLY", "-DTORCH_TARGET_VERSION=0x020b000000000000ULL"]
# Without -fno-trapping-math GCC keeps a branch for every comparison of floats, and vectorises no loop that has one.
CXXFLAGS = ["-std=c++17", "-O3", "-fPIC", "-ffp-contract=off", "-fno-trapping-math", "-fvisibility=hidden"]
CXXFLAGS += ["-Wall", "-Wno-unused-parameter"]
OPS = ("random", "noise", "step", "loss", "penalty")
AVX2 = ["-mavx2", "-mfma", "-mf16c"]
AVX512 = [*AVX2, "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mprefer-vector-width=512"]
AVX512 += ["-Wno-maybe-uninitialized"]  # in the headers of GCC 12
INSTRUCTION_SETS = {"baseline": [], "avx2": AVX2, "avx512": AVX512}


def torch_paths() -> tuple[Path, str]:
    """The folder of the installed torch and its version, without importing it (an import takes seconds)."""
    from importlib.metadata import version
    from importlib.util import find_spec

    spec = find_spec("torch")
    if spec is None or spec.origin is None:
        raise RuntimeError("torch is not installed in the build environment")
    return Path(spec.origin).parent, version("torch")


def escaped(path: Path) -> str:
    """A path in a build line of ninja."""
    return str(path).replace("$", "$$").replace(" ", "$ ").replace(":", "$:")


class Ninja:
    """A build file under construction."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.text = ["ninja_required_version = 1.5", f"builddir = {escaped(folder)}"]
        self.outputs: list[Path] = []

    def rule(self, name: str, command: str, depfile: bool = False) -> None:
        dep = ["  depfile = $out.d", "  deps = gcc"] if depfile else []
        self.text += [f"rule {name}", f"  command = {command}", "  description = $out", *dep]

    def compile(self, rule: str, source: Path, flags: list[str], tag: str = "") -> Path:
        out = self.folder / tag / source.relative_to(ROOT).with_suffix(source.suffix + ".o")
        self.text += [f"build {escaped(out)}: {rule} {escaped(source)}", f"  flags = {shlex.join(flags)}"]
        return out

    def link(self, rule: str, out: Path, objects: list[Path], flags: list[str]) -> None:
        self.text += [
            f"build {escaped(out)}: {rule} {' '.join(map(escaped, objects))}",
            f"  flags = {shlex.join(flags)}",
        ]
        self.outputs.append(out)

    def run(self, target: Path) -> None:
        path = self.folder / "build.ninja"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("\n".join(self.text) + "\n")
        try:
            import ninja

            program = str(Path(ninja.BIN_DIR) / "ninja")
        except ImportError:
            program = shutil.which("ninja") or "ninja"
        done = subprocess.run([program, "-f", str(path), str(target)], capture_output=True, text=True)
        sys.stdout.write(done.stdout)
        if done.returncode:
            raise RuntimeError(f"compiling {target.name} failed:\n{(done.stdout + done.stderr)[-4000:]}")


def find_compiler() -> str:
    name = os.environ.get("CXX", "g++")
    path = shutil.which(name.split()[0])
    if path is None:
        raise RuntimeError(f"no C++ compiler: {name!r} is not on the PATH (set CXX, or install g++)")
    return name


def find_nvcc() -> str:
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    path = shutil.which("nvcc", path=f"{home}/bin" if home else None) or shutil.which("nvcc")
    if path is None:
        raise RuntimeError("no nvcc on the PATH nor in CUDA_HOME")
    return path


def cpu_library(build: Ninja, out: Path) -> dict:
    torch, version = torch_paths()
    includes = [f"-I{torch}/include"]
    flags = [*CXXFLAGS, *DEFINES, *includes]
    x86 = platform.machine().lower() in ("x86_64", "amd64")
    sets = list(INSTRUCTION_SETS) if x86 else ["baseline"]
    if x86:
        flags.append("-DDGF_X86")
    folder = ROOT / "csrc/cpu"
    stems = (*OPS, "mlp", "embedding", "conv", "winograd", "norm")
    objects = [build.compile("cxx", folder / f"{stem}.cpp", flags) for stem in stems]
    objects += [build.compile("cxx", folder / f"{s}.cpp", CXXFLAGS + INSTRUCTION_SETS[s]) for s in sets]
    build.link("link", out, objects, [f"-L{torch}/lib", "-ltorch_cpu", "-lc10"])
    build.run(out)
    return {"instruction_sets": sets, "torch": version}


def known_archs(nvcc: str) -> list[str]:
    """Those of ARCHS that the compiler knows: 100 came with CUDA 12.8."""
    known = subprocess.run([nvcc, "--list-gpu-arch"], capture_output=True, text=True, check=True).stdout.split()
    return [arch for arch in ARCHS if f"compute_{arch}" in known]


def cuda_library(build: Ninja, out: Path) -> dict:
    torch, version = torch_paths()
    nvcc = find_nvcc()
    wanted = os.environ.get("DIFFGAN_FAST_CUDA_ARCHS")
    archs = wanted.split(";") if wanted else known_archs(nvcc)
    gencode = [f"-gencode=arch=compute_{a},code=sm_{a}" for a in archs]
    gencode.append(f"-gencode=arch=compute_{archs[-1]},code=compute_{archs[-1]}")
    flags = ["-std=c++17", "-O3", "-Xcompiler=-fPIC,-fvisibility=hidden", "-lineinfo", "--threads=2", "-DUSE_CUDA"]
    flags += [*DEFINES, f"-I{torch}/include", *gencode]
    build.rule("nvcc", f"{nvcc} $flags -MD -MF $out.d -c $in -o $out", depfile=True)
    sources = [ROOT / f"csrc/cuda/{op}.cu" for op in OPS]
    objects = [build.compile("nvcc", source, flags) for source in sources]
    build.rule("nvlink", f"{nvcc} -shared -cudart=static -o $out $in $flags")
    # The current-stream function is looked up at run time: a CPU build of torch does not have it.
    build.link("nvlink", out, objects, [f"-L{torch}/lib", "-ltorch_cpu", "-lc10", "-ldl"])
    build.run(out)
    release = subprocess.run([nvcc, "--version"], capture_output=True, text=True).stdout.strip().splitlines()[-1]
    return {"archs": [f"sm_{a}" for a in archs] + [f"compute_{archs[-1]}"], "nvcc": release, "torch": version}


def host_module(build: Ninja, out: Path) -> dict:
    import pybind11

    flags = [*CXXFLAGS, f"-I{sysconfig.get_path('include')}", f"-I{pybind11.get_include()}"]
    build.link("link", out, [build.compile("cxx", ROOT / "csrc/host.cpp", flags)], [])
    build.run(out)
    return {"python": platform.python_version()}


class BuildNative(build_ext):
    """Builds each part by itself, so that one that fails does not take the others along."""

    def run(self) -> None:
        target = ROOT / "diffgan_fast" if self.inplace else Path(self.build_lib) / "diffgan_fast"
        target = target.resolve()
        target.mkdir(parents=True, exist_ok=True)
        wanted = os.environ.get("DIFFGAN_FAST_CUDA", "auto")
        if wanted not in ("auto", "0", "1"):
            raise SystemExit(f"DIFFGAN_FAST_CUDA={wanted!r}: expected 0 or 1")
        info: dict = {"version": VERSION}
        for name, make in (("cpu", cpu_library), ("cuda", cuda_library), ("host", host_module)):
            out = target / ("_host.so" if name == "host" else f"_C_{name}.so")
            try:
                if name == "cuda" and wanted == "0":
                    raise RuntimeError("skipped: DIFFGAN_FAST_CUDA=0")
                build = Ninja(Path(self.build_temp).resolve() / name)
                if name != "cuda":
                    compiler = find_compiler()
                    build.rule("cxx", f"{compiler} $flags -MD -MF $out.d -c $in -o $out", depfile=True)
                    build.rule(
                        "link",
                        f"{compiler} -shared -o $out $in $flags -Wl,-z,defs"
                        if name == "cpu"
                        else f"{compiler} -shared -o $out $in $flags",
                    )
                info[name] = {"built": True, **make(build, out)}
            except (RuntimeError, ImportError, OSError) as error:
                out.unlink(missing_ok=True)
                info[name] = {"built": False, "reason": str(error)}
                print(f"diffgan_fast: {name} is left out: {error}", file=sys.stderr)
                if name == "cuda" and wanted == "1":
                    raise SystemExit(f"DIFFGAN_FAST_CUDA=1, but: {error}") from error
        (target / "_build_info.json").write_text(json.dumps(info, indent=1) + "\n")

    def get_outputs(self) -> list[str]:
        folder = Path(self.build_lib) / "diffgan_fast"
        names = ("_C_cpu.so", "_C_cuda.so", "_host.so", "_build_info.json")
        return [str(folder / n) for n in names if (folder / n).exists()]

    def get_output_mapping(self) -> dict[str, str]:
        return {}


setup(
    version=VERSION,
    packages=[*find_packages(include=["diffgan_fast*"]), "diffgan_fast.kernels"],
    package_dir={"diffgan_fast.kernels": "kernels"},
    package_data={
        "diffgan_fast": ["py.typed"],
        "diffgan_fast.data": ["*.npz", "*.csv", "*.md"],
        "diffgan_fast.metrics": ["*.safetensors", "*.json"],
    },
    # The sources are listed by the functions above; this entry makes the wheel a platform wheel.
    ext_modules=[Extension("diffgan_fast._host", ["csrc/host.cpp"])],
    cmdclass={"build_ext": BuildNative},
)
