"""Batch norm by the whole batch, where each of several processes has a part of it."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.modules.batchnorm import _BatchNorm

from diffgan_fast.engine import distributed


class _Gather(torch.autograd.Function):
    """A tensor of every process, [processes, …], in all of them. First order.

    The gradient is that of the sum of all processes' losses. As gradients of parameters are averaged afterwards, theirs
    is that of the mean of the losses.
    """

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        parts = [torch.empty_like(x) for _ in range(distributed.size())]
        with distributed.exchanging():
            dist.all_gather(parts, x)
        return torch.stack(parts)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> Tensor:
        return distributed.mean(grad.clone(memory_format=torch.contiguous_format))[distributed.rank()] * len(grad)


class _Shared(_BatchNorm):
    """`forward` of a batch norm that measures the parts of all processes, which are of one size.

    Running statistics are those of one process with the whole batch. In eval mode nothing is exchanged.
    """

    @torch.compiler.disable
    def forward(self, x: Tensor) -> Tensor:
        if not self.training and self.running_var is not None:
            return super().forward(x)
        self._check_input_dim(x)
        dims, each = [0, *range(2, x.dim())], [1, -1] + [1] * (x.dim() - 2)
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        means, variances = _Gather.apply(torch.stack(torch.var_mean(wide, dims, correction=0)[::-1])).unbind(1)
        mean, var = means.mean(0), variances.mean(0) + means.var(0, correction=0)
        if self.training and self.running_var is not None:
            count = distributed.size() * x.numel() / x.shape[1]
            self._follow(mean.detach(), var.detach() * (count / (count - 1)))
        y = (wide - mean.view(each)) * (var + self.eps).rsqrt().view(each)
        if self.weight is not None:
            y = y * self.weight.view(each)
        if self.bias is not None:
            y = y + self.bias.view(each)
        return y.to(x.dtype)

    @torch.no_grad()
    def _follow(self, mean: Tensor, var: Tensor) -> None:
        seen, running_mean, running_var = self.num_batches_tracked, self.running_mean, self.running_var
        assert seen is not None and running_mean is not None and running_var is not None  # all are, or none
        seen.add_(1)
        weight = seen.reciprocal() if self.momentum is None else self.momentum
        for running, new in ((running_mean, mean), (running_var, var)):
            running.add_(weight * (new.to(running.dtype) - running))


def share(net: nn.Module) -> None:
    """Makes every batch norm of a network measure the whole batch. The network's modules and names stay.

    Raises: ValueError for a layer with a `forward` of its own, as torch's SyncBatchNorm has.
    """
    for name, layer in net.named_modules():
        if isinstance(layer, _BatchNorm):
            kind = type(layer)
            if kind.forward is not _BatchNorm.forward:
                what = f"layer {name!r} must be one of torch's plain batch norms, which several processes share"
                raise ValueError(f"{what}; got {kind.__name__}")
            layer.__class__ = type(f"Shared{kind.__name__}", (_Shared, kind), {})


def unshare(net: nn.Module) -> None:
    """Undoes `share`."""
    for layer in net.modules():
        if isinstance(layer, _Shared):
            layer.__class__ = type(layer).__bases__[1]
