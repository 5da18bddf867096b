"""The package as it is installed: without native parts, and as an archive."""

import os
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

import diffgan_fast as dgf
from diffgan_fast import _native

ROOT = Path(__file__).parents[1]


def python(code, folder, **env):
    return subprocess.run(
        [sys.executable, "-c", code], cwd=folder, capture_output=True, text=True, env={**os.environ, **env}, timeout=300
    )


@pytest.fixture(scope="module")
def bare(tmp_path_factory):
    """The Python files alone, as after an install without a compiler."""
    folder = tmp_path_factory.mktemp("bare")
    ignore = shutil.ignore_patterns("*.so", "__pycache__", "_build_info.json")
    shutil.copytree(ROOT / "diffgan_fast", folder / "diffgan_fast", ignore=ignore)
    return folder


@pytest.mark.parametrize(
    "archs, capability, runs",
    [
        (["sm_80", "sm_90"], (8, 0), True),
        (["sm_80", "sm_90"], (8, 9), True),
        (["sm_90"], (8, 9), False),
        (["sm_80", "sm_90", "sm_100", "compute_100"], (7, 5), False),
        (["sm_80", "sm_90"], (10, 0), False),
        (["sm_80", "sm_90", "compute_90"], (10, 0), True),
        (["sm_80", "sm_90", "sm_100", "compute_100"], (12, 0), True),
        ([], (9, 0), False),
    ],
)
def test_what_a_device_can_run(archs, capability, runs):
    """Code of its own generation that is no newer, or PTX that is no newer (CUDA's rule of compatibility)."""
    assert _native.runs_on(archs, capability) == runs


def test_works_with_nothing_built(bare):
    code = """
import warnings, torch
warnings.simplefilter("error")
import diffgan_fast as dgf
from diffgan_fast import _native
assert not dgf.info()["backends"]["cpu"]["available"] and "not built" in dgf.info()["backends"]["cpu"]["reason"]
s = dgf.Schedule.linear(10)
warnings.simplefilter("always")
with warnings.catch_warnings(record=True) as seen:
    for key in range(3):
        x = dgf.ops.add_noise(torch.ones(3, 2), 4, s, key)
assert len(seen) == 1 and "not built" in str(seen[0].message), seen
try:
    dgf.backend("cpu")
except dgf.BackendError as error:
    assert "not built" in str(error)
else:
    raise SystemExit("a missing back end was accepted")
print(x.sum().item())
"""
    done = python(code, bare)
    assert done.returncode == 0, done.stderr
    want = dgf.ops.add_noise(dgf.random.torch.ones(3, 2), 4, dgf.Schedule.linear(10), 2).sum().item()
    assert abs(float(done.stdout) - want) < 1e-5


def test_a_library_that_does_not_load_is_explained(bare, tmp_path):
    shutil.copytree(bare / "diffgan_fast", tmp_path / "diffgan_fast")
    (tmp_path / "diffgan_fast" / "_C_cpu.so").write_bytes(b"not a library")
    done = python("import diffgan_fast as d; print(d.info()['backends']['cpu']['reason'])", tmp_path)
    assert done.returncode == 0 and "does not load with torch" in done.stdout, done.stderr


@pytest.mark.parametrize("variable, value, message", [
    ("DIFFGAN_FAST_CPU", "sse9", "expected one of baseline, avx2, avx512"),
    ("DIFFGAN_FAST_BACKEND", "metal", "backend must be one of auto"),
])  # fmt: skip
def test_bad_environment_variables_are_named(variable, value, message):
    done = python("import diffgan_fast", ROOT, **{variable: value})
    assert done.returncode != 0 and message in done.stderr


