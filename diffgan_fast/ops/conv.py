"""Convolutions whose weights' gradient is ours on the CPU, where it takes most of a network's backward pass.

oneDNN's own, on processors with AVX2 alone, runs at about half the speed of its other convolutions for tensors in
channels_last. All else is torch's.
"""

from __future__ import annotations

import math

import torch
from torch.autograd import forward_ad
from torch.nn import functional
from torch.utils.flop_counter import register_flop_formula

from diffgan_fast._native import LIBRARY
from diffgan_fast.backends import resolve

LIBRARY.define("conv2d_weight_gradient(Tensor x, Tensor grad, int kernel, int stride, int padding) -> (Tensor, Tensor)")
_RAW = torch.ops.diffgan_fast
_EXISTS = torch._C._dispatch_has_kernel_for_dispatch_key("diffgan_fast::conv2d_weight_gradient", "CPU")


@register_flop_formula(_RAW.conv2d_weight_gradient)
def _flops(x: torch.Size, grad: torch.Size, kernel: int, *_, **__) -> int:
    """For the counters of torch and of `nets.macs`, as for torch's own: without the biases."""
    return 2 * math.prod(grad) * x[1] * kernel**2


def _in_channels_last(*tensors: torch.Tensor) -> bool:
    return all(v.is_contiguous(memory_format=torch.channels_last) for v in tensors)


class _Conv2d(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, stride, padding):
        ctx.save_for_backward(x, weight)
        ctx.stride, ctx.padding = stride, padding
        return functional.conv2d(x, weight, bias, stride, padding)

    @staticmethod
    def backward(ctx, grad):
        x, weight = ctx.saved_tensors
        stride, padding = ctx.stride, ctx.padding

        def plain(*wanted):
            return torch.ops.aten.convolution_backward(
                grad, x, weight, [len(weight)], [stride] * 2, [padding] * 2, [1, 1], False, [0, 0], 1, wanted
            )

        wants_x, wants_weight, wants_bias = ctx.needs_input_grad[:3]
        if torch.is_grad_enabled() or not wants_weight or not _in_channels_last(grad):  # it has a gradient, ours not
            return *plain(wants_x, wants_weight, wants_bias), None, None
        grad_x = plain(True, False, False)[0] if wants_x else None
        grad_weight, grad_bias = _RAW.conv2d_weight_gradient.default(x, grad, weight.shape[-1], stride, padding)
        return grad_x, grad_weight, grad_bias if wants_bias else None, None, None


def conv2d(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None, *, stride: int = 1, padding: int = 0
) -> torch.Tensor:
    """A convolution with a square kernel.

    Its weights' gradient is ours where x and weight are float32 in channels_last on the CPU, outside of autocast,
    compiled code and functorch; it does not depend on the number of threads.

    Args:
        x: [N, C, H, W].
        weight: [K, C, k, k].
        bias: [K].

    Returns: [N, K, (H + 2 padding - k) // stride + 1, the same of W].
    Gradients: with respect to x, weight and bias, every order; forward mode too.
    """
    if (
        _EXISTS
        and weight.requires_grad
        and torch.is_grad_enabled()
        and x.dtype == weight.dtype == torch.float32
        and x.dim() == 4
        and _in_channels_last(x, weight)
        and not torch.compiler.is_compiling()
        and not torch._C._are_functorch_transforms_active()
        and forward_ad._current_level < 0
        and not torch.is_autocast_enabled("cpu")
        and resolve(x.device.type) == "cpu"
    ):
        return _Conv2d.apply(x, weight, bias, stride, padding)
    return functional.conv2d(x, weight, bias, stride, padding)
