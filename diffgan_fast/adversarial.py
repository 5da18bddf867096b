"""Losses of a critic and of what it judges, from logits."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Literal, get_args

import torch
from torch import nn
from torch.nn.functional import relu, softplus

from diffgan_fast.engine import measures_batch
from diffgan_fast.ops import gradient_penalty, support
from diffgan_fast.ops.critic import fused_loss

GanLoss = Literal["nonsaturating", "saturating", "hinge", "lsgan", "wgan"]


def _check(kind: str) -> None:
    if kind not in get_args(GanLoss):
        raise ValueError(f"gan_loss must be one of {', '.join(get_args(GanLoss))}; got {kind!r}")


def _wide(logits: torch.Tensor) -> torch.Tensor:
    """At least float32: under autocast a critic's logits are of half the bits."""
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


def critic_loss(real: torch.Tensor, fake: torch.Tensor, kind: GanLoss = "nonsaturating") -> torch.Tensor:
    """What the critic minimises: a scalar.

    Binary cross-entropy on logits, -log D(real) - log(1 - D(fake)) (Goodfellow et al. 2014), for "nonsaturating" and
    "saturating"; "hinge" (Miyato et al. 2018); "lsgan", half the squared distance to 1 and 0 (Mao et al. 2017); "wgan"
    (Arjovsky et al. 2017). `real` and `fake` are logits of any shape; every sample weighs the same.
    """
    _check(kind)
    real, fake = _wide(real), _wide(fake)
    if kind in ("nonsaturating", "saturating"):
        return softplus(-real).mean() + softplus(fake).mean()
    if kind == "hinge":
        return relu(1 - real).mean() + relu(1 + fake).mean()
    if kind == "lsgan":
        return 0.5 * ((real - 1).square().mean() + fake.square().mean())
    return fake.mean() - real.mean()


def critic_objective(
    critic: Callable[..., torch.Tensor],
    real: torch.Tensor,
    fake: torch.Tensor,
    kind: GanLoss = "nonsaturating",
    *,
    gp_weight: float = 0.0,
    key: int | torch.Tensor | None = None,
    first_sample: int = 0,
    cond: Mapping[str, Any] | None = None,
    fake_cond: Mapping[str, Any] | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """What a critic minimises in a step, from the samples: `critic_loss` + gp_weight · `ops.gradient_penalty`.

    An MLP in float32 or float64 on the CPU is run, penalised and differentiated in one call (`ops.critic`).

    Args:
        critic: logits [N] or [N, K] = critic(x, **cond).
        real, fake: [N, …], constants for gradients.
        kind: as for `critic_loss`.
        gp_weight: weight of the gradient penalty between real and fake samples (0: none).
        key, first_sample: of that penalty, as for `ops.interpolate`.
        cond: what else the critic is told, of real samples and between.
        fake_cond: what it is told of fake ones; None: the same.

    Returns: (the loss, logits of real samples, logits of fake ones). The logits have no gradients.
    Gradients: with respect to the critic's parameters; of first order where the penalty is not "double".
    Raises: ValueError for another shape of `fake`, a `gp_weight` without a key, or what the penalty refuses.
    """
    _check(kind)
    real, fake = real.detach(), fake.detach()
    if real.shape != fake.shape:
        raise ValueError(f"fake must be like real, {list(real.shape)}; got {list(fake.shape)}")
    if gp_weight and key is None:
        raise ValueError(f"key is None; gp_weight={gp_weight} needs one")
    real_cond = cond or {}
    fake_cond = real_cond if fake_cond is None else fake_cond
    if found := fused_loss(critic, real, fake, kind, gp_weight, key, first_sample, real_cond, fake_cond):
        loss, logits = found
        return loss, *logits.split(len(real))
    if _one_batch(critic):
        told = {name: torch.cat((v, fake_cond[name])) for name, v in real_cond.items()}
        on_real, on_fake = critic(torch.cat((real, fake)), **told).split(len(real))
    else:
        on_real, on_fake = critic(real, **real_cond), critic(fake, **fake_cond)
    loss = critic_loss(on_real, on_fake, kind)
    if gp_weight and key is not None:
        loss = loss + gp_weight * gradient_penalty(critic, real, fake, key, first_sample=first_sample, **real_cond)
    return loss, on_real.detach(), on_fake.detach()


def _one_batch(critic: Callable[..., torch.Tensor]) -> bool:
    """Whether a critic may judge real and fake samples in one batch: one of ours that judges each by itself.

    Batch norm would mix their statistics, and each call of a spectral norm in training improves its estimate.
    """
    return (
        isinstance(critic, nn.Module)
        and getattr(type(critic).forward, "is_main_of_join", False)
        and not measures_batch(critic)
        and not any(support.estimates_spectrum(layer) for layer in critic.modules())
    )


def generator_loss(
    fake: torch.Tensor, kind: GanLoss = "nonsaturating", *, weight: torch.Tensor | None = None
) -> torch.Tensor:
    """What the judged network minimises: a scalar. "nonsaturating" is -log D(fake), "saturating" log(1 - D(fake)).

    `weight` [N] weighs the samples. ValueError if there is not one for each.
    """
    _check(kind)
    fake = _wide(fake)
    if kind == "nonsaturating":
        each = softplus(-fake)
    elif kind == "saturating":
        each = -softplus(fake)
    elif kind == "lsgan":
        each = 0.5 * (fake - 1).square()
    else:
        each = -fake
    if weight is not None:
        if weight.shape != each.shape[:1]:
            raise ValueError(f"weight must be [N] = [{len(each)}], got {list(weight.shape)}")
        each = weight.view(-1, *[1] * (each.dim() - 1)) * each
    return each.mean()
