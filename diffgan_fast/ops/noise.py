"""Forward noising: x_t from x_0, and the joint draw of two neighbours, with noise made on the fly.

    x_t = sqrt(abar_t) x_0 + sqrt(1 - abar_t) sigma eps            (Ho et al. 2020, Eq. 4; sigma: Diffusion-GAN, Eq. 3)

Raw rows are (a, s): out = a x + s sigma z.
"""

from __future__ import annotations

from typing import Literal, overload

import torch

from diffgan_fast.ops import support
from diffgan_fast.ops.dispatch import Op
from diffgan_fast.ops.random import standard_normal
from diffgan_fast.schedule import Schedule


def _add_noise_reference(x, rows, t, row, sigma, key, key_t, first, return_noise):
    a, s = support.defined_rows(rows, t, row, x)
    z = standard_normal(x, key, key_t, first)
    s = s * sigma
    wide = x.to(z.dtype)
    out = torch.where(s == 0, a * wide, a * wide + s * z).to(x.dtype)
    return out, z.to(x.dtype) if return_noise else x.new_empty(0)


def _add_noise_fake(x, rows, t, row, sigma, key, key_t, first, return_noise):
    return torch.empty_like(x), torch.empty_like(x) if return_noise else x.new_empty(0)


def _pair_reference(x, rows, t, row, key, key_t, first):
    a0, s0, a1, s1 = support.defined_rows(rows, t, row, x)
    z0, z1 = (standard_normal(x, key, key_t, first, stream) for stream in (0, 1))
    wide = x.to(z0.dtype)
    previous = torch.where(s0 == 0, a0 * wide, a0 * wide + s0 * z0)
    return previous.to(x.dtype), (a1 * previous + s1 * z1).to(x.dtype)


def _pair_fake(x, rows, t, row, key, key_t, first):
    return torch.empty_like(x), torch.empty_like(x)


_ADD_NOISE = Op(
    "noise",
    "add_noise",
    "(Tensor x, Tensor rows, Tensor? t, SymInt row, float sigma, SymInt key, Tensor? key_t, SymInt first, "
    "bool return_noise) -> (Tensor, Tensor)",
    _add_noise_reference,
    _add_noise_fake,
)
_NOISE_PAIR = Op(
    "noise",
    "noise_pair",
    "(Tensor x, Tensor rows, Tensor? t, SymInt row, SymInt key, Tensor? key_t, SymInt first) -> (Tensor, Tensor)",
    _pair_reference,
    _pair_fake,
)


class _AddNoise(torch.autograd.Function):
    """Linear in x: backward and tangent are a[t] times the incoming one, in plain torch, so every order holds.

    `constants` are the raw op's arguments after x; in one tuple, since torch looks at every argument of a Function.
    """

    @staticmethod
    def forward(x, high, constants):
        return support.call(_ADD_NOISE.on(x.device.type), constants[1], 0, high, x, *constants)

    @staticmethod
    def setup_context(ctx, inputs, output):
        support.save_rows(ctx, inputs[2])
        ctx.mark_non_differentiable(output[1])
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx, grad, _):
        return (None if grad is None else _scaled(grad, *support.saved_rows(ctx), 0)), None, None

    @staticmethod
    def tangent(ctx, tangent, *_):
        return _scaled(tangent, *support.saved_rows(ctx), 0), None


class _NoisePair(torch.autograd.Function):
    """Linear in x, as `_AddNoise`."""

    @staticmethod
    def forward(x, high, constants):
        return support.call(_NOISE_PAIR.on(x.device.type), constants[1], 1, high, x, *constants)

    @staticmethod
    def setup_context(ctx, inputs, output):
        support.save_rows(ctx, inputs[2])

    @staticmethod
    def backward(ctx, previous, current):
        return (
            _scaled(previous + _scaled(current, *support.saved_rows(ctx), 2), *support.saved_rows(ctx), 0),
            None,
            None,
        )

    @staticmethod
    def tangent(ctx, tangent, *_):
        previous = _scaled(tangent, *support.saved_rows(ctx), 0)
        return previous, _scaled(previous, *support.saved_rows(ctx), 2)


_add_noise = support.differentiable(_AddNoise)
_noise_pair = support.differentiable(_NoisePair)


def _scaled(x: torch.Tensor, rows: torch.Tensor, t: torch.Tensor | None, row: int, column: int) -> torch.Tensor:
    return (x * support.pick_rows(rows, t, row, x)[column]).to(x.dtype)


def _noise_rows(schedule: Schedule) -> torch.Tensor:
    abar = schedule.alphas_cumprod
    return torch.stack((abar.sqrt(), (1 - abar).sqrt()), 1)


def _pair_rows(schedule: Schedule) -> torch.Tensor:
    single = _noise_rows(schedule)
    rows = torch.cat((single.roll(1, 0), schedule.alphas.sqrt()[:, None], schedule.betas.sqrt()[:, None]), 1)
    rows[0] = torch.nan  # there is nothing before clean data
    return rows


