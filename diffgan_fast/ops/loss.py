"""The noise-prediction loss, against noise that is made again from its key and never read from memory.

    residual r = x + b_t y + s_t z;   loss = mean of w r^2;   gradient = 2 w r / numel

x is the network's output; (b, s) = (0, -1) for eps, (-1, 0) for x0 and (sqrt(1 - abar), -sqrt(abar)) for v, with
y = x0. Raw rows are (w, b, s).
"""

from __future__ import annotations

import torch

from diffgan_fast.ops import support
from diffgan_fast.ops.dispatch import Op
from diffgan_fast.ops.random import standard_normal
from diffgan_fast.schedule import Prediction, RowCache, Schedule, check_prediction


def _parts(x, y, rows, t, row, key, key_t, first):
    w, b, s = support.defined_rows(rows, t, row, x)
    z = standard_normal(x, key, key_t, first)
    r = x.to(z.dtype) + s * z
    return w, r if y is None else r + b * y.to(z.dtype)


def _residual_reference(x, y, rows, t, row, scale, key, key_t, first):
    w, r = _parts(x, y, rows, t, row, key, key_t, first)
    return (scale * w * r).to(x.dtype)


def _mean_reference(x, y, rows, t, row, keep, key, key_t, first):
    w, r = _parts(x, y, rows, t, row, key, key_t, first)
    mean = (w.double() * r.double().square()).mean().to(rows.dtype)
    return mean, (w * r).to(x.dtype) if keep else x.new_empty(0)


_ARGUMENTS = "Tensor x, Tensor? y, Tensor rows, Tensor? t, SymInt row, "
_NOISE = "SymInt key, Tensor? key_t, SymInt first"
_RESIDUAL = Op(
    "loss",
    "residual",
    f"({_ARGUMENTS}Tensor scale, {_NOISE}) -> Tensor",
    _residual_reference,
    lambda x, *_: torch.empty_like(x),
)
_RESIDUAL_MEAN = Op(
    "loss",
    "residual_mean",
    f"({_ARGUMENTS}bool keep, {_NOISE}) -> (Tensor, Tensor)",
    _mean_reference,
    lambda x, y, rows, t, row, keep, *_: (rows.new_empty(()), torch.empty_like(x) if keep else x.new_empty(0)),
)


class _Residual(torch.autograd.Function):
    """w r, linear in x: the backward is plain torch. `constants`: rows, t, row, then key, key_t and first."""

    @staticmethod
    def forward(x, y, constants):
        rows, t, row, *noise = constants
        return _RESIDUAL.on(x.device.type)(x, y, rows, t, row, rows.new_ones(()), *noise)

    @staticmethod
    def setup_context(ctx, inputs, output):
        support.save_rows(ctx, inputs[2])

    @staticmethod
    def backward(ctx, grad):
        return (grad * support.pick_rows(*support.saved_rows(ctx), grad)[0]).to(grad.dtype), None, None


class _Loss(torch.autograd.Function):
    """(the mean of w r^2, w r or an empty tensor), with `constants` as above.

    On the CPU the backward reads the w r that the forward kept: there noise costs more than memory (in half precision
    it does not, since a plain product with 2 / numel would underflow). Elsewhere it makes the noise again.
    """

    @staticmethod
    def forward(x, y, high, constants):
        keep = x.device.type == "cpu" and x.dtype.itemsize >= 4
        return _mean(x, y, high, constants, keep)

    @staticmethod
    def setup_context(ctx, inputs, output):
        x, y, _, (_, _, _, ctx.key, key_t, ctx.first) = inputs
        ctx.mark_non_differentiable(output[1])
        support.save_rows(ctx, inputs[3], x, y, key_t, output[1])

    @staticmethod
    def backward(ctx, grad, _):
        rows, t, x, y, key_t, kept = ctx.saved_tensors
        noise = (ctx.key, key_t, ctx.first)
        scale = grad * (2 / max(x.numel(), 1))
        if torch.is_grad_enabled():  # create_graph: the product with the incoming gradient stays in the graph
            return (_residual(x, y, (rows, t, ctx.row, *noise)) * scale).to(x.dtype), None, None, None
        if kept.numel() == x.numel():
            return (kept * scale).to(x.dtype), None, None, None
        return _RESIDUAL.on(x.device.type)(x, y, rows, t, ctx.row, scale, *noise), None, None, None


def _mean(x, y, high, constants, keep):
    rows, t, row, *noise = constants
    return support.call(_RESIDUAL_MEAN.on(x.device.type), t, 0, high, x, y, rows, t, row, keep, *noise)


