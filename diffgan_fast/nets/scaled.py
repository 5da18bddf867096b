"""What networks whose residual sums keep their variance share: the scale of a sum, the scale of the first weights."""

from typing import Literal, TypeVar

import torch
from torch import nn

SQRT_HALF = 0.5**0.5  # a sum of two independent branches, times this, has their mean variance

Layer = TypeVar("Layer", nn.Linear, nn.Conv2d)


@torch.no_grad()
def variance_scaled(layer: Layer, scale: float = 1.0, *, fan: Literal["avg", "out"] = "avg") -> Layer:
    """`layer` with weights uniform around 0 of variance scale / fan, and a zero bias.

    fan is the number of output values that an input value takes part in ("out"), or the mean of that and of the number
    of input values of an output ("avg"). A scale of 0 stands for 1e-10, as in the reference: a branch that starts
    as nearly no change, whose first gradients still differ from weight to weight.
    """
    outputs, inputs, *window = layer.weight.shape
    count = (outputs if fan == "out" else (inputs + outputs) / 2) * torch.Size(window).numel()
    bound = (3 * (scale or 1e-10) / count) ** 0.5
    nn.init.uniform_(layer.weight, -bound, bound)
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)
    return layer
