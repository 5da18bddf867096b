"""Reverse steps: DDPM, DDIM and the DDGAN posterior, with guidance and clamping, as one op.

All are, per sample, an affine map of x_t and the network's output plus noise. In this order:

    e'  = e_uncond + guidance_scale (e - e_uncond) + logit_scale G_t logit_grad
    out = A_t x + B_t e' + s_t z                                   without clamping
    x0  = clamp(px_t x + pe_t e', -1, 1); out = c0_t x0 + cx_t x + s_t z    with it

Raw rows are (A, B, s, G, px, pe, c0, cx), with A = c0 px + cx and B = c0 pe multiplied out in float64. In G is the
critic guidance of Kim et al. (2023), eps' = eps - sqrt(1 - abar_t) grad, put in terms of whatever the network predicts.
"""

from __future__ import annotations

from typing import Literal

import torch

from diffgan_fast.ops import support
from diffgan_fast.ops.dispatch import Op
from diffgan_fast.ops.random import standard_normal
from diffgan_fast.schedule import Prediction, Schedule, check_prediction

Variance = Literal["posterior", "beta"]


def _guided(e, e_uncond, logit_grad, guide, guidance_scale, logit_scale):
    if e_uncond is not None:
        e = e_uncond + guidance_scale * (e - e_uncond)
    return e if logit_grad is None else e + logit_scale * guide * logit_grad


def _reference(
    x, e, e_uncond, logit_grad, rows, t, row, guidance_scale, logit_scale, clip, key, key_t, first
) -> torch.Tensor:
    a, b, s, guide, px, pe, c0, cx = support.defined_rows(rows, t, row, x)
    z = standard_normal(x, key, key_t, first)
    wide, e = x.to(z.dtype), e.to(z.dtype)
    e_uncond, logit_grad = (None if v is None else v.to(z.dtype) for v in (e_uncond, logit_grad))
    guided = _guided(e, e_uncond, logit_grad, guide, guidance_scale, logit_scale)
    out = c0 * (px * wide + pe * guided).clamp(-1, 1) + cx * wide if clip else a * wide + b * guided
    return torch.where(s == 0, out, out + s * z).to(x.dtype)


def _fake(x, *_):
    return torch.empty_like(x)


_STEP = Op(
    "step",
    "step",
    "(Tensor x, Tensor e, Tensor? e_uncond, Tensor? logit_grad, Tensor rows, Tensor? t, SymInt row, "
    "float guidance_scale, float logit_scale, bool clip, SymInt key, Tensor? key_t, SymInt first) -> Tensor",
    _reference,
    _fake,
)


class _Step(torch.autograd.Function):
    """Linear in its four tensors, piecewise so with clamping: gradients are plain torch, and every order holds."""

    @staticmethod
    def forward(x, e, e_uncond, logit_grad, high, constants):
        run = _STEP.on(x.device.type)
        return support.call(run, constants[1], 1, high, x, e, e_uncond, logit_grad, *constants)

    @staticmethod
    def setup_context(ctx, inputs, output):
        *tensors, _, constants = inputs
        ctx.guidance, ctx.logit_scale, ctx.clip = constants[3:6]
        ctx.uncond = tensors[2] is not None
        support.save_rows(ctx, constants, *tensors if ctx.clip else ())

    @staticmethod
    def _partials(ctx, like):
        """d out / d x and d out / d e' (numbers or per-element tensors), and d e' / d logit_grad."""
        a, b, _, guide, px, pe, c0, cx = support.pick_rows(*support.saved_rows(ctx), like)
        if not ctx.clip:
            return a, b, guide * ctx.logit_scale
        x, e, e_uncond, logit_grad = ctx.saved_tensors[2:]
        inside = px * x + pe * _guided(e, e_uncond, logit_grad, guide, ctx.guidance, ctx.logit_scale)
        open_ = c0 * ((inside >= -1) & (inside <= 1))
        return cx + px * open_, pe * open_, guide * ctx.logit_scale

    @staticmethod
    def backward(ctx, grad):
        by_x, by_e, guide = _Step._partials(ctx, grad)
        needs = ctx.needs_input_grad
        grads = [None] * 4
        if needs[0]:
            grads[0] = (grad * by_x).to(grad.dtype)
        if any(needs[1:4]):
            through = grad * by_e
            grads[1] = (through * ctx.guidance if ctx.uncond else through).to(grad.dtype) if needs[1] else None
            grads[2] = (through * (1 - ctx.guidance)).to(grad.dtype) if needs[2] else None
            grads[3] = (through * guide).to(grad.dtype) if needs[3] else None
        return (*grads, None, None)

    @staticmethod
    def tangent(ctx, x_t, e_t, uncond_t, grad_t, *_):
        like = next(v for v in (x_t, e_t, uncond_t, grad_t) if v is not None)
        by_x, by_e, guide = _Step._partials(ctx, like)
        scale = ctx.guidance if ctx.uncond else 1.0
        parts = [(x_t, by_x), (e_t, by_e * scale), (uncond_t, by_e * (1 - ctx.guidance)), (grad_t, by_e * guide)]
        out = sum(tangent * factor for tangent, factor in parts if tangent is not None)
        return out.to(like.dtype)


