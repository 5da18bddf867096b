"""What every test shares.

Triton runs in its interpreter where there is no GPU, so it must be told before it is imported.
"""

import os

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

from pathlib import Path  # noqa: E402

import pytest  # noqa: E402

import diffgan_fast as dgf  # noqa: E402
from diffgan_fast import api, backends, cli, run, start  # noqa: E402

if workers := int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", 0)):  # they share the cores, and so do their children
    torch.set_num_threads(max(1, torch.get_num_threads() // workers))
    os.environ["OMP_NUM_THREADS"] = str(torch.get_num_threads())


def pytest_collection_modifyitems(items):
    """Tests marked `gpu` skip, visibly, where torch sees no CUDA device."""
    if not torch.cuda.is_available():
        skip = pytest.mark.skip(reason="no CUDA device")
        for item in items:
            if "gpu" in item.keywords:
                item.add_marker(skip)


@pytest.fixture(autouse=True, scope="session")
def _own_cache(tmp_path_factory):
    """What tests cache (classifiers, features) is theirs alone, and new in every session."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DIFFGAN_FAST_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(autouse=True, scope="session")
def _auto_is_the_cpu():
    """Runs are on the CPU, where results repeat bit for bit; tests of a GPU name it."""
    picks = run.pick_device
    with pytest.MonkeyPatch.context() as patch:
        for module in (api, cli, run, start):
            patch.setattr(module, "pick_device", lambda device: picks("cpu" if device == "auto" else device))
        yield


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


@pytest.fixture(params=["reference", "cpu", "triton", "cuda"])
def backend(request):
    """Every back end in turn: the test runs on `backend.device`, and skips with the reason where there is none."""
    name = request.param
    if reason := backends.unavailable(name):
        pytest.skip(f"{name}: {reason}")
    device = "cuda" if name == "cuda" or (name == "triton" and torch.cuda.is_available()) else "cpu"
    with dgf.backend(name):
        yield Backend(name, torch.device(device))


class Backend:
    def __init__(self, name: str, device: torch.device):
        self.name, self.device = name, device
        self.dtypes = (torch.float32, torch.bfloat16, torch.float16)
        if name != "triton":
            self.dtypes += (torch.float64,)


@pytest.fixture(scope="session")
def real_data() -> Path:
    """Folder with the real MNIST and CIFAR-10 files, or a visible skip."""
    folder = Path(os.environ.get("DIFFGAN_FAST_DATA") or Path(__file__).parents[2] / "shared" / "data")
    if not (folder / "mnist").is_dir():
        pytest.skip("no real data: set DIFFGAN_FAST_DATA to a folder that holds mnist/ and cifar10*.npz")
    return folder
