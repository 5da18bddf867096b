"""Losses of a critic and of what it judges, from logits."""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch.nn.functional import relu, softplus

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
