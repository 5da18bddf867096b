"""CUDA graphs: what a function launches, recorded once and run again with one launch."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

import torch

Result = TypeVar("Result")


class NotCapturable(ValueError):
    """What was asked for cannot be part of a CUDA graph, as the message says. Nothing was done."""


class Recorder:
    """Records functions on a CUDA device, as graphs that share their memory: only one of them runs at a time."""

    def __init__(self, device: torch.device):
        self.device = device
        self._stream = torch.cuda.Stream(device)
        self._pool = torch.cuda.graph_pool_handle()

    @contextmanager
    def rehearsal(self) -> Iterator[None]:
        """What runs in it is not recorded, but on the stream of recordings: libraries and caches get ready there."""
        present = torch.cuda.current_stream(self.device)
        self._stream.wait_stream(present)
        with torch.cuda.stream(self._stream):
            yield
        present.wait_stream(self._stream)

    def record(self, run: Callable[[], Result]) -> tuple[Callable[[], None], Result]:
        """(replay, result): nothing has run yet; each `replay()` runs all of it, and writes the result anew.

        What `run` reads and writes stays where it is: change it in place. The next replay of any graph of this recorder
        may overwrite the result.
        """
        graph = torch.cuda.CUDAGraph()
        torch.cuda.synchronize(self.device)
        torch.cuda.empty_cache()
        with torch.cuda.device(self.device), torch.cuda.stream(self._stream):
            graph.capture_begin(pool=self._pool)
            try:
                result = run()
            except BaseException:
                self._abandon(graph)
                raise  # not what ending the capture says, which is but the consequence
            graph.capture_end()
        return graph.replay, result

    def _abandon(self, graph: torch.cuda.CUDAGraph) -> None:
        """Ends a capture in which something failed. Torch itself would go on as if it were being recorded: with memory
        that is never freed, and a generator that refuses to draw."""
        try:
            graph.capture_end()
        except RuntimeError:
            index = self._stream.device_index
            torch._C._cuda_endAllocateToPool(index, self._pool)
            generator = torch.cuda.default_generators[index]
            generator.graphsafe_set_state(generator.clone_state())
