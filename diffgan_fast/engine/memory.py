"""How much memory a device has left, and whether data lie on it."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Literal

import torch

from diffgan_fast.data import Data

DataOn = Literal["auto", "device", "host"]
SHARE = 0.25  # of a device's free memory that data may take without being told to


def free_memory(device: torch.device) -> int:
    """Bytes that are free on a device; of a CPU what the system says, or all there is, within the process's limit."""
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + unused
    told = Path("/proc/meminfo")
    if told.exists():
        free = int(re.search(r"MemAvailable:\s+(\d+)", told.read_text())[1]) * 1024  # type: ignore[index]
    else:
        free = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    limit, used = (Path(f"/sys/fs/cgroup/memory.{name}") for name in ("max", "current"))
    if limit.exists() and used.exists() and (text := limit.read_text().strip()) != "max":
        free = min(free, int(text) - int(used.read_text()))
    return free


def stay(data: Data, device: torch.device, data_on: DataOn) -> bool:
    """Whether data stay on the host: as they are told, or else if they are there and too large for the device."""
    if data_on != "auto":
        return data_on == "host"
    return data.values.device.type != device.type and data.values.nbytes > SHARE * free_memory(device)


def placed(data: Data, device: torch.device, data_on: DataOn) -> Data:
    """The data for work on a device: all of them there, or on the host with batches that are brought there."""
    return data.to("cpu").with_batches_on(device) if stay(data, device, data_on) else data.to(device)