_step = support.differentiable(_Step)


def _step_rows(abar, c0, cx, s, prediction: Prediction) -> torch.Tensor:
    """Rows [n, 8] in float64 from abar_t, the coefficients of x0 and x_t, and the noise scale, each [n]."""
    root, rest = abar.sqrt(), (1 - abar).sqrt()
    if prediction == "eps":
        px, pe, guide = 1 / root, -rest / root, -rest
    elif prediction == "x0":
        px, pe, guide = torch.zeros_like(root), torch.ones_like(root), (1 - abar) / root
    else:
        px, pe, guide = root, -rest, -rest / root
    return torch.stack((c0 * px + cx, c0 * pe, s, guide, px, pe, c0, cx), -1)


def _ddpm_rows(schedule: Schedule, variance: Variance, prediction: Prediction) -> torch.Tensor:
    var = (schedule.posterior_variance if variance == "posterior" else schedule.betas).clone()
    var[:2] = 0  # the last step adds no noise
    c0, cx = schedule.posterior_mean_coef1, schedule.posterior_mean_coef2
    rows = _step_rows(schedule.alphas_cumprod, c0, cx, var.sqrt(), prediction)
    rows[0] = torch.nan  # no step starts at clean data
    return rows


def _ddim_rows(abar: torch.Tensor, previous: torch.Tensor, eta: float, prediction: Prediction) -> torch.Tensor:
    """Rows of steps from levels abar to levels previous (Song et al. 2021, Eqs. 12 and 16)."""
    var = eta**2 * (1 - previous) / (1 - abar) * (1 - abar / previous)
    direction = ((1 - previous - var).clamp_min(0) / (1 - abar)).sqrt()
    return _step_rows(abar, previous.sqrt() - direction * abar.sqrt(), direction, var.sqrt(), prediction)


def _run(x, e, eps_uncond, logit_grad, rows, steps, row, high, guidance_scale, logit_scale, clip, key, first_sample):
    if eps_uncond is None and guidance_scale != 1.0:
        raise ValueError(f"guidance_scale={guidance_scale} needs eps_uncond, the prediction without the condition")
    if logit_grad is None and logit_scale != 1.0:
        raise ValueError(f"logit_scale={logit_scale} needs logit_grad, the gradient of the critic's logit at x")
    e = support.matching(x, e, "the prediction")
    eps_uncond = support.matching(x, eps_uncond, "eps_uncond")
    logit_grad = support.matching(x, logit_grad, "logit_grad")
    first = support.first_element(first_sample, x)
    key, key_t = support.key_arguments(key, x.device, x.shape[0], first)
    tensors = (x, e, eps_uncond, logit_grad)
    constants = (rows, steps, row, guidance_scale, logit_scale, clip, key, key_t, first)
    return (_step if support.needs_autograd(*tensors) else _Step.forward)(*tensors, high, constants)


def ddpm_step(
    x: torch.Tensor,
    eps_hat: torch.Tensor,
    t: int | torch.Tensor,
    schedule: Schedule,
    key: int | torch.Tensor,
    *,
    variance: Variance = "posterior",
    prediction: Prediction = "eps",
    clip_x0: bool = False,
    eps_uncond: torch.Tensor | None = None,
    guidance_scale: float = 1.0,
    logit_grad: torch.Tensor | None = None,
    logit_scale: float = 1.0,
    first_sample: int = 0,
) -> torch.Tensor:
    """x_{t-1} from x_t and the network's output, one ancestral step (Ho et al. 2020, Algorithm 2).

    Args:
        x: [N, …], x_t.
        eps_hat: like x, what the network predicts (see `prediction`).
        t: int, or int64 [N] (or [N, C]) on x's device, in 1..T. At t = 1 no noise is added.
        key: int in [0, 2^63), or int64 with one key or one a sample; the noise is `random.normal(x.shape, key)`.
        variance: "posterior", beta_t (1 - abar_{t-1}) / (1 - abar_t), or "beta", beta_t.
        prediction: "eps", "x0" or "v".
        clip_x0: clamp the reconstruction of x0 to [-1, 1] first.
        eps_uncond, guidance_scale: classifier-free guidance, e_u + s (e - e_u) (Ho and Salimans 2022); s = 1 is none.
        logit_grad, logit_scale: critic guidance, eps - w sqrt(1 - abar_t) grad_x logit (Kim et al. 2023), after it.
        first_sample: number of the first sample in the global batch.

    Returns: x_{t-1}, like x.
    Gradients: with respect to x, eps_hat, eps_uncond and logit_grad, every order, forward mode too (with clip_x0: of
    the piecewise linear map).
    Raises: ValueError for arguments of the wrong shape, type, device or range. On CUDA a t out of range gives NaN.
    """
    if variance not in ("posterior", "beta"):
        raise ValueError(f"variance must be 'posterior' or 'beta', got {variance!r}")
    check_prediction(prediction)
    x = support.dense(x, "x")
    row, steps = support.t_arguments(t, x, 1, schedule.T)
    rows = schedule.rows(("ddpm", variance, prediction), x, _ddpm_rows, variance, prediction)
    return _run(
        x,
        eps_hat,
        eps_uncond,
        logit_grad,
        rows,
        steps,
        row,
        schedule.T,
        guidance_scale,
        logit_scale,
        clip_x0,
        key,
        first_sample,
    )


