"""The gradient penalty of a fully connected critic in Triton: the raw op `mlp_penalty` (see diffgan_fast/ops/mlp.py).

A program takes its rows through the forward pass, the input gradient and the tangent pass of the whole net (the
mathematics stands in diffgan_fast/ops/closed.py). What a layer hands to the next goes through global memory, so that
registers do not depend on the widths, and lies there for the weights' gradients: products over all rows, which are
torch's.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl

from diffgan_fast.kernels import core
from diffgan_fast.kernels.penalty import relative

# A program's tile of a layer's output, and how much of its input it takes at a time. With eight warps that is 16 sums a
# thread, about seven multiplications for a read of shared memory, and no spills.
_ROWS, _COLUMNS, _CHUNK = 16, 256, 16


@triton.jit
def _slope_at(z, slope):
    return tl.where(z > 0, 1.0, slope)


@triton.jit
def _layer(
    source, inputs, w, bias, z, out, outputs, row, exists, slope,
    BACK: tl.constexpr, ACTIVATE: tl.constexpr, COLUMNS: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """out = (source w^T + bias) f'(z), of the rows `row` that exist, for all threads of the program to read.

    `source` [., inputs] is ones if it is None, and f(source) if ACTIVATE; w is transposed if BACK. Without a bias or a
    z nothing is added or multiplied.
    """
    for start in range(0, outputs, COLUMNS):
        j = start + tl.arange(0, COLUMNS)[None, :]
        y = tl.zeros((row.shape[0], COLUMNS), tl.float32)
        for first in range(0, inputs, CHUNK):
            k = first + tl.arange(0, CHUNK)
            here, there = k[None, :], k[:, None]
            if source is None:
                a = tl.where(exists & (here < inputs), 1.0, 0.0)
            else:
                a = tl.load(source + row * inputs + here, mask=exists & (here < inputs), other=0.0)
            if ACTIVATE:
                a *= _slope_at(a, slope)
            if BACK:
                at = there * outputs + j
            else:
                at = j * inputs + there
            b = tl.load(w + at, mask=(there < inputs) & (j < outputs), other=0.0)
            y = tl.dot(a, b, y, input_precision="ieee")
        at, valid = row * outputs + j, exists & (j < outputs)
        if bias is not None:
            y += tl.load(bias + j, mask=j < outputs)
        if z is not None:
            y *= _slope_at(tl.load(z + at, mask=valid), slope)
        tl.store(out + at, y, mask=valid)
    tl.debug_barrier()


# Only the widths `inputs` and `hidden` are specialised: on them depends how wide the accesses are.
@triton.jit(do_not_specialize=("n", "outputs", "layers", "judged"))
def _passes(
    x, weights, biases, v, deltas, tangents, penalties, n, inputs, hidden, outputs, layers, judged, slope, center, each,
    INPUTS: tl.constexpr, HIDDEN: tl.constexpr, CHUNK: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """v = dP/dg [n, inputs], (delta_i, tangent_i) [layers, n, hidden] of the hidden layers, and (||g|| - center)^2 [n].

    The weights follow one another in one tensor, and so do the biases. INPUTS and HIDDEN columns are a tile.
    """
    first = core.wide(tl.program_id(0)) * BLOCK
    row = tl.arange(0, BLOCK)[:, None]
    exists = row < n - first
    x += first * inputs
    v += first * inputs
    deltas += first * hidden
    tangents += first * hidden
    size = core.wide(n) * hidden  # of what all rows have of a layer
    square = core.wide(hidden) * hidden
    inner = weights + hidden * inputs - square  # inner + i square is W_i
    last = layers - 1
    # Forward, for the slopes: z_i stands where tangent_i will.
    _layer(x, inputs, weights, biases, None, tangents, hidden, row, exists, slope, False, False, HIDDEN, CHUNK)
    for i in range(1, layers):
        z = tangents + i * size
        _layer(
            z - size, hidden, inner + i * square, biases + i * hidden, None, z, hidden, row, exists, slope,
            False, True, HIDDEN, CHUNK,
        )  # fmt: skip
    # The gradient of the outputs' sum, back to x.
    _layer(
        None, outputs, inner + layers * square, None, tangents + last * size, deltas + last * size, hidden,
        row, exists, slope, True, False, HIDDEN, CHUNK,
    )  # fmt: skip
    for i in range(last, 0, -1):
        below = (i - 1) * size
        _layer(
            deltas + i * size, hidden, inner + i * square, None, tangents + below, deltas + below, hidden,
            row, exists, slope, True, False, HIDDEN, CHUNK,
        )  # fmt: skip
    _layer(deltas, hidden, weights, None, None, v, inputs, row, exists, slope, True, False, INPUTS, CHUNK)
    # The penalty of g = v, and dP/dg in its place.
    squares = tl.zeros((BLOCK, 1), tl.float32)
    for start in range(0, judged, INPUTS):
        j = start + tl.arange(0, INPUTS)[None, :]
        g = tl.load(v + row * inputs + j, mask=exists & (j < judged), other=0.0)
        squares += tl.sum(g * g, 1, keep_dims=True)
    norm = tl.sqrt(squares)
    penalty = tl.where(center == 0, squares, (norm - center) * (norm - center))
    tl.store(penalties + first + row, penalty, mask=exists)
    factor = each * relative(norm, center)
    tl.debug_barrier()  # every thread has read g
    for start in range(0, inputs, INPUTS):
        j = start + tl.arange(0, INPUTS)[None, :]
        at = v + row * inputs + j
        g = tl.load(at, mask=exists & (j < judged), other=0.0)
        tl.store(at, factor * g, mask=exists & (j < inputs))
    tl.debug_barrier()
    # The tangent along v.
    _layer(v, inputs, weights, None, tangents, tangents, hidden, row, exists, slope, False, False, HIDDEN, CHUNK)
    for i in range(1, layers):
        z = tangents + i * size
        _layer(
            z - size, hidden, inner + i * square, None, z, z, hidden, row, exists, slope, False, False, HIDDEN, CHUNK
        )


def _check(x: torch.Tensor, weights: Sequence[torch.Tensor], biases: Sequence[torch.Tensor], judged: int) -> None:
    for v in (x, *weights, *biases):
        if v.dtype != torch.float32 or v.device != x.device:
            raise ValueError(f"expected float32 on {x.device} throughout, got {v.dtype} on {v.device}")
    if x.dim() != 2 or not x.is_contiguous() or len(weights) < 2 or not 1 <= judged <= x.shape[1]:
        raise ValueError(f"expected a contiguous [N, D >= {judged}] and two or more layers, got {list(x.shape)}")
    widths = [x.shape[1], *[len(weights[0])] * (len(weights) - 1), len(weights[-1])]
    fit = [tuple(w.shape) for w in weights] == list(zip(widths[1:], widths[:-1], strict=True))
    if not fit or [tuple(b.shape) for b in biases] != [(width,) for width in widths[1:]]:
        raise ValueError("the layers do not fit one another, or the hidden ones differ in width")


def mlp_penalty(
    x: torch.Tensor, weights: Sequence[torch.Tensor], biases: Sequence[torch.Tensor], slope: float, judged: int,
    center: float,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """(the penalty, its flat gradient with respect to the weights), in float32.

    Deterministic: torch adds the samples' penalties in float64 and in a fixed order.
    """
    _check(x, weights, biases, judged)
    n, inputs = x.shape
    layers, hidden, outputs = len(weights) - 1, len(weights[0]), len(weights[-1])
    packed = torch.cat([w.flatten() for w in weights])
    deltas, tangents = x.new_empty(2, layers, n, hidden)
    v, penalties, flat = torch.empty_like(x), x.new_empty(n), torch.empty_like(packed)

    def tile(width):
        return min(_COLUMNS, max(16, triton.next_power_of_2(width)))

    core.launch(
        _passes, x.device, triton.cdiv(n, _ROWS), x, packed, torch.cat(list(biases)), v, deltas, tangents, penalties,
        n, inputs, hidden, outputs, layers, judged, slope, center, 2 / max(n, 1),
        INPUTS=tile(inputs), HIDDEN=tile(hidden), CHUNK=_CHUNK, BLOCK=_ROWS, num_warps=8,
        enable_fp_fusion=True,  # the products are rounded once a step; without it they were two instructions
    )  # fmt: skip
    enter, inner, leave = flat.split([hidden * inputs, (layers - 1) * hidden**2, outputs * hidden])
    torch.mm(deltas[0].t(), v, out=enter.view(hidden, inputs))
    torch.bmm(deltas[1:].transpose(1, 2), tangents[:-1], out=inner.view(layers - 1, hidden, hidden))
    leave.view(outputs, hidden).copy_(tangents[-1].sum(0))
    return penalties.mean(dtype=torch.float64).float(), flat
