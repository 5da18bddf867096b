"""Batches of data that lie on the host: a thread gathers them ahead of the steps that take them."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass
from queue import SimpleQueue

import torch
from torch import Tensor

from diffgan_fast.data import Data

AHEAD = 2  # batches that lie ready


@dataclass
class _Place:
    """Host memory for a batch."""

    values: Tensor
    labels: Tensor | None
    copied: torch.cuda.Event | None

    def on(self, device: torch.device) -> tuple[Tensor, Tensor | None]:
        """Copies on the device; from pinned memory the host does not wait for them."""
        values = self.values.to(device, non_blocking=True, copy=True)
        return values, None if self.labels is None else self.labels.to(device, non_blocking=True, copy=True)


class Prefetch:
    """An iterator over the samples, as stored, and the labels (or None) of one step after the other, on a device.

    They are gathered by a thread, which ends with the `with` block that this is used in. For a CUDA device that is into
    pinned memory, from which they are copied on a stream of their own, while the steps before compute. The thread calls
    nothing of CUDA: that would spoil a graph which is captured meanwhile.

    Args:
        data: on the host.
        indices: step -> which samples; called in the thread.
        steps: the steps.
        size: samples of a step.
        device: where they go.

    Raises: what fails in the thread, when the step that it was to gather asks.
    """

    def __init__(
        self, data: Data, indices: Callable[[int], Tensor], steps: range, size: int, device: torch.device
    ) -> None:
        self._data, self._indices, self._steps, self._device = data, indices, steps, device
        cuda = device.type == "cuda"
        self._stream = torch.cuda.Stream(device) if cuda else None
        self._empty: SimpleQueue[_Place | None] = SimpleQueue()  # None wakes the thread, to end
        self._full: SimpleQueue[_Place | BaseException | None] = SimpleQueue()  # None: there are no more
        self._copying: _Place | None = None
        for _ in range(AHEAD + 1):  # and one that is copied
            values = torch.empty((size, *data.shape), dtype=data.values.dtype, pin_memory=cuda)
            labels = None if data.labels is None else torch.empty(size, dtype=torch.int64, pin_memory=cuda)
            self._empty.put(_Place(values, labels, torch.cuda.Event() if cuda else None))
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._work, name="batches", daemon=True)

    def __enter__(self) -> Prefetch:
        self._thread.start()
        return self

    def __exit__(self, *_) -> None:
        self._ended.set()
        self._empty.put(None)
        self._thread.join()

    def __iter__(self) -> Prefetch:
        return self

    def __next__(self) -> tuple[Tensor, Tensor | None]:
        place = self._full.get()
        if place is None:
            raise StopIteration
        if isinstance(place, BaseException):
            raise place
        found = place.on(self._device) if place.copied is None else self._copied(place, place.copied)
        if (before := self._copying) is not None:
            if before.copied is not None:
                before.copied.synchronize()  # it was copied a step ago: nobody waits
            self._empty.put(before)
        self._copying = place
        return found

    def _copied(self, place: _Place, done: torch.cuda.Event) -> tuple[Tensor, Tensor | None]:
        """Copies that the present stream finds made."""
        with torch.cuda.stream(self._stream):
            values, labels = place.on(self._device)
            done.record()
        present = torch.cuda.current_stream(self._device)
        present.wait_event(done)
        for tensor in (values, labels):
            if tensor is not None:
                tensor.record_stream(present)  # so that the next copy does not take its memory before it is read
        return values, labels

    def _work(self) -> None:
        try:
            for step in self._steps:
                place = self._empty.get()
                if place is None or self._ended.is_set():
                    return
                index = self._indices(step)
                torch.index_select(self._data.values, 0, index, out=place.values)
                if self._data.labels is not None:
                    torch.index_select(self._data.labels, 0, index, out=place.labels)
                self._full.put(place)
            self._full.put(None)
        except BaseException as error:
            self._full.put(error)
