"""Small fully connected networks, a whole one in one call.

    z_0 = W_0 x + b_0,   z_i = [z_{i-1}] + W_i f(z_{i-1}) + b_i,   out = W_last f(z) + b_last

with f a ReLU (slope 0) or LeakyReLU and the term in brackets where `skip`. In plain torch such a net is dozens of tiny
ops; the C++ form takes blocks of rows through all layers while they stay in a core's cache. There is one only for the
CPU, where a torch whose BLAS can be called from C++ is needed; else the plain form runs. With AVX2 its float32 products
are its own: weights become panels once a call, and what follows a product is applied while it is in the cache. The
gradient penalty has a Triton form too.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence

import torch
from torch.autograd import forward_ad
from torch.nn.functional import leaky_relu, linear, relu

from diffgan_fast._native import LIBRARY
from diffgan_fast.backends import resolve, unavailable
from diffgan_fast.ops import support

_NET = "Tensor[] weights, Tensor[] biases, float slope"
LIBRARY.define(f"mlp(Tensor x, {_NET}, bool skip, bool keep) -> (Tensor, Tensor)")
LIBRARY.define(
    "mlp_backward(Tensor grad, Tensor x, Tensor hidden, Tensor[] weights, float slope, bool skip, bool want_x, "
    "bool want_parameters) -> (Tensor, Tensor)"
)
for _suffix in ("", "_triton"):
    LIBRARY.define(f"mlp_penalty{_suffix}(Tensor x, {_NET}, int judged, float center) -> (Tensor, Tensor)")
_RAW = torch.ops.diffgan_fast
_EXISTS = torch._C._dispatch_has_kernel_for_dispatch_key("diffgan_fast::mlp", "CPU")


def _penalty_triton(*args):
    return importlib.import_module("diffgan_fast.kernels.mlp").mlp_penalty(*args)


LIBRARY.impl("mlp_penalty_triton", _penalty_triton, "CompositeExplicitAutograd")


def _plain(x, weights, biases, slope, skip):
    z = linear(x, weights[0], biases[0])
    for weight, bias in zip(weights[1:-1], biases[1:-1], strict=True):
        active = relu(z) if slope == 0 else leaky_relu(z, slope)
        z = z + linear(active, weight, bias) if skip else linear(active, weight, bias)
    return linear(relu(z) if slope == 0 else leaky_relu(z, slope), weights[-1], biases[-1])


def _regular(x: torch.Tensor, weights: Sequence[torch.Tensor], biases: Sequence[torch.Tensor | None]) -> bool:
    """Whether all is of one type and device, with hidden layers of one width, and torch only wants the numbers."""
    return (
        x.dim() == 2
        and not torch.compiler.is_compiling()
        and not torch._C._are_functorch_transforms_active()
        and forward_ad._current_level < 0
        and not torch.is_autocast_enabled(x.device.type)
        and all(b is not None and b.dtype == x.dtype and b.device == x.device and b.is_contiguous() for b in biases)
        and all(w.dtype == x.dtype and w.device == x.device and w.is_contiguous() for w in weights)
        and len({len(w) for w in weights[:-1]}) == 1
    )


def fused(
    x: torch.Tensor, weights: Sequence[torch.Tensor], biases: Sequence[torch.Tensor | None], slope: float
) -> bool:
    """Whether the C++ form takes these: on the CPU, float32 or float64 throughout, hidden layers of one width.

    It keeps f(z) and not z: no slope may be below 0, so that both have one sign.
    """
    return (
        _EXISTS
        and slope >= 0
        and x.dtype in (torch.float32, torch.float64)
        and resolve(x.device.type) == "cpu"
        and _regular(x, weights, biases)
    )


def penalty_op(
    x: torch.Tensor, weights: Sequence[torch.Tensor], biases: Sequence[torch.Tensor | None], slope: float
) -> Callable | None:
    """The op `mlp_penalty` that takes these, or None: C++ where `fused`; Triton, for float32, where CUDA C++ is too."""
    if fused(x, weights, biases, slope):
        return _RAW.mlp_penalty.default
    name = resolve(x.device.type)
    if name in ("triton", "cuda") and x.dtype == torch.float32 and _regular(x, weights, biases):
        return _RAW.mlp_penalty_triton.default if unavailable("triton") is None else None
    return None


class _MLP(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, slope, skip, layers, *parameters):
        out, hidden = _RAW.mlp.default(x, parameters[:layers], parameters[layers:], slope, skip, True)
        ctx.save_for_backward(x, hidden, *parameters)
        ctx.slope, ctx.skip = slope, skip
        return out

    @staticmethod
    def backward(ctx, grad):
        x, hidden, *parameters = ctx.saved_tensors
        layers = len(parameters) // 2
        weights, biases = parameters[:layers], parameters[layers:]
        want_x, _, _, _, *wanted = ctx.needs_input_grad
        if torch.is_grad_enabled():  # create_graph: the gradient of the plain form has one
            with torch.enable_grad():
                out = _plain(x, weights, biases, ctx.slope, ctx.skip)
            inputs = [v for v, w in zip((x, *parameters), (want_x, *wanted), strict=True) if w]
            got = iter(torch.autograd.grad(out, inputs, grad, create_graph=True, allow_unused=True))
            return next(got) if want_x else None, None, None, None, *(next(got) if w else None for w in wanted)
        grad_x, flat = _RAW.mlp_backward.default(
            grad.contiguous(), x, hidden, weights, ctx.slope, ctx.skip, want_x, any(wanted)
        )
        grads = split(flat, weights, True) if any(wanted) else [None] * len(wanted)
        return grad_x if want_x else None, None, None, None, *grads


def split(flat: torch.Tensor, weights: Sequence[torch.Tensor], biases: bool) -> list[torch.Tensor]:
    """A flat gradient as views: the weights', then, where it holds them, the biases'."""
    sizes = [n for w in weights for n in ((w.numel(), w.shape[0]) if biases else (w.numel(),))]
    parts = flat.split(sizes)
    stride = 2 if biases else 1
    return [p.view_as(w) for p, w in zip(parts[::stride], weights, strict=True)] + list(parts[1::2] if biases else ())


def mlp(
    x: torch.Tensor,
    weights: Sequence[torch.Tensor],
    biases: Sequence[torch.Tensor],
    *,
    slope: float = 0.0,
    skip: bool = False,
) -> torch.Tensor:
    """The output of a fully connected network with (Leaky)ReLU between its layers.

    Args:
        x: [N, D].
        weights: two or more, [H, D], [H, H] …, [K, H], as `nn.Linear` has them.
        biases: [H] …, [K].
        slope: of the activation below 0.
        skip: whether hidden layers add their output to their input (before the activation, as in He et al. 2016b).

    Returns: [N, K].
    Gradients: with respect to x, weights and biases, every order; forward mode too.
    """
    x = x.contiguous()
    if not fused(x, weights, biases, slope):
        return _plain(x, weights, biases, slope, skip)
    if support.needs_autograd(x, *weights, *biases):
        return _MLP.apply(x, slope, skip, len(weights), *weights, *biases)
    return _RAW.mlp.default(x, list(weights), list(biases), slope, skip, False)[0]
