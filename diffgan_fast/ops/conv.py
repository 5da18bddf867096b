"""Convolutions of channels_last images on the CPU, where they are nearly all of a network's time.

Those of 3x3, stride 1 and padding 1 run by Winograd's minimal filtering F(4x4, 3x3) (Lavin and Gray 2016): a quarter of
the multiplications, about half of oneDNN's time, forward and in both gradients. Rounding errors are about twice those
of the definition in float32, a few 1e-7 of the largest output. Of the others the weights' gradient is ours on
processors with AVX2 alone, where oneDNN's runs at about half the speed of its other convolutions. All else is torch's.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn import functional
from torch.utils.flop_counter import register_flop_formula

from diffgan_fast._native import LIBRARY
from diffgan_fast.backends import resolve

LIBRARY.define("conv2d_weight_gradient(Tensor x, Tensor grad, int kernel, int stride, int padding) -> (Tensor, Tensor)")
LIBRARY.define("conv2d_winograd(Tensor x, Tensor weight, Tensor? bias, bool transposed) -> Tensor")
LIBRARY.define("conv2d_winograd_weight_gradient(Tensor x, Tensor grad) -> (Tensor, Tensor)")
_RAW = torch.ops.diffgan_fast


def _exists(name: str) -> bool:
    return torch._C._dispatch_has_kernel_for_dispatch_key(f"diffgan_fast::{name}", "CPU")


_DIRECT, _WINOGRAD = _exists("conv2d_weight_gradient"), _exists("conv2d_winograd")

# Fewer channels leave the products of matrices too thin to pay for the transforms, and with fewer tiles those of the
# weights take as long as the rest: at these sizes both ways were measured to take the same time.
CHANNELS, TILES = 24, 8


# For the counters of torch and of `nets.macs`: what the definition takes, without the biases, as for torch's own.
@register_flop_formula(_RAW.conv2d_weight_gradient)
def _flops(x: torch.Size, grad: torch.Size, kernel: int, *_, **__) -> int:
    return 2 * math.prod(grad) * x[1] * kernel**2


@register_flop_formula(_RAW.conv2d_winograd)
def _winograd_flops(x: torch.Size, weight: torch.Size, *_, **__) -> int:
    return 2 * math.prod(x) // x[1] * math.prod(weight)


@register_flop_formula(_RAW.conv2d_winograd_weight_gradient)
def _winograd_gradient_flops(x: torch.Size, grad: torch.Size, *_, **__) -> int:
    return _flops(x, grad, 3)


def _in_channels_last(*tensors: Tensor) -> bool:
    return all(v.is_contiguous(memory_format=torch.channels_last) for v in tensors)


def _by_winograd(x: Tensor, weight: Tensor, stride: int, padding: int) -> bool:
    """Whether a convolution, and its gradients, are computed by Winograd's algorithm: a matter of shapes alone."""
    n, _, height, width = x.shape
    return (
        _WINOGRAD
        and stride == padding == 1
        and weight.shape[2:] == (3, 3)
        and min(weight.shape[:2]) >= CHANNELS
        and n * -(-height // 4) * -(-width // 4) >= TILES
    )


class _Conv2d(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, stride, padding):
        ctx.save_for_backward(x, weight)
        ctx.stride, ctx.padding, ctx.winograd = stride, padding, _by_winograd(x, weight, stride, padding)
        if ctx.winograd:
            return _RAW.conv2d_winograd.default(x, weight, bias, False)
        return functional.conv2d(x, weight, bias, stride, padding)

    @staticmethod
    def backward(ctx, grad):
        x, weight = ctx.saved_tensors
        stride, padding = ctx.stride, ctx.padding
        wants = ctx.needs_input_grad[:3]

        def plain(*wanted):
            return torch.ops.aten.convolution_backward(
                grad, x, weight, [len(weight)], [stride] * 2, [padding] * 2, [1, 1], False, [0, 0], 1, wanted
            )

        if torch.is_grad_enabled():  # the gradient has one too, ours has not
            return *plain(*wants), None, None
        if ctx.winograd:
            grad = grad.contiguous(memory_format=torch.channels_last)
            grad_x = _RAW.conv2d_winograd.default(grad, weight, None, True) if wants[0] else None
            gradients = _RAW.conv2d_winograd_weight_gradient.default(x, grad) if any(wants[1:]) else (None, None)
        elif _DIRECT and wants[1] and _in_channels_last(grad):
            grad_x = plain(True, False, False)[0] if wants[0] else None
            gradients = _RAW.conv2d_weight_gradient.default(x, grad, weight.shape[-1], stride, padding)
        else:
            return *plain(*wants), None, None
        return grad_x, *(g if wanted else None for g, wanted in zip(gradients, wants[1:], strict=True)), None, None


def conv2d(x: Tensor, weight: Tensor, bias: Tensor | None = None, *, stride: int = 1, padding: int = 0) -> Tensor:
    """A convolution with a square kernel.

    It is ours (see the module) where x and weight are float32 in channels_last on the CPU, outside of autocast,
    compiled code and functorch. Threads do not change what it gives, nor, from `TILES` tiles of 4x4 pixels on, do other
    samples.

    Args:
        x: [N, C, H, W].
        weight: [K, C, k, k].
        bias: [K].

    Returns: [N, K, (H + 2 padding - k) // stride + 1, the same of W].
    Gradients: with respect to x, weight and bias, every order; forward mode too.
    """
    if not (
        (_WINOGRAD or _DIRECT)
        and x.dtype == weight.dtype == torch.float32
        and x.dim() == 4
        and _in_channels_last(x, weight)
        and not torch.compiler.is_compiling()
        and not torch._C._are_functorch_transforms_active()
        and forward_ad._current_level < 0
        and not torch.is_autocast_enabled("cpu")
        and resolve(x.device.type) == "cpu"
    ):
        return functional.conv2d(x, weight, bias, stride, padding)
    winograd = _by_winograd(x, weight, stride, padding)
    given = (x, weight) if bias is None else (x, weight, bias)
    if torch.is_grad_enabled() and any(v.requires_grad for v in given):
        if winograd or _DIRECT:
            return _Conv2d.apply(x, weight, bias, stride, padding)
    elif winograd:
        return _RAW.conv2d_winograd.default(x, weight, bias, False)
    return functional.conv2d(x, weight, bias, stride, padding)
