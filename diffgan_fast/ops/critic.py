"""A critic's loss on real and fake samples with its gradient penalty, and the gradient of both, in one call.

For an MLP, in C++ on the CPU: otherwise a step of a small critic is dozens of tiny ops, and makes panels of its weights
four times. All else takes the plain form, which is in `diffgan_fast.adversarial`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch

from diffgan_fast._native import LIBRARY
from diffgan_fast.ops import closed
from diffgan_fast.ops.mlp import fused, split
from diffgan_fast.ops.penalty import in_closed_form, interpolate

LIBRARY.define(
    "mlp_critic(Tensor real, Tensor fake, Tensor between, Tensor[] weights, Tensor[] biases, float slope, int loss, "
    "int judged, float center, float weight) -> (Tensor, Tensor, Tensor)"
)


def _fake(real, fake, between, weights, biases, *_):
    size = sum(v.numel() for v in (*weights, *biases))
    return real.new_empty(()), real.new_empty(2 * len(real), len(biases[-1])), real.new_empty(size)


torch.library.register_fake("diffgan_fast::mlp_critic", _fake, lib=LIBRARY)
_RAW = torch.ops.diffgan_fast

# As the op numbers them: the losses of `adversarial.critic_loss`.
LOSSES = {"nonsaturating": 0, "saturating": 0, "hinge": 1, "lsgan": 2, "wgan": 3}


class _Known(torch.autograd.Function):
    """A loss whose gradient with respect to an MLP's parameters is known already."""

    @staticmethod
    def forward(ctx, loss, flat, layers, *parameters):
        ctx.layers = layers
        ctx.save_for_backward(flat, *parameters[:layers])
        return loss.clone()

    @staticmethod
    def backward(ctx, grad):
        if torch.is_grad_enabled():
            raise RuntimeError("a critic's fused loss is of first order: use `critic_loss` and `gradient_penalty`")
        flat, *weights = ctx.saved_tensors
        return None, None, None, *split(flat * grad, weights, True)


def fused_loss(
    critic: Callable[..., torch.Tensor],
    real: torch.Tensor,
    fake: torch.Tensor,
    kind: str,
    gp_weight: float,
    key: int | torch.Tensor | None,
    first_sample: int,
    real_cond: Mapping[str, Any],
    fake_cond: Mapping[str, Any],
) -> tuple[torch.Tensor, torch.Tensor] | None:
    """(loss, logits of the real and then of the fake samples), or None for what the C++ form does not take.

    It takes an `nn.Sequential`, or a critic that has one as `main` and says what it sees by `join` (`nets.Critic`), of
    linear layers of one width with one kind of (Leaky)ReLU between, without autocast. Arguments as for
    `adversarial.critic_objective`. The loss has first-order gradients with respect to the critic's parameters, the
    logits have none.
    """
    net, _ = in_closed_form(critic, "auto", real_cond)
    mlp = None if net is None else closed.as_mlp(net)
    if mlp is None or real.dim() != 2 or real.shape != fake.shape or not fused(real, *mlp):
        return None

    def joined(x: torch.Tensor, cond: Mapping[str, Any]) -> torch.Tensor:
        return (x if net is critic else critic.join(x, **cond)).contiguous()  # type: ignore[attr-defined]

    with torch.no_grad():
        between = joined(real, real_cond)[:0]
        if gp_weight and key is not None:
            between = joined(interpolate(real, fake, key, first_sample=first_sample), real_cond)
        weights, biases, slope = mlp
        loss, logits, flat = _RAW.mlp_critic.default(
            joined(real, real_cond), joined(fake, fake_cond), between, weights, biases, slope, LOSSES[kind],
            real.shape[1], 1.0, gp_weight,
        )  # fmt: skip
    parameters = (*weights, *biases)
    return _Known.apply(loss, flat, len(weights), *parameters), logits.squeeze(1) if logits.shape[1] == 1 else logits
