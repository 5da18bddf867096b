"""What is measured: sizes, cases (one computation at one size) and providers (one way to do it)."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch

from diffgan_fast import backends

HALF_TOO = (torch.float32, torch.bfloat16)
NATIVE = {"cpu": ("cpu",), "cuda": ("cuda", "triton")}


@dataclass(frozen=True)
class Options:
    """How much to measure. A provider gets `rounds` timed batches, each of `batch_s` seconds or one call."""

    device: str = "cpu"
    threads: int = 1
    quick: bool = False
    compile: bool = True

    @property
    def rounds(self) -> int:
        return 3 if self.quick else 30

    @property
    def batch_s(self) -> float:
        return 0.0 if self.quick else 0.005


@dataclass(frozen=True)
class Size:
    """A shape and dtype. `compiled`: torch.compile is measured too. `reference`: the plain torch back end is too."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device
    compiled: bool = True
    reference: bool = False

    def randn(self) -> torch.Tensor:
        return torch.randn(self.shape, dtype=self.dtype, device=self.device)

    def column(self, table: torch.Tensor) -> torch.Tensor:
        """A coefficient table [T + 1] in the size's dtype, shaped so that table[t] broadcasts against the tensors."""
        return table.to(self.device, self.dtype).view(-1, *[1] * (len(self.shape) - 1))


@dataclass(frozen=True)
class Provider:
    """One way to do a case: `run(*data, t)`, or `run(*data, t, key)` with a back end of ours; a tensor or a tuple.

    noise: where its noise is found for the check: "key" (regenerated), "hidden" (only its moments can be checked),
        "returned" (the last output), "given" (the last input), or "unchecked".
    time: what it gets for t: "each" (int64 [N]), "each0" (minus 1), "one" (an int), "one0" (minus 1).
    bytes: what it moves per element, if not what the case says.
    """

    name: str
    run: Callable
    noise: str = "hidden"
    backend: str | None = None
    time: str = "each"
    bytes: int | None = None


@dataclass(frozen=True)
class Case:
    """One computation at one size.

    expected(data, t, z): the outputs in float64, from float64 data and z, a tuple with one noise tensor a stream.
    bytes, ops: the fewest bytes moved and about the arithmetic done per element (see `NORMAL_OPS`).
    """

    name: str
    size: Size
    data: Callable[[], tuple[torch.Tensor, ...]]
    expected: Callable[[tuple, torch.Tensor, tuple], tuple]
    providers: Iterable[Provider]
    bytes: int
    ops: int
    streams: int = 1
    draw: str = "normal"


@dataclass(frozen=True)
class Call:
    """The arguments of one call of a provider, and what they were made of: the data, t [N] and the key."""

    arguments: tuple
    data: tuple[torch.Tensor, ...]
    t: torch.Tensor
    key: int


# Arithmetic per number, counted in csrc/philox.h with a fused multiply-add and a 32 x 32 -> 64 bit product as one each.
UNIFORM_OPS = 10 * 8 // 4 + 3  # ten rounds of 2 products, 4 xors and 2 key additions serve four numbers
NORMAL_OPS = 10 * 8 // 4 + 54 // 2  # Box-Muller: logarithm 22, the rest 32, for two numbers


def sizes(options: Options) -> list[Size]:
    """The sizes that every op is measured at. On a GPU the large ones leave out torch.compile but for 256 MiB."""
    device = torch.device(options.device)
    if options.quick:
        return [Size((8, 3, 4, 4), torch.float32, device, reference=True)]
    found = [
        Size((1024, 3, 32, 32), torch.float32, device),
        Size((256, 2), torch.float32, device, reference=True),
        Size((128, 1, 28, 28), torch.float32, device, compiled=options.device == "cpu"),
    ]
    if options.device == "cuda":
        found.append(Size((1024, 3, 32, 32), torch.bfloat16, device))
        # No GiB of bfloat16: the float64 check of it needs more memory than the card has.
        for mebibytes, dtypes in ((64, HALF_TOO), (256, HALF_TOO), (1024, HALF_TOO[:1])):
            for dtype in dtypes:
                shape = (mebibytes * 2**20 // dtype.itemsize // 2**14, 4, 64, 64)
                found.append(Size(shape, dtype, device, compiled=mebibytes == 256))
    return found


def ours(run: Callable, size: Size, time: str = "each") -> list[Provider]:
    """A provider for each back end that runs here."""
    names = [name for name in NATIVE[size.device.type] if backends.unavailable(name) is None]
    return [Provider(f"dgf-{n}", run, "key", n, time) for n in names + ["reference"] * size.reference]


def peers(
    build: Callable[[Callable], Callable], size: Size, options: Options, noise: str = "hidden", time: str = "each"
) -> list[Provider]:
    """Plain torch, eager and under both modes of torch.compile; `build(wrap)` makes it with its parts wrapped."""
    found = [Provider("eager", build(lambda f: f), noise, None, time)]
    if options.compile and size.compiled:
        modes: dict[str, dict[str, bool]] = {"compile": {}, "compile-fallback": {"fallback_random": True}}
        for name, mode in modes.items():
            run = build(lambda f, mode=mode: torch.compile(f, dynamic=False, options=mode))
            found.append(Provider(name, run, noise, None, time))
    return found


def copy(size: Size) -> Provider:
    """`out.copy_(x)`: the limit of anything that moves memory."""
    sources = [size.randn() for _ in range(set_count(size))]
    pairs = deque((source, torch.empty_like(source)) for source in sources)

    def run(*_: Any) -> torch.Tensor:
        pairs.rotate()
        return pairs[0][1].copy_(pairs[0][0])

    return Provider("copy", run, "unchecked", bytes=2 * size.dtype.itemsize)


def set_count(size: Size) -> int:
    """How many input sets make the data larger than the cache three times over."""
    cache = torch.cuda.get_device_properties(size.device).L2_cache_size if size.device.type == "cuda" else 2**25
    return max(2, min(32, -(-3 * cache // (torch.Size(size.shape).numel() * size.dtype.itemsize))))
