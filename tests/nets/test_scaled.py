import pytest
import torch
from torch import nn

from diffgan_fast.nets.scaled import variance_scaled


@pytest.mark.parametrize(
    "layer, scale, fan, bound",
    [
        (nn.Linear(100, 300), 1.0, "avg", (3 / 200) ** 0.5),
        (nn.Linear(100, 300), 1.0, "out", (3 / 300) ** 0.5),
        (nn.Conv2d(40, 20, 3), 1.0, "avg", (3 / (9 * 30)) ** 0.5),
        (nn.Conv2d(40, 20, 3), 0.1, "out", (0.3 / (9 * 20)) ** 0.5),
        (nn.Conv2d(40, 20, 3, bias=False), 0.0, "out", (3e-10 / (9 * 20)) ** 0.5),
    ],
)
def test_weights_are_uniform_with_the_stated_variance(layer, scale, fan, bound):
    torch.manual_seed(0)
    assert variance_scaled(layer, scale, fan=fan) is layer
    weight = layer.weight.detach().double() / bound
    assert 0.99 < weight.abs().max() <= 1 + 1e-6
    assert weight.square().mean().item() == pytest.approx(1 / 3, rel=0.05)
    assert layer.bias is None or not layer.bias.any()
