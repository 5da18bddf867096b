"""What is recorded of a GPU, told by a module that stands in for pynvml."""

import sys
from types import SimpleNamespace

import pytest
import torch

import diffgan_fast as dgf
from diffgan_fast import report
from diffgan_fast.engine import gpu

CUDA = torch.device("cuda", 1)


class Fake(SimpleNamespace):
    """A machine of two GPUs. Each reading of the energy is 500 J above the last; the temperature cannot be read."""

    class NVMLError(Exception):
        pass

    NVML_CLOCK_SM, NVML_CLOCK_MEM, NVML_TEMPERATURE_GPU = 1, 2, 0

    def __init__(self):
        super().__init__(millijoules=0, open=0)

    def nvmlInit(self):
        self.open += 1

    def nvmlShutdown(self):
        self.open -= 1

    def nvmlDeviceGetHandleByIndex(self, index):
        return f"handle {index}"

    def nvmlDeviceGetHandleByUUID(self, uuid):
        assert self.open and uuid == "GPU-1234"
        return "handle of 1234"

    def nvmlDeviceGetName(self, handle):
        return f"H100, {handle}"

    def nvmlSystemGetDriverVersion(self):
        return "570.1"

    def nvmlDeviceGetClockInfo(self, handle, kind):
        return {1: 1980, 2: 2619}[kind]

    def nvmlDeviceGetPowerUsage(self, handle):
        return 350_500

    def nvmlDeviceGetTemperature(self, handle, kind):
        raise self.NVMLError

    def nvmlDeviceGetCurrentClocksThrottleReasons(self, handle):
        return 4

    def nvmlDeviceGetTotalEnergyConsumption(self, handle):
        self.millijoules += 500_000
        return self.millijoules


@pytest.fixture
def nvml(monkeypatch):
    fake = Fake()
    monkeypatch.setitem(sys.modules, "pynvml", fake)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(uuid="1234"))
    return fake


READ = {"driver": "570.1", "sm_mhz": 1980, "memory_mhz": 2619, "power_w": 350.5, "throttle_reasons": "0x4"}


def test_what_is_read(nvml):
    assert gpu.state() == READ | {"name": "H100, handle 0", "energy_j": 500.0}
    assert gpu.state(CUDA) == READ | {"name": "H100, handle of 1234", "energy_j": 1000.0}
    assert nvml.open == 0


def test_energy_counts_from_start_to_stop(nvml):
    meter = gpu.Meter(CUDA)
    meter.start()
    meter.stop()
    first = meter.row(100)
    assert first == READ | {"name": "H100, handle of 1234", "joules_per_image": 5.0}
    meter.start()  # what was taken since the last stop does not count
    meter.stop()
    meter.stop()
    assert meter.row(300)["joules_per_image"] == 5.0
    assert "joules_per_image" not in meter.row(300)


@pytest.mark.parametrize("broken", ["package", "driver", "handle"])
def test_nothing_is_read_where_there_is_nothing(broken, nvml, monkeypatch):
    def fail(*_):
        raise nvml.NVMLError

    if broken == "package":
        monkeypatch.setitem(sys.modules, "pynvml", None)
    else:
        monkeypatch.setattr(nvml, "nvmlInit" if broken == "driver" else "nvmlDeviceGetHandleByUUID", fail)
    meter = gpu.Meter(CUDA)
    meter.start()
    meter.stop()
    assert meter.row(10) == {} and nvml.open == 0
    assert gpu.Meter(torch.device("cpu")).row(10) == {}


def test_a_run_records_it(nvml, monkeypatch, tmp_path):
    """The loop on the CPU, with the meter of a GPU."""
    monkeypatch.setattr("diffgan_fast.api.GRID", 4)
    options = dict(steps=4, batch_size=8, T=4, width=8, sample_every=3, checkpoint_every=0, progress=False)
    plain = dgf.train("ddpm", "digits", tmp_path / "cpu", log_every=2, device="cpu", **options)
    assert all("gpu" not in row for row in plain.history) and ">GPU<" not in (plain.path / "report.html").read_text()
    monkeypatch.setattr("diffgan_fast.engine.loop.Meter", lambda device: gpu.Meter(CUDA))
    run = dgf.train("ddpm", "digits", tmp_path / "gpu", log_every=2, device="cpu", **options)
    rows = [row["gpu"] for row in run.history]
    # 16 images a row; of the second are the first row's own reading, and two steps, between which a picture is drawn
    assert [row.pop("joules_per_image") for row in rows] == [500 / 16, 1500 / 16]
    assert rows == [READ | {"name": "H100, handle of 1234"}] * 2
    page = report.write_run(run.path).read_text()
    assert ">GPU<" in page and "H100, handle of 1234" in page and "J / image" in page and "0x4" in page
