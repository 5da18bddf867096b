"""The parts of a gradient penalty: a random point between each real and fake sample, and the norms of gradients.

    x_hat = u real + (1 - u) fake, u ~ U[0, 1) a sample;   P = mean over samples of (||g|| - center)^2

(Gulrajani et al. 2017, Algorithm 1 and Eq. 3). The gradient of P is (2 / N) (1 - center / ||g||) g, and 0 at g = 0.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import nullcontext
from typing import Literal, get_args

import torch
from torch.autograd import forward_ad
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.dropout import _DropoutNd
from torch.nn.modules.instancenorm import _InstanceNorm
from torch.utils._python_dispatch import TorchDispatchMode

from diffgan_fast import _philox
from diffgan_fast.ops import closed, support
from diffgan_fast.ops.dispatch import Op
from diffgan_fast.ops.random import Draw, fill_

Mode = Literal["auto", "double", "closed", "forward"]


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
    squares = _squares(g.double())  # those of a float32 can be too large or too small for one
    zero = squares == 0
    norms = squares.masked_fill(zero, 1).sqrt().masked_fill(zero, 0).to(g.dtype)
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


def _check_center(center: float) -> None:
    if isinstance(center, bool) or not isinstance(center, int | float) or not 0 <= center < math.inf:
        raise ValueError(f"center must be a finite number >= 0, got {center!r}")


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
    _check_center(center)
    return (_norm_penalty if support.needs_autograd(g) else _NormPenalty.forward)(g, float(center))[0]


def gradient_penalty(
    critic: Callable[..., torch.Tensor],
    real: torch.Tensor,
    fake: torch.Tensor,
    key: int | torch.Tensor,
    *,
    center: float = 1.0,
    mode: Mode = "auto",
    first_sample: int = 0,
    **cond,
) -> torch.Tensor:
    """E (|grad_x D(x)| - center)^2 at x = u real + (1 - u) fake, one u ~ U[0, 1) a sample.

    Source: Gulrajani et al. 2017, Algorithm 1 (center 1); Thanh-Tung et al. 2019 (center 0).

    Args:
        critic: `critic(x, **cond) -> logits` [N] or [N, K]; of several logits the gradient of their sum counts.
        real, fake: [N, …], two batches; constants for gradients.
        key, first_sample: as for `interpolate`.
        center: the norm that costs nothing, at least 0.
        mode: how the gradient of the gradient is found. All modes that take a critic give the same numbers.
            "double": autograd twice; any critic that has a double backward. Every order.
            "closed": four passes and no graph (see ops/closed.py), for an `nn.Sequential` of Linear, Conv2d, ReLU,
            LeakyReLU, Flatten and BatchNorm2d in eval mode, or a critic that has one as `main` with
            `main(join(x, **cond))`, x in the first channels. First order.
            "forward": one backward, one forward-mode pass, one backward; for layers without a double backward. First
            order. It does not take layers whose forward-mode rule is wrong (layer norm, and batch or instance norm
            that measures its input) nor spectral norm in training.
            "auto": closed where it applies, else double; double inside `torch.compile`.
        cond: what else the critic takes; constants for gradients.

    Returns: a scalar of at least float32. Autocast does not reach into it: the critic runs in its weights' type.
    Gradients: with respect to the critic's parameters.
    Raises: ValueError for a critic that a mode does not take, with the layer's name, and for batch norm in training
        mode, under which a sample has no gradient of its own.
    """
    real, fake = _constant(real), _constant(fake)
    return _penalty(critic, interpolate(real, fake, key, first_sample=first_sample), center, mode, cond)


def r1_penalty(critic: Callable[..., torch.Tensor], real: torch.Tensor, *, mode: Mode = "auto", **cond) -> torch.Tensor:
    """E |grad_x D(x)|^2 at real data; the caller multiplies by gamma / 2.

    Source: Mescheder et al. 2018, Eq. 9. Arguments, gradients and errors as for `gradient_penalty`.
    """
    return _penalty(critic, _constant(real), 0.0, mode, cond)


def _constant(v):
    """What the critic is given, without a graph; what autocast made of half the bits as float32 again."""
    if not isinstance(v, torch.Tensor):
        return v
    half = v.dtype in (torch.bfloat16, torch.float16) and torch.is_autocast_enabled(v.device.type)
    return v.detach().float() if half else v.detach()


def _penalty(critic, x, center, mode, cond):
    if mode not in get_args(Mode):
        raise ValueError(f"mode must be one of {', '.join(get_args(Mode))}; got {mode!r}")
    _check_center(center)
    critic = getattr(critic, "_orig_mod", critic)  # of one that torch.compile has wrapped
    _refuse(critic, mode)
    cond = {name: _constant(v) for name, v in cond.items()}
    compiling = torch.compiler.is_compiling()
    # compiled code has no double backward: a critic that is compiled in place runs as it was
    eager = nullcontext() if compiling else torch.compiler.set_stance("force_eager")
    with eager, torch.autocast(x.device.type, enabled=False):
        if mode == "closed" or (mode == "auto" and not compiling):
            net, reason = in_closed_form(critic, mode, cond)
            if net is not None:
                joined, derivative = x if net is critic else critic.join(x, **cond), _value_and_derivative
                return closed.closed_penalty(net, joined, x.shape[1], center, lambda g: derivative(g, center))
            if mode == "closed":
                raise ValueError(f"mode 'closed' does not take this critic: {reason}")
        return _forward(critic, x, center, cond) if mode == "forward" else _double(critic, x, center, cond)


def _value_and_derivative(g: torch.Tensor, center: float) -> tuple[torch.Tensor, torch.Tensor]:
    """P and dP/dg, without a graph."""
    g = support.dense(g, "g")
    value, norms = _GRADIENT_NORM.on(g.device.type)(g, center)
    return value, _GRADIENT_NORM_GRAD.on(g.device.type)(g, norms, torch.ones_like(value), center)


def in_closed_form(critic, mode, cond) -> tuple[torch.nn.Sequential | None, str | None]:
    """The network that a critic's logits come from, or None and why the closed form does not apply.

    A critic with `main` and `join` must say that its logits are main(join(x, …)): its `forward` carries the mark of
    `nets.Critic`, which one that overrides it does not. Mode "closed" takes the caller's word for it.
    """
    net = getattr(critic, "main", critic)
    reason = closed.reason_against(net)
    if reason is None and net is critic and cond:
        reason = f"an nn.Sequential takes no {', '.join(cond)}"
    if reason is None and net is not critic:
        if not hasattr(critic, "join"):
            reason = f"{type(critic).__name__} has a `main`, but no `join` that says what it sees"
        elif closed.has_hooks(critic):
            reason = f"{type(critic).__name__} has hooks"
        elif mode == "auto" and not getattr(type(critic).forward, "is_main_of_join", False):
            reason = f"{type(critic).__name__} has a forward of its own"
    return (net, None) if reason is None else (None, reason)


def _refuse(critic, mode) -> None:
    for name, layer in critic.named_modules() if isinstance(critic, torch.nn.Module) else ():
        measures = layer.training or getattr(layer, "running_var", 0) is None  # its input, not fixed statistics
        what = f"layer {name!r} ({type(layer).__name__})"
        if isinstance(layer, _BatchNorm) and measures:
            raise ValueError(f"critic: {what} normalises by the batch, so no sample has a gradient of its own")
        if mode != "forward":
            continue
        inexact = (torch.nn.LayerNorm, torch.nn.GroupNorm, *([_InstanceNorm] if measures else []))
        if isinstance(layer, inexact):
            raise ValueError(f"mode 'forward': torch's forward-mode rule of {what} is not exact")
        if layer.training and isinstance(layer, _DropoutNd):
            raise ValueError(f"mode 'forward': {what} draws another mask in every call; put it in eval mode")
        if support.estimates_spectrum(layer):
            raise ValueError(f"mode 'forward': {what} changes its estimate in every call; put it in eval mode")


def _double(critic, x, center, cond):
    with torch.enable_grad(), sdpa_kernel(SDPBackend.MATH):  # the other attention kernels have no double backward
        if torch.compiler.is_compiling():
            g = torch.func.grad(lambda x: critic(x, **cond).sum())(x)
        else:
            x.requires_grad_()
            (g,) = torch.autograd.grad(critic(x, **cond).sum(), x, create_graph=True)
    return norm_penalty(g, center)


class _RefuseInexact(TorchDispatchMode):
    """Stops at functional calls whose forward-mode rule is not exact, or that draw a mask."""

    _NEVER = ("native_layer_norm", "native_group_norm", "native_dropout", "bernoulli", "bernoulli_")

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func._schema.name.removeprefix("aten::")
        bound = dict(zip((a.name for a in func._schema.arguments), args, strict=False)) | (kwargs or {})
        if name in self._NEVER or ("batch_norm" in name and (bound.get("training") or bound.get("use_input_stats"))):
            raise ValueError(f"mode 'forward' does not take this critic: it calls {name}, whose rule is not exact")
        return func(*args, **(kwargs or {}))


class _FirstOrder(torch.autograd.Function):
    """A value, with the gradient of something else."""

    @staticmethod
    def forward(ctx, along, value):
        ctx.dtype = along.dtype
        return value.clone()

    @staticmethod
    def backward(ctx, grad):
        closed.check_first_order("forward")
        return grad.to(ctx.dtype), None


def _forward(critic, x, center, cond):
    with torch.enable_grad():
        x = x.detach().requires_grad_()
        (g,) = torch.autograd.grad(critic(x, **cond).sum(), x)
        value, v = _value_and_derivative(g, center)
        with forward_ad.dual_level(), _RefuseInexact():
            tangent = forward_ad.unpack_dual(critic(forward_ad.make_dual(x.detach(), v), **cond)).tangent
        # <v, g> has the penalty's gradient, for v constant
        return _FirstOrder.apply(tangent.sum(), value)
