"""No step makes the host wait for the device: none asks for a value, or for a shape that depends on one.

The CPU stands in for the device, with every op recorded. What it cannot show is a copy between devices.
"""

import traceback
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import diffgan_fast
from tests.engine import methods

ASKS = ("_local_scalar_dense", "item", "is_nonzero", "nonzero", "masked_select", "_unique2", "unique_dim", "equal")
# they look at values on the CPU alone: errors that a GPU tells as NaN, and numbers that are made on the host anyway
ON_THE_HOST = {"check_range", "defined_rows", "_row", "_last_steps", "respace"}
PACKAGE = Path(diffgan_fast.__file__).parent


class Asked(TorchDispatchMode):
    """The places of the package that asked for a value."""

    def __init__(self):
        super().__init__()
        self.places = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func._schema.name.removeprefix("aten::")
        masks = args[1] if name == "index" else ()
        by_mask = any(i is not None and i.dtype in (torch.bool, torch.uint8) for i in masks)
        if name in ASKS or by_mask:
            frames = [f for f in traceback.extract_stack() if Path(f.filename).is_relative_to(PACKAGE)]
            if not frames or not {f.name for f in frames} & ON_THE_HOST:
                self.places.append((name, *((f.filename, f.lineno, f.name) for f in frames[-1:])))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
@pytest.mark.parametrize("case", methods.CASES)
def test_a_step_asks_for_no_value(case, precision):
    """Both kinds of step of a method that has two: with and without a penalty, with one network or both."""
    method, state, batch = methods.start(case, precision=precision, warmup=0)
    step = type(method).step
    with Asked() as asked:
        for number in range(2):
            state.step = number
            with diffgan_fast.engine.precision.reduced(precision, batch.x.device):
                step(method, state, batch, diffgan_fast.random.fold_in(methods.KEY, number))
    assert asked.places == []


def test_what_asks_is_seen():
    x = torch.tensor([1.0, 2.0])
    with Asked() as asked:
        float(x.sum())
        x[x > 1]
        x.nonzero()
        x[torch.tensor([0, 1])]
        bool(x.any())
    assert [place[0] for place in asked.places] == ["_local_scalar_dense", "index", "nonzero", "_local_scalar_dense"]