@overload
def add_noise(
    x0: torch.Tensor,
    t: int | torch.Tensor,
    schedule: Schedule,
    key: int | torch.Tensor,
    *,
    sigma: float = 1.0,
    noise: torch.Tensor | None = None,
    return_noise: Literal[False] = False,
    first_sample: int = 0,
) -> torch.Tensor: ...
@overload
def add_noise(
    x0: torch.Tensor,
    t: int | torch.Tensor,
    schedule: Schedule,
    key: int | torch.Tensor,
    *,
    sigma: float = 1.0,
    noise: torch.Tensor | None = None,
    return_noise: Literal[True],
    first_sample: int = 0,
) -> tuple[torch.Tensor, torch.Tensor]: ...
def add_noise(
    x0: torch.Tensor,
    t: int | torch.Tensor,
    schedule: Schedule,
    key: int | torch.Tensor,
    *,
    sigma: float = 1.0,
    noise: torch.Tensor | None = None,
    return_noise: bool = False,
    first_sample: int = 0,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """x_t = sqrt(abar_t) x0 + sqrt(1 - abar_t) sigma eps, with eps computed in the kernel and never stored.

    Source: Ho et al. 2020, Eq. 4; `sigma` as in Diffusion-GAN (Wang et al. 2023, Eq. 3).

    Args:
        x0: [N, …] clean data, float32, float64, float16 or bfloat16; contiguous or channels_last.
        t: int, or int64 [N] (or [N, C], a level a channel) on x0's device, in 0..T. At t = 0 the result is x0, bit for
            bit.
        schedule: the noise schedule.
        key: int in [0, 2^63), or int64 with one key or one a sample. eps is `random.normal(x0.shape, key)`.
        sigma: scale of the noise alone.
        noise: [N, …] like x0; used in place of eps if given.
        return_noise: whether to return (x_t, eps).
        first_sample: number of the first sample in the global batch.

    Returns:
        x_t like x0, or (x_t, eps).

    Gradients: with respect to x0 (and `noise`), every order, forward mode too.
    Raises: ValueError for arguments of the wrong shape, type, device or range. On CUDA a t out of range gives NaN.
    """
    x0 = support.dense(x0, "x0")
    row, steps = support.t_arguments(t, x0, 0, schedule.T)
    rows = schedule.rows("noise", x0, _noise_rows)
    if noise is not None:
        noise = support.matching(x0, noise, "noise", "x0")
        if steps is not None:
            support.check_range(steps, 0, schedule.T)
        a, s = support.pick_rows(rows, steps, row, x0)
        wide = x0.to(rows.dtype)
        out = torch.where(s == 0, a * wide, a * wide + s * sigma * noise).to(x0.dtype)
        return (out, noise) if return_noise else out
    out, eps = _noised(x0, rows, row, steps, key, sigma, first_sample, return_noise)
    return (out, eps) if return_noise else out


def affine_noise(
    x: torch.Tensor,
    rows: torch.Tensor,
    t: int | torch.Tensor,
    key: int | torch.Tensor,
    *,
    sigma: float = 1.0,
    first_sample: int = 0,
) -> torch.Tensor:
    """rows[t, 0] x + rows[t, 1] sigma eps: `add_noise` with coefficients of one's own, such as those of many schedules.

    Args:
        x, key, sigma, first_sample: as for `add_noise`.
        rows: [R, 2] on x's device, float64 for float64 data, else float32. Constant for gradients.
        t: number of a row: int, or int64 [N] or [N, C], in 0..R-1. A row (1, 0) gives x back, bit for bit.

    Returns, gradients, raises: as `add_noise`.
    """
    x = support.dense(x, "x")
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    if rows.dim() != 2 or rows.shape[1] != 2 or rows.dtype != wide or rows.device != x.device:
        raise ValueError(
            f"rows must be {wide} [R, 2] on {x.device}, got {rows.dtype} {list(rows.shape)} on {rows.device}"
        )
    row, steps = support.t_arguments(t, x, 0, len(rows) - 1)
    return _noised(x, rows.contiguous(), row, steps, key, sigma, first_sample, False)[0]


def _noised(x, rows, row, steps, key, sigma, first_sample, return_noise):
    """(out, the noise if it is wanted): the arguments of the public ops, brought to the raw one."""
    first = support.first_element(first_sample, x)
    key, key_t = support.key_arguments(key, x.device, x.shape[0], first)
    args = (rows, steps, row, sigma, key, key_t, first, return_noise)
    return (_add_noise if support.needs_autograd(x) else _AddNoise.forward)(x, len(rows) - 1, args)


def noise_pair(
    x0: torch.Tensor, t: int | torch.Tensor, schedule: Schedule, key: int | torch.Tensor, *, first_sample: int = 0
) -> tuple[torch.Tensor, torch.Tensor]:
    """(x_{t-1}, x_t) drawn jointly in one launch.

    x_{t-1} ~ q(.|x0), then x_t = sqrt(alpha_t) x_{t-1} + sqrt(beta_t) eps'.

    Source: the pairs of Denoising Diffusion GAN (Xiao et al. 2022, Eq. 4). Their covariance given x0 is
    sqrt(alpha_t) (1 - abar_{t-1}).

    Args:
        x0, schedule, key, first_sample: as for `add_noise`. Stream 0 of the key makes x_{t-1}, stream 1 the increment.
        t: index of the noisier of the two, an int or int64 [N] (or [N, C]) in 1..T.

    Returns:
        (x_{t-1}, x_t), each like x0.

    Gradients: with respect to x0, every order, forward mode too.
    Raises: as `add_noise`.
    """
    x0 = support.dense(x0, "x0")
    row, steps = support.t_arguments(t, x0, 1, schedule.T)
    first = support.first_element(first_sample, x0)
    key, key_t = support.key_arguments(key, x0.device, x0.shape[0], first)
    args = (schedule.rows("pair", x0, _pair_rows), steps, row, key, key_t, first)
    return (_noise_pair if support.needs_autograd(x0) else _NoisePair.forward)(x0, schedule.T, args)
