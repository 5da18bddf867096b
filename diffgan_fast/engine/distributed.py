"""One run in several processes, as torchrun starts them. In a process of its own every function does the obvious.

Gradients, batch statistics and losses are exchanged on the device. Everything else (Python objects, the wish to stop)
goes between the CPUs, so that no process waits for a device.
"""

from __future__ import annotations

import atexit
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist

# What the others wait for one process at most, while it measures or draws samples. Not for one that has ended: that is
# noticed at once.
PATIENCE = timedelta(hours=12)

T = TypeVar("T")
_alone = False  # see `acting`


class ProcessLost(RuntimeError):
    """Another process of the run has ended."""


def join(device: torch.device) -> None:
    """Joins the other processes, where this one was started by torchrun. Each takes the CUDA device of its local rank.

    A process group that is there already is left as it is.

    Raises: ValueError if this process cannot have a device of its own, or the process group has no back end for the
        device and for the CPU.
    """
    if _launched() and not dist.is_initialized():
        if device.type == "cuda":
            if device.index is not None:
                raise ValueError(f"device must be auto, cpu or cuda where torchrun starts a run, got '{device}'")
            local, found = int(os.environ.get("LOCAL_RANK", os.environ["RANK"])), torch.cuda.device_count()
            if local >= found:
                raise ValueError(f"device 'cuda': torch sees {found} CUDA devices, of which process {local} has none")
            torch.cuda.set_device(local)
        store, number, count = next(dist.rendezvous("env://", timeout=PATIENCE))
        # torchrun's store outlives a restart: what the last attempt's processes left in it must not be found
        store = dist.PrefixStore(f"attempt {os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, store=store, rank=number, world_size=count, timeout=PATIENCE)
        atexit.register(_leave)
    if size() > 1:
        config = dist.get_backend_config()
        for kind in ("cpu", device.type):
            if f"{kind}:" not in config:
                raise ValueError(
                    f"the process group must have a back end for {kind}, as cpu:gloo,cuda:nccl; got {config}"
                )


def _launched() -> bool:
    """Whether this is one of several processes that torchrun started."""
    return dist.is_available() and "RANK" in os.environ and int(os.environ.get("WORLD_SIZE", 1)) > 1


def _leave() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()


@contextmanager
def acting(together: bool) -> Iterator[None]:
    """A block in which all processes do the same and share the work, or else one that each acts in as if alone.

    Inside the latter nothing is together: what the main process does while the others wait must not wait for them.

    Raises: ValueError if torchrun has started several processes that have not joined each other.
    """
    global _alone
    if together and _launched() and not dist.is_initialized():
        raise ValueError(
            "together must be False until dgf.train or init_process_group has made a process group, got True"
        )
    before, _alone = _alone, _alone or not together
    try:
        yield
    finally:
        _alone = before


def size() -> int:
    """How many processes there are."""
    return 1 if _alone or not (dist.is_available() and dist.is_initialized()) else dist.get_world_size()


def rank() -> int:
    """The number of this one, from 0."""
    return dist.get_rank() if size() > 1 else 0


def is_main() -> bool:
    """Whether this is the process that writes."""
    return rank() == 0


def share(batch_size: int) -> slice:
    """The part of every batch that is this process's. ValueError if the parts are not equal."""
    each, rest = divmod(batch_size, size())
    if rest:
        raise ValueError(f"batch_size must be a multiple of the number of processes, {size()}; got {batch_size}")
    return slice(rank() * each, (rank() + 1) * each)


def part(n: int) -> slice:
    """The part of n samples that this process draws: parts are as equal as can be, and may be empty."""
    return slice(-(-n * rank() // size()), -(-n * (rank() + 1) // size()))


@contextmanager
def exchanging() -> Iterator[None]:
    """Names what it means when an exchange fails."""
    try:
        yield
    except RuntimeError as error:
        raise ProcessLost("another process of this run has ended") from error


def mean(tensor: torch.Tensor) -> torch.Tensor:
    """The mean over all processes, in place. The tensor is contiguous."""
    if size() > 1:
        with exchanging():
            dist.all_reduce(tensor)
        tensor.div_(size())
    return tensor


def from_main(make: Callable[[], T]) -> T:
    """What `make` gives, or raises, in the main process, in all of them: the others wait for it."""
    if size() == 1:
        return make()
    told: list[Any] = [None, None]
    if is_main():
        try:
            with acting(together=False):
                told[0] = make()
        except Exception as error:
            told[1] = error
    with exchanging():
        dist.broadcast_object_list(told, device=torch.device("cpu"))
    if told[1] is not None:
        raise told[1]
    return told[0]


def gather(make: Callable[[], T], *, everywhere: bool = False) -> list[T]:
    """What `make` gives in each process, by number: in the main one, or everywhere. Elsewhere the list is empty.

    `make` acts alone, so its part is taken before. Tensors in what it gives lie on the CPU. What one raises, all do.
    """
    if size() == 1:
        return [make()]
    made: T | None = None
    error: Exception | None = None
    try:
        with acting(together=False):
            made = make()
    except Exception as raised:
        error = raised
    errors: list[Any] = [None] * size()
    with exchanging():
        dist.all_gather_object(errors, error)
    if failed := [told for told in errors if told is not None]:
        raise failed[0]
    found: list[Any] = [None] * size() if everywhere or is_main() else []
    with exchanging():
        if everywhere:
            dist.all_gather_object(found, made)
        else:
            dist.gather_object(made, found or None)
    return found


@contextmanager
def main_first() -> Iterator[None]:
    """A block that the others enter when the main process has left it: they find the files that it made."""
    if not is_main():
        _barrier()
    try:
        yield
    finally:
        if is_main():
            _barrier()


def _barrier() -> None:
    mean(torch.zeros(1))


def check_same(settings: dict[str, Any]) -> None:
    """ValueError, in every process, if they were not all given the same."""
    if size() == 1:
        return
    found: list[Any] = [None] * size()
    with exchanging():
        dist.all_gather_object(found, settings)
    if different := sorted(k for k in settings if any(other.get(k) != found[0][k] for other in found)):
        raise ValueError(f"the processes of a run must be called alike; they differ in {', '.join(different)}")


class Stop:
    """Agreement on the step after which all processes stop. An answer is one call late, so that nobody waits for it."""

    def __init__(self) -> None:
        self._asked: tuple[torch.Tensor, Any] | None = None

    def agreed(self, wanted: bool) -> bool:
        """Whether to stop. Called after each step, with whether this process has been told to."""
        if size() == 1:
            return wanted
        before, flag = self._asked, torch.tensor([int(wanted)])
        with exchanging():
            self._asked = flag, dist.all_reduce(flag, dist.ReduceOp.MAX, async_op=True)
            if before is None:
                return False
            before[1].wait()
        return bool(before[0])
