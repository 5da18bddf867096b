import os
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def real_data() -> Path:
    """Folder with the real MNIST and CIFAR-10 files, or a visible skip."""
    folder = Path(os.environ.get("DIFFGAN_FAST_DATA") or Path(__file__).parents[3] / "shared" / "data")
    if not (folder / "mnist").is_dir():
        pytest.skip("no real data: set DIFFGAN_FAST_DATA to a folder that holds mnist/ and cifar10*.npz")
    return folder


@pytest.fixture
def offline(monkeypatch, tmp_path):
    """No folder of this machine is searched and every download fails."""

    def fail(url, **_):
        raise OSError(f"no network for {url}")

    monkeypatch.delenv("DIFFGAN_FAST_DATA", raising=False)
    monkeypatch.setenv("DIFFGAN_FAST_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("diffgan_fast.data.registry._DEBIAN", tmp_path / "debian")
    monkeypatch.setattr("pooch.retrieve", fail)
