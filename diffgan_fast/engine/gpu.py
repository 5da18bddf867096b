"""What a GPU is doing, by nvidia-ml-py: clocks, power, throttling, energy. Without the package or a GPU: nothing."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch


def state(device: torch.device | None = None) -> dict[str, Any]:
    """Name, driver, clocks (MHz), power (W), temperature (°C), throttle reasons, energy (J) since the driver came up.

    Args:
        device: a CUDA device; None: the machine's first GPU.

    Returns: what can be read; empty without nvidia-ml-py, its library or a GPU.
    """
    try:
        import pynvml

        pynvml.nvmlInit()
    except Exception:  # a missing package, library or driver: readings are optional
        return {}
    try:
        if device is None:
            handle = pynvml.nvmlDeviceGetHandleByIndex(0)
        else:  # NVML counts all GPUs, torch those that CUDA_VISIBLE_DEVICES leaves
            handle = pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{torch.cuda.get_device_properties(device).uuid}")
        readings: dict[str, Callable[[], Any]] = {
            "name": lambda: pynvml.nvmlDeviceGetName(handle),
            "driver": pynvml.nvmlSystemGetDriverVersion,
            "sm_mhz": lambda: pynvml.nvmlDeviceGetClockInfo(handle, pynvml.NVML_CLOCK_SM),
            "memory_mhz": lambda: pynvml.nvmlDeviceGetClockInfo(handle, pynvml.NVML_CLOCK_MEM),
            "power_w": lambda: pynvml.nvmlDeviceGetPowerUsage(handle) / 1000,
            "temperature_c": lambda: pynvml.nvmlDeviceGetTemperature(handle, pynvml.NVML_TEMPERATURE_GPU),
            "throttle_reasons": lambda: hex(pynvml.nvmlDeviceGetCurrentClocksThrottleReasons(handle)),
            "energy_j": lambda: pynvml.nvmlDeviceGetTotalEnergyConsumption(handle) / 1000,
        }
        found = {}
        for name, read in readings.items():
            try:
                found[name] = read()
            except pynvml.NVMLError:  # this GPU, or a part of one, does not tell
                continue
        return found
    except pynvml.NVMLError:
        return {}
    finally:
        pynvml.nvmlShutdown()


class Meter:
    """What a CUDA device does while it trains, and the energy that it takes for an image.

    The energy is the whole GPU's: of others that compute on it too.
    """

    def __init__(self, device: torch.device):
        self._device = device if device.type == "cuda" and state(device) else None
        if self._device is not None:
            import pynvml

            pynvml.nvmlInit()  # stays, so that a reading need not begin with it
        self._joules = 0.0
        self._since: float | None = None
        self._images = 0  # at the last row

    def start(self) -> None:
        """From here on energy counts."""
        self._since = self._read().get("energy_j")

    def stop(self) -> None:
        """Up to here energy counts, and from here on again."""
        before = self._since
        self.start()
        if before is not None and self._since is not None:
            self._joules += self._since - before

    def row(self, images: int) -> dict[str, Any]:
        """What the device does now, and "joules_per_image" since the last row; `images`: how many it has trained on.

        Empty if nothing can be read.
        """
        found = self._read()
        known = found.pop("energy_j", None) is not None and images > self._images
        energy = {"joules_per_image": round(self._joules / (images - self._images), 6)} if known else {}
        self._joules, self._images = 0.0, images
        return found | energy

    def _read(self) -> dict[str, Any]:
        return {} if self._device is None else state(self._device)
