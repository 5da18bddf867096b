"""The parts of a gradient penalty: a random point between each real and fake sample, and the norms of gradients.

    x_hat = u real + (1 - u) fake, u ~ U[0, 1) a sample;   P = mean over samples of (||g|| - center)^2

(Gulrajani et al. 2017, Algorithm 1 and Eq. 3). The gradient of P is (2 / N) (1 - center / ||g||) g, and 0 at g = 0.
"""

from __future__ import annotations

import math

import torch

from diffgan_fast import _philox
from diffgan_fast.ops import support
from diffgan_fast.ops.dispatch import Op
from diffgan_fast.ops.random import Draw, fill_


def _wide(x: torch.Tensor) -> torch.dtype:
    """The type of the arithmetic on x."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _by_sample(v: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """[N] in a shape that broadcasts against x."""
    return v.reshape(x.shape[0], *[1] * (x.dim() - 1))


def _mixed(u: torch.Tensor, real: torch.Tensor, fake: torch.Tensor) -> torch.Tensor:
    return (u * real + (1 - u) * fake).to(real.dtype)


def _interpolate_reference(real, fake, key, key_t, first_sample):
    u = _philox.uniforms(real.shape[0], key, key_t, 0, first_sample, real.device)
    return _mixed(_by_sample(u.to(_wide(real)), real), real, fake)


def _squares(g: torch.Tensor) -> torch.Tensor:
    """The sum of squares of each sample, [N]."""
    return g.unsqueeze(1).flatten(1).square().sum(1)


def _norm_reference(g, center):
    squares = _squares(g.double())
    norms = squares.sqrt()
    mean = squares.mean() if center == 0 else (norms - center).square().mean()
    return mean.to(_wide(g)), norms.to(_wide(g))


def _norm_grad_reference(g, norms, scale, center):
    ratio = torch.ones_like(norms)
    if center != 0:
        zero = norms == 0
        ratio = ((norms - center) / norms.masked_fill(zero, 1)).masked_fill(zero, 0)
    return (_by_sample(scale * (2 / max(g.shape[0], 1)) * ratio, g) * g).to(g.dtype)


def _differentiable_grad(g: torch.Tensor, scale: torch.Tensor, center: float) -> torch.Tensor:
    """The gradient of P times `scale`, in the type of the arithmetic, as a function of g: no NaN at g = 0."""
    g = g.to(_wide(g))
    squares = _squares(g)
    zero = squares == 0
    norms = squares.masked_fill(zero, 1).sqrt().masked_fill(zero, 0)
    return _norm_grad_reference(g, norms, scale, center)


_INTERPOLATE = Op(
    "penalty",
    "interpolate",
    "(Tensor real, Tensor fake, SymInt key, Tensor? key_t, SymInt first_sample) -> Tensor",
    _interpolate_reference,
    lambda real, *_: torch.empty_like(real),
)
_GRADIENT_NORM = Op(
    "penalty",
    "gradient_norm",
    "(Tensor g, float center) -> (Tensor, Tensor)",
    _norm_reference,
    lambda g, center: (g.new_empty((), dtype=_wide(g)), g.new_empty(g.shape[:1], dtype=_wide(g))),
)
_GRADIENT_NORM_GRAD = Op(
    "penalty",
    "gradient_norm_grad",
    "(Tensor g, Tensor norms, Tensor scale, float center) -> Tensor",
    _norm_grad_reference,
    lambda g, *_: torch.empty_like(g),
)


class _Interpolate(torch.autograd.Function):
    """Linear in both inputs: backward and tangent draw u again and are plain torch, so every order holds.

    `constants`: key, key_t and first_sample.
    """

    @staticmethod
    def forward(real, fake, constants):
        return _INTERPOLATE.on(real.device.type)(real, fake, *constants)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.key, key_t, ctx.first_sample = inputs[2]
        ctx.save_for_backward(key_t)
        ctx.save_for_forward(key_t)

    @staticmethod
    def _uniforms(ctx, like):
        u = torch.empty(like.shape[0], dtype=_wide(like), device=like.device)
        return _by_sample(fill_(u, Draw.UNIFORM, ctx.key, *ctx.saved_tensors, 0, ctx.first_sample, 0), like)

    @staticmethod
    def backward(ctx, grad):
        u = _Interpolate._uniforms(ctx, grad)
        return tuple(
            (grad * factor).to(grad.dtype) if needed else None
            for needed, factor in zip(ctx.needs_input_grad[:2], (u, 1 - u), strict=True)
        ) + (None,)

    @staticmethod
    def tangent(ctx, real, fake, _):
        return _mixed(_Interpolate._uniforms(ctx, real), real, fake)


class _NormPenalty(torch.autograd.Function):
    """(P, the norms, which backward reads and nobody differentiates)."""

    @staticmethod
    def forward(g, center):
        return _GRADIENT_NORM.on(g.device.type)(g, center)

    @staticmethod
    def setup_context(ctx, inputs, output):
        g, ctx.center = inputs
        ctx.mark_non_differentiable(output[1])
        ctx.save_for_backward(g, output[1])
        ctx.save_for_forward(g)

    @staticmethod
    def backward(ctx, grad, _):
        g, norms = ctx.saved_tensors
        if torch.is_grad_enabled():  # create_graph
            return _differentiable_grad(g, grad, ctx.center).to(g.dtype), None
        return _GRADIENT_NORM_GRAD.on(g.device.type)(g, norms, grad, ctx.center), None

    @staticmethod
    def tangent(ctx, g_t, _):
        g = ctx.saved_tensors[0]
        one = torch.ones((), dtype=_wide(g), device=g.device)
        return (_differentiable_grad(g, one, ctx.center) * g_t).sum(), None


_interpolate = support.differentiable(_Interpolate)
_norm_penalty = support.differentiable(_NormPenalty)


def interpolate(
    real: torch.Tensor, fake: torch.Tensor, key: int | torch.Tensor, *, first_sample: int = 0
) -> torch.Tensor:
    """u real + (1 - u) fake, with one uniform number u a sample: where the WGAN penalty looks at the critic.

    Source: Gulrajani et al. 2017, Algorithm 1.

    Args:
        real: [N, …], float32, float64, float16 or bfloat16; contiguous or channels_last.
        fake: like real.
        key: int in [0, 2^63), or int64 with one key or one a sample. u is `random.uniform(N, key)`, in [0, 1).
        first_sample: number of the first sample in the global batch.

    Returns: like real; where u = 0, fake exactly.
    Gradients: with respect to real and fake, every order, forward mode too.
    Raises: ValueError for arguments of the wrong shape, type, device or range.
    """
    real = support.dense(real, "real")
    fake = support.matching(real, fake, "fake", "real")
    support.first_element(first_sample, real)  # raises where first_sample is no sample's number
    constants = (*support.key_arguments(key, real.device, real.shape[0], first_sample), first_sample)
    return (_interpolate if support.needs_autograd(real, fake) else _Interpolate.forward)(real, fake, constants)


def norm_penalty(g: torch.Tensor, center: float = 1.0) -> torch.Tensor:
    """Mean over samples of (||g|| - center)^2, with ||g|| the Euclidean norm over all elements of a sample.

    Source: Gulrajani et al. 2017, Eq. 3 (center 1); center 0 gives E||g||^2, as in R1 (Mescheder et al. 2018). Of
    g = torch.autograd.grad(critic(x).sum(), x, create_graph=True)[0] it is the gradient penalty.

    Args:
        g: [N, …], float32, float64, float16 or bfloat16; contiguous or channels_last.
        center: a finite number >= 0.

    Returns: a scalar, float32 (float64 for float64), summed in double precision (float32 within a tile on a GPU) and in
    a fixed order.
    Gradients: with respect to g, every order, forward mode too; a sample with g = 0 gets 0.
    Raises: ValueError for arguments of the wrong shape, type or range.
    """
    g = support.dense(g, "g")
    if isinstance(center, bool) or not isinstance(center, int | float) or not 0 <= center < math.inf:
        raise ValueError(f"center must be a finite number >= 0, got {center!r}")
    return (_norm_penalty if support.needs_autograd(g) else _NormPenalty.forward)(g, float(center))[0]
