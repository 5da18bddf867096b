"""Group norm and SiLU in one on the CPU, where a U-Net's activations otherwise go through memory four times.

All else is torch's.
"""

from __future__ import annotations

import torch
from torch.nn import functional

from diffgan_fast._native import LIBRARY
from diffgan_fast.backends import resolve

LIBRARY.define(
    "group_norm_silu(Tensor x, Tensor scale, Tensor bias, Tensor? shift, int groups, float eps) -> (Tensor, Tensor)"
)
LIBRARY.define(
    "group_norm_silu_grad(Tensor grad, Tensor x, Tensor scale, Tensor bias, Tensor? shift, Tensor stats, int groups)"
    " -> (Tensor, Tensor, Tensor, Tensor)"
)
_RAW = torch.ops.diffgan_fast
_EXISTS = torch._C._dispatch_has_kernel_for_dispatch_key("diffgan_fast::group_norm_silu", "CPU")


def _plain(x, scale, bias, shift, groups, eps):
    if shift is not None:
        x = x + shift[:, :, None, None]
    if scale.dim() == 1:
        return functional.silu(functional.group_norm(x, groups, scale, bias, eps))
    normed = functional.group_norm(x, groups, eps=eps)
    return functional.silu(scale[:, :, None, None] * normed + bias[:, :, None, None])


class _GroupNormSiLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, scale, bias, shift, groups, eps):
        out, stats = _RAW.group_norm_silu.default(x, scale, bias, shift, groups, eps)
        ctx.save_for_backward(x, scale, bias, shift, stats)
        ctx.groups, ctx.eps = groups, eps
        return out

    @staticmethod
    def backward(ctx, grad):
        x, scale, bias, shift, stats = ctx.saved_tensors
        if torch.is_grad_enabled():  # the gradient has one too: torch's
            wanted = [v for v, needed in zip((x, scale, bias, shift), ctx.needs_input_grad, strict=False) if needed]
            out = _plain(x, scale, bias, shift, ctx.groups, ctx.eps)
            found = iter(torch.autograd.grad(out, wanted, grad, create_graph=True))
            return *(next(found) if needed else None for needed in ctx.needs_input_grad[:4]), None, None
        grad = grad.contiguous(memory_format=torch.channels_last)
        found = list(_RAW.group_norm_silu_grad.default(grad, x, scale, bias, shift, stats, ctx.groups))
        found[3] = found[3].view(x.shape[:2]) if shift is not None else None
        return *found, None, None


def group_norm_silu(
    x: torch.Tensor,
    scale: torch.Tensor,
    bias: torch.Tensor,
    shift: torch.Tensor | None = None,
    *,
    groups: int,
    eps: float = 1e-5,
) -> torch.Tensor:
    """silu(scale · norm(x + shift) + bias): group norm (Wu and He 2018) and SiLU.

    It is ours where all are float32 and x is in channels_last on the CPU, outside of autocast, compiled code and
    functorch; results do not depend on the number of threads.

    Args:
        x: [N, C, H, W].
        scale: [C] or, for adaptive norms, [N, C].
        bias: as scale.
        shift: [N, C], added to each pixel before.
        groups: of channels; it divides C.
        eps: added to the variance.

    Returns: [N, C, H, W].
    Gradients: with respect to x, scale, bias and shift, every order.
    """
    tensors = [v for v in (x, scale, bias, shift) if v is not None]
    if (
        _EXISTS
        and all(v.dtype == torch.float32 for v in tensors)
        and x.dim() == 4
        and x.numel()
        and x.shape[1] // groups <= 64
        and x.is_contiguous(memory_format=torch.channels_last)
        and not torch.compiler.is_compiling()
        and not torch._C._are_functorch_transforms_active()
        and not torch.is_autocast_enabled("cpu")
        and resolve(x.device.type) == "cpu"
    ):
        if shift is not None:
            shift = shift.contiguous()
        return _GroupNormSiLU.apply(x, scale.contiguous(), bias.contiguous(), shift, groups, eps)
    return _plain(x, scale, bias, shift, groups, eps)