def ddim_step(
    x: torch.Tensor,
    eps_hat: torch.Tensor,
    t: int | torch.Tensor,
    t_prev: int | torch.Tensor,
    schedule: Schedule,
    key: int | torch.Tensor,
    *,
    eta: float = 0.0,
    prediction: Prediction = "eps",
    clip_x0: bool = False,
    eps_uncond: torch.Tensor | None = None,
    guidance_scale: float = 1.0,
    logit_grad: torch.Tensor | None = None,
    logit_scale: float = 1.0,
    first_sample: int = 0,
) -> torch.Tensor:
    """x at step t_prev from x at step t, by DDIM (Song et al. 2021, Eq. 12). Any pair 0 <= t_prev < t <= T.

    eta scales the noise: 0 is deterministic, 1 with t_prev = t - 1 is `ddpm_step(variance="posterior")`. With clip_x0
    the noise direction is recomputed from the clamped x0. `t` and `t_prev` are both ints or both int64 [N]. The rest is
    as for `ddpm_step`.
    """
    check_prediction(prediction)
    if not 0 <= eta <= 1:
        raise ValueError(f"eta must be in [0, 1], got {eta!r}")
    x = support.dense(x, "x")
    row, steps = support.t_arguments(t, x, 1, schedule.T)
    row_prev, steps_prev = support.t_arguments(t_prev, x, 0, schedule.T - 1, "t_prev")
    if (steps is None) != (steps_prev is None):
        raise ValueError("t and t_prev must both be ints or both be tensors")
    if steps is None or steps_prev is None:
        if row_prev >= row:
            raise ValueError(f"t_prev must be below t = {row}, got {row_prev}")

        def one(s: Schedule) -> torch.Tensor:
            return _ddim_rows(s.alphas_cumprod[row, None], s.alphas_cumprod[row_prev, None], eta, prediction)

        rows = schedule.rows(("ddim", row, row_prev, eta, prediction), x, one)
        which = 0
    else:
        support.check_range(steps, 1, schedule.T)
        support.check_range(steps_prev, 0, schedule.T - 1, "t_prev")
        support.check_range(steps - steps_prev, 1, schedule.T, "t - t_prev")
        abar = schedule.on(x.device)
        rows = _ddim_rows(support.take(abar, steps), support.take(abar, steps_prev), eta, prediction)
        rows = rows.masked_fill((steps_prev >= steps).reshape(-1, 1), torch.nan)
        rows, which = rows.to(torch.float64 if x.dtype == torch.float64 else torch.float32).contiguous(), -1
    return _run(
        x,
        eps_hat,
        eps_uncond,
        logit_grad,
        rows,
        None,
        which,
        schedule.T,
        guidance_scale,
        logit_scale,
        clip_x0,
        key,
        first_sample,
    )


def posterior_step(
    x0_hat: torch.Tensor,
    x: torch.Tensor,
    t: int | torch.Tensor,
    schedule: Schedule,
    key: int | torch.Tensor,
    *,
    first_sample: int = 0,
) -> torch.Tensor:
    """x_{t-1} ~ q(x_{t-1} | x_t = x, x_0 = x0_hat), the sampling step of Denoising Diffusion GAN.

    Source: Xiao et al. 2022, Eq. 6.

    Args: as `ddpm_step`; t in 1..T is the noisier index. At t = 1 the result is x0_hat.
    Gradients: with respect to x0_hat and x, every order, forward mode too.
    """
    return ddpm_step(x, x0_hat, t, schedule, key, prediction="x0", first_sample=first_sample)
