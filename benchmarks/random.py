"""Random tensors against torch's generators.

Floor: 4 bytes written an element in float32. Arithmetic: a normal takes about 47 operations (20 of Philox, 27 of
Box-Muller), a uniform number 23, so on a CPU it is arithmetic that bounds both.
"""

from __future__ import annotations

import torch

import diffgan_fast as dgf
from benchmarks.cases import NORMAL_OPS, UNIFORM_OPS, Case, Options, Size, copy, ours, peers, sizes
from benchmarks.harness import measure

DRAWS = {
    "normal": (dgf.random.normal, torch.randn, NORMAL_OPS),
    "uniform": (dgf.random.uniform, torch.rand, UNIFORM_OPS),
}


def case(draw: str, size: Size, options: Options) -> Case:
    """`dgf.random.<draw>` against torch.randn or torch.rand."""
    make, torch_make, ops = DRAWS[draw]
    where = {"dtype": size.dtype, "device": size.device}

    def own(t, key):
        return make(size.shape, key, **where)

    def plain(t):
        return torch_make(size.shape, **where)

    providers = [*ours(own, size), *peers(lambda wrap: wrap(plain), size, options), copy(size)]
    return Case(draw, size, tuple, lambda data, t, z: z, providers, size.dtype.itemsize, ops, draw=draw)


def run(options: Options) -> list[dict]:
    """The rows of this benchmark."""
    return [row for s in sizes(options) for d in DRAWS for row in measure("random", case(d, s, options), options)]
