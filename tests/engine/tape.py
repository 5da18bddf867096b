"""CUDA graphs played on the CPU: a function's ops are written down, and replayed without its Python.

As in a graph, what a replay sees is what tensors hold then: every number that Python passed to an op, and every branch
that it took, is that of the recording.
"""

from contextlib import nullcontext

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

# what asks the device for values; and lift_fresh, which brings numbers of the host to it
FORBIDDEN = ("_local_scalar_dense", "equal", "nonzero", "masked_select", "lift_fresh")


class _Tape(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func._schema.name.removeprefix("aten::") in FORBIDDEN:
            raise RuntimeError(f"operation not permitted when stream is capturing: {func}")
        # as they are now: some ops change a tensor's shape in place
        given = tree_map_only(torch.Tensor, torch.Tensor.detach, (args, kwargs))
        out = func(*args, **kwargs)
        self.calls.append((func, *given, tree_map_only(torch.Tensor, torch.Tensor.detach, out)))
        return out

    def replay(self):
        with torch.no_grad(), torch.autocast("cpu", enabled=False):  # its casts are on the tape
            for func, args, kwargs, out in self.calls:
                again = func(*args, **kwargs)
                for old, new in zip(tree_leaves(out), tree_leaves(again), strict=True):
                    if isinstance(old, torch.Tensor) and not _same_memory(old, new):
                        old.copy_(new)


def _same_memory(a, b):
    return a.untyped_storage().data_ptr() == b.untyped_storage().data_ptr()


class Recorder:
    """That of `diffgan_fast.graphs`, on the CPU. What is recorded must not have run: it is undone."""

    def __init__(self, kept):
        self.kept = kept  # gives the tensors that a recording may change
        self.recorded = 0

    def rehearsal(self):
        return nullcontext()

    def record(self, run):
        before = [(v, v.detach().clone()) for v in self.kept()]
        try:
            with torch.random.fork_rng(devices=[]), _Tape() as tape:
                result = run()
        finally:
            with torch.no_grad():
                for v, old in before:
                    v.copy_(old)
        self.recorded += 1
        return tape.replay, result