_residual = support.differentiable(_Residual)
_mean_square = support.differentiable(_Loss)

_CONSTANT = RowCache()  # rows that no schedule enters


def _eps_rows(_) -> torch.Tensor:
    return torch.tensor([[1.0, 0.0, -1.0]], dtype=torch.float64)


def _x0_rows(_) -> torch.Tensor:
    return torch.tensor([[1.0, -1.0, 0.0]], dtype=torch.float64)


def _v_rows(schedule: Schedule) -> torch.Tensor:
    abar = schedule.alphas_cumprod
    return torch.stack((torch.ones_like(abar), (1 - abar).sqrt(), -abar.sqrt()), 1)


def _loss(x, y, rows, steps, row, high, key, weight, first_sample):
    if weight is not None:
        if not isinstance(weight, torch.Tensor) or weight.shape != x.shape[:1] or weight.device != x.device:
            got = list(weight.shape) if isinstance(weight, torch.Tensor) else repr(weight)
            raise ValueError(f"weight must be a tensor [N] = [{x.shape[0]}] on {x.device}, got {got}")
        if weight.requires_grad:
            raise ValueError("weight must not require gradients: detach it")
        if steps is not None and steps.dim() == 2:
            raise ValueError("weight needs t of shape [N]: with a level a channel it would be ambiguous")
        if steps is not None:
            support.check_range(steps, 0, high)
        picked = rows[row].expand(x.shape[0], 3) if steps is None else support.take(rows, steps)
        rows = torch.cat((weight.to(rows.dtype)[:, None], picked[:, 1:]), 1)
        steps, row = None, -1
    first = support.first_element(first_sample, x)
    key, key_t = support.key_arguments(key, x.device, x.shape[0], first)
    constants = (rows, steps, row, key, key_t, first)
    if support.needs_autograd(x):
        return _mean_square(x, y, high, constants)[0]
    return _mean(x, y, high, constants, False)[0]


def noise_mse(
    eps_hat: torch.Tensor, key: int | torch.Tensor, *, weight: torch.Tensor | None = None, first_sample: int = 0
) -> torch.Tensor:
    """Mean of w (eps_hat - eps)^2, with eps the noise that `add_noise` used under the same key.

    Source: Ho et al. 2020, Eq. 14.

    Args:
        eps_hat: [N, …], the network's output.
        key, first_sample: those given to `add_noise`.
        weight: [N] or None, a weight a sample (a constant for gradients).

    Returns: a scalar, float32 (float64 for float64), summed in a fixed order.
    Gradients: with respect to eps_hat, first and second order.
    """
    eps_hat = support.dense(eps_hat, "eps_hat")
    return _loss(eps_hat, None, _CONSTANT.rows("eps", eps_hat, _eps_rows), None, 0, 0, key, weight, first_sample)


def denoising_loss(
    out: torch.Tensor,
    x0: torch.Tensor,
    t: int | torch.Tensor,
    schedule: Schedule,
    key: int | torch.Tensor,
    *,
    prediction: Prediction = "eps",
    weight: torch.Tensor | None = None,
    first_sample: int = 0,
) -> torch.Tensor:
    """Mean of w (out - target)^2 for a network that predicts eps, x0 or v = sqrt(abar) eps - sqrt(1 - abar) x0.

    Source: Ho et al. 2020, Eq. 14; v: Salimans and Ho 2022, Appendix D. `noise_mse` is the case "eps".

    Args:
        out: [N, …], the network's output at x_t = add_noise(x0, t, schedule, key).
        x0: like out, the clean data (a constant for gradients).
        t: as for `add_noise`.
        weight, first_sample: as for `noise_mse`.

    Returns: a scalar, float32 (float64 for float64).
    Gradients: with respect to `out`, first and second order.
    """
    check_prediction(prediction)
    out = support.dense(out, "out")
    x0 = support.matching(out, x0, "x0", "out")
    if x0.requires_grad:
        raise ValueError("x0 must not require gradients: detach it")
    row, steps = support.t_arguments(t, out, 0, schedule.T)
    if prediction == "v":
        rows = schedule.rows("loss v", out, _v_rows)
        return _loss(out, x0, rows, steps, row, schedule.T, key, weight, first_sample)
    if steps is not None:
        support.check_range(steps, 0, schedule.T)
    if prediction == "eps":
        return noise_mse(out, key, weight=weight, first_sample=first_sample)
    return _loss(out, x0, _CONSTANT.rows("x0", out, _x0_rows), None, 0, 0, key, weight, first_sample)
