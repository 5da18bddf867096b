import pytest


@pytest.fixture
def offline(monkeypatch, tmp_path):
    """No folder of this machine is searched and every download fails."""

    def fail(url, **_):
        raise OSError(f"no network for {url}")

    monkeypatch.delenv("DIFFGAN_FAST_DATA", raising=False)
    monkeypatch.setenv("DIFFGAN_FAST_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("diffgan_fast.data.registry._DEBIAN", tmp_path / "debian")
    monkeypatch.setattr("pooch.retrieve", fail)