def test_instruction_sets_agree():
    if reason := dgf.backends.unavailable("cpu"):
        pytest.skip(reason)
    code = """
import torch, diffgan_fast as dgf
s, x = dgf.Schedule.linear(10), torch.linspace(-1, 1, 5000).view(5, 1000)
parts = [dgf.ops.add_noise(x, t, s, 3) for t in (0, 4, 10)] + [dgf.ops.ddpm_step(x, -x, 5, s, 4, clip_x0=True)]
parts += [dgf.ops.noise_mse(x, 5).view(1, 1).expand(5, 1), dgf.ops.add_noise(x.half(), 4, s, 3).float()]
parts += [dgf.ops.add_noise(x.bfloat16(), 4, s, 3).float(), dgf.random.bits((5, 1000), 9).float()]
parts += [dgf.random.normal((5, 1000), 9, first=2**34 - 8 * 37).float()]  # the block's low word wraps
image = x.view(5, 8, 5, 25).repeat(1, 5, 1, 1).contiguous(memory_format=torch.channels_last).requires_grad_()
weight = torch.linspace(0.5, 2, 40)
normed = dgf.ops.norm.group_norm_silu(image, weight, weight - 1, None, groups=10, eps=1e-6)
parts += [t.reshape(5, 5000).detach() for t in (normed, *torch.autograd.grad(normed.square().sum(), image))]
kernel = torch.linspace(-1, 1, 40 * 40 * 9).view(40, 40, 3, 3).contiguous(memory_format=torch.channels_last)
kernel.requires_grad_()
conv = dgf.ops.conv.conv2d(image, kernel, weight, padding=1)
slopes = torch.autograd.grad(conv.square().sum(), (image, kernel))
parts += [t.reshape(5, -1).detach() / t.detach().abs().max() for t in (conv, *slopes)]
import sys, numpy as np; np.save(sys.stdout.buffer, torch.cat(parts, 1).numpy())
sys.stderr.write(dgf.info()["backends"]["cpu"]["in_use"])
"""
    import io

    import numpy as np

    results = {}
    for name in ("baseline", "avx2", "avx512"):
        done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True,
                              env={**os.environ, "DIFFGAN_FAST_CPU": name})  # fmt: skip
        if done.returncode and b"offers only" in done.stderr:
            break  # a better set needs what this processor has not
        assert done.returncode == 0 and done.stderr.decode().endswith(name), done.stderr
        results[name] = np.load(io.BytesIO(done.stdout))
    if len(results) == 1:
        pytest.skip("this processor has no AVX2")
    assert np.abs(results["baseline"] - results["avx2"]).max() < 0.01  # half types: one rounding
    full = np.r_[0:4001]
    assert np.abs(results["baseline"][:, full] - results["avx2"][:, full]).max() < 5e-6
    # both fuse multiplication and addition, so that the number of lanes makes no difference
    np.testing.assert_array_equal(results.get("avx512", results["avx2"]), results["avx2"])


def test_the_sdist_holds_the_native_sources(tmp_path):
    pytest.importorskip("setuptools", minversion="77")
    copy = tmp_path / "copy"
    shutil.copytree(ROOT, copy, ignore=shutil.ignore_patterns(".git", ".venv", "build", "*.so", "runs", "*.egg-info"))
    code = "import setuptools.build_meta as b; print(b.build_sdist('dist'))"
    done = python(code, copy)
    assert done.returncode == 0, done.stderr
    (archive,) = (copy / "dist").glob("*.tar.gz")
    names = {"/".join(n.split("/")[1:]) for n in tarfile.open(archive).getnames()}
    wanted = {"csrc/philox.h", "csrc/cpu/kernels.h", "csrc/cuda/core.cuh", "csrc/host.cpp", "kernels/noise.py",
              "setup.py", "LICENSE", "diffgan_fast/py.typed", "diffgan_fast/data/digits.npz",
              "diffgan_fast/data/dino.csv", "diffgan_fast/metrics/digits_classifier.safetensors"}  # fmt: skip
    assert wanted <= names, wanted - names
    assert not [n for n in names if n.endswith((".so", ".pyc"))]
