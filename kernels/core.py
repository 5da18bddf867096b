"""What the Triton kernels share: which elements a program works on, their coefficient rows, and the launch.

The work is cut along the noise: a tile is BLOCK Philox blocks of four consecutive numbers each, [BLOCK, 4] elements, so
that a thread holds the four elements which one block serves, and contiguous data moves in accesses of four elements (16
bytes in float32). Elements are numbered by their place in the contiguous NCHW tensor, whatever the memory format.
"""

from __future__ import annotations

import contextlib
import math

import torch
import triton
import triton.language as tl

BLOCK = 256  # Philox blocks of a program: two a thread, whose ten rounds hide each other's latency
FLOATS = (torch.float32, torch.bfloat16, torch.float16)
_INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)

# Arguments that change from call to call: Triton must not compile anew because one is 1 or a multiple of 16.
CHANGING = ("row", "n_rows", "inner", "key", "first_block", "n", "sample")


@triton.jit
def wide(v):
    """v as int64. The interpreter keeps an int in as few bits as it needs, and v.to(tl.int64) may leave it so."""
    return tl.full([], 0, tl.int64) + v


@triton.jit
def tile(
    n, sample, channels, plane, first_block,
    SHIFT: tl.constexpr, ALIGNED: tl.constexpr, WIDE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The elements of this program: (e, at, valid, counter, owner).

    Row i of the tile is elements e[i] … e[i] + 3, at `at` [BLOCK, 4] in memory, `valid` where they exist. Their noise
    is Philox block counter[i] of sample owner[i] (0 unless every sample, of `sample` elements, has a key of its own).
    `channels` and `plane` (= H W) are None but for channels_last. SHIFT is the place of the first element in its block,
    ALIGNED the number of neighbouring rows that exist together, so that accesses may span them (0: rows may be cut).
    """
    q = tl.program_id(0)
    if WIDE:
        q = q.to(tl.int64)
    q = q * BLOCK + tl.arange(0, BLOCK)
    lane = tl.arange(0, 4)[None, :]
    owner = 0
    if ALIGNED:  # every row of the tile is whole, and in one plane
        whole = q // ALIGNED < n // (4 * ALIGNED)
        valid = whole[:, None]
        if plane is None:
            block = q
            at = 4 * q[:, None] + lane
        else:
            # Neighbouring rows are neighbouring channels: they lie side by side in memory.
            c = q % channels
            p = q // channels
            block = (p // (plane // 4) * channels + c) * (plane // 4) + p % (plane // 4)
            at = (4 * channels * p + c)[:, None] + channels * lane
        e = 4 * block
        if sample is not None:
            owner = tl.where(whole, e // sample, 0)
            block = block - owner * (sample // 4)
    else:
        if sample is None:
            block = q
            e = 4 * q - SHIFT
            index = e[:, None] + lane
            valid = (index >= 0) & (index < n)
        else:
            blocks = (sample + (SHIFT + 3)) // 4  # those that a sample touches
            owner = q // blocks
            block = q - owner * blocks
            e = owner * sample + 4 * block - SHIFT
            index = e[:, None] + lane
            inside = 4 * block[:, None] + lane - SHIFT
            valid = (inside >= 0) & (inside < sample) & (index < n)
            owner = tl.where(owner < n // sample, owner, 0)
        if plane is None:
            at = index
        else:
            image = index // (plane * channels)
            at = image * (plane * channels) + index % plane * channels + index // plane % channels
    return e, at, valid, wide(first_block) + block, owner


@triton.jit
def rows_of(rows, n_rows, t, row, inner, e, valid, COLUMNS: tl.constexpr, PER_BLOCK: tl.constexpr):
    """Pointers to coefficient rows and whether each exists: one (inner is None), [BLOCK, 1] (PER_BLOCK) or [BLOCK, 4].

    An element's row is `row` if inner is None, else that of its group of `inner` elements: t[group], or row `group`.
    """
    if inner is None:
        i = row
    else:
        e = e[:, None]
        if not PER_BLOCK:
            e += tl.arange(0, 4)[None, :]
        i = e // inner
        if t is not None:
            i = tl.load(t + i, mask=valid, other=-1)
    return rows + i * COLUMNS, (i >= 0) & (i < n_rows)


@triton.jit
def column(rows, exists, COLUMN: tl.constexpr):
    """One column of the rows of `rows_of`; NaN where the row does not exist."""
    return tl.load(rows + COLUMN, mask=exists, other=float("nan"))


@triton.jit
def store(at, v, valid):
    """Stores v, rounded to the type that `at` points to."""
    if _INTERPRETED and at.dtype.element_ty == tl.bfloat16:  # the interpreter cuts off what a GPU rounds
        bits = v.to(tl.uint32, bitcast=True)
        bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000
        v = tl.where(v == v, bits.to(tl.float32, bitcast=True), v)
    tl.store(at, v.to(at.dtype.element_ty), mask=valid)


def _channels_last(x: torch.Tensor) -> bool:
    return x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last)


def check_float(x: torch.Tensor) -> None:
    """ValueError unless x is of a type that these kernels take: they have no double precision."""
    if x.dtype not in FLOATS:
        raise ValueError(
            f"the Triton back end takes float32, bfloat16 and float16, got {x.dtype}: "
            "use another back end, such as diffgan_fast.backend('reference')"
        )


def check_like(x: torch.Tensor, y: torch.Tensor | None, name: str) -> None:
    """ValueError unless y is absent or has x's shape, type, device and memory format."""
    if y is None:
        return
    same = y.shape == x.shape and y.dtype == x.dtype and y.device == x.device
    if not same or not (y.is_contiguous() if x.is_contiguous() else _channels_last(y)):
        raise ValueError(f"{name} must match x in shape, dtype, device and memory format")


def noise_arguments(x: torch.Tensor, key: int, key_t: torch.Tensor | None, first: int) -> dict:
    """The arguments of `tile` and of the noise, as keywords of a kernel that works on x."""
    if not x.is_contiguous() and not _channels_last(x):
        raise ValueError(f"expected a contiguous or channels_last tensor, got strides {x.stride()} for {list(x.shape)}")
    if key_t is not None and (key_t.dtype != torch.int64 or key_t.device != x.device or not key_t.is_contiguous()):
        raise ValueError(f"the key must be int64, contiguous and on {x.device}, got {key_t.dtype} on {key_t.device}")
    n, samples = x.numel(), 1 if key_t is None else key_t.numel()
    sample, channels, plane = None, None, None
    if samples != 1:
        if x.shape[:1] != (samples,):
            raise ValueError(f"expected one key, or one for each sample, got {samples} for shape {list(x.shape)}")
        sample = max(n // max(samples, 1), 1)
    if not x.is_contiguous():
        channels, plane = x.shape[1], x.shape[2] * x.shape[3]
    shift = first % 4
    aligned = shift == 0 and all(v is None or v % 4 == 0 for v in (n, sample, plane))
    return {
        "keys": key_t,
        "key": key,
        "first_block": first // 4,
        "n": n,
        "sample": sample,
        "channels": channels,
        "plane": plane,
        "SHIFT": shift,
        "ALIGNED": math.gcd(channels or 1, 8) if aligned else 0,
        "WIDE": n + 8 * (BLOCK + samples) >= 2**31,  # the padding of the last tile, and of every sample
    }


def row_arguments(
    x: torch.Tensor, rows: torch.Tensor, columns: int, t: torch.Tensor | None, row: int, noise: dict
) -> dict:
    """The arguments of `rows_of`, as keywords of a kernel that works on x with the arguments `noise`."""
    if rows.dtype != torch.float32 or rows.dim() != 2 or rows.shape[1] != columns or rows.device != x.device:
        raise ValueError(f"rows must be float32 [R, {columns}] on {x.device}, got {rows.dtype} {list(rows.shape)}")
    if t is not None and (t.dtype != torch.int64 or t.device != x.device or not t.is_contiguous()):
        raise ValueError(f"t must be int64, contiguous and on {x.device}, got {t.dtype} on {t.device}")
    inner = None
    if t is not None or row == -1:
        groups = rows.shape[0] if t is None else t.numel()
        if x.numel() % max(groups, 1) or (x.numel() and not groups):
            raise ValueError(f"{groups} coefficient rows do not divide {x.numel()} elements into equal parts")
        inner = max(x.numel() // max(groups, 1), 1)
    return {
        "rows": rows.contiguous(),
        "n_rows": rows.shape[0],
        "t": t,
        "row": row,
        "inner": inner,
        "PER_BLOCK": noise["ALIGNED"] > 0 and inner is not None and inner % 4 == 0,
    }


def programs(noise: dict) -> int:
    """The number of programs that cover the elements of `noise_arguments`."""
    n, sample = noise["n"], noise["sample"] or noise["n"]
    blocks = n // sample * triton.cdiv(sample + noise["SHIFT"], 4) if n else 0
    return triton.cdiv(blocks, BLOCK)


def run(kernel, count: int, *args, **named) -> None:
    """Starts `count` programs on the current device. The tests put a function here that only compiles."""
    kernel[(count,)](*args, **named)


def launch(kernel, device: torch.device, count: int, *args, **named) -> None:
    """Runs `count` programs of a kernel on a device; none is no launch. `named` may have other values of the options.

    The compiler may not fuse multiplications with additions: the kernels write every fused operation out (tl.fma), so
    that results do not depend on a version of Triton, whose default changed between 3.6 and 3.9.
    """
    options = {"BLOCK": BLOCK, "num_warps": 4, "enable_fp_fusion": False}
    if count:
        with torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext():
            run(kernel, count, *args, **options | named)
