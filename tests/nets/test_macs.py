"""Counts of arithmetic against counts by hand."""

import pytest
import torch
from torch import nn

from diffgan_fast import nets
from diffgan_fast.nets.macs import MacCounter


def test_convolutions_and_linear_layers():
    net = nn.Sequential(nn.Conv2d(3, 5, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(5 * 64, 7))
    assert nets.macs(net, torch.zeros(1, 3, 8, 8)) == 64 * 5 * 3 * 9 + 5 * 64 * 7
    assert nets.macs(net, torch.zeros(4, 3, 8, 8)) == 4 * (64 * 5 * 3 * 9 + 5 * 64 * 7)
    assert all(p.device.type == "cpu" for p in net.parameters())


def test_attention():
    """Of L pixels with C channels: 4 L C^2 of the projections, 2 L^2 C of the products."""
    from diffgan_fast.nets.unet import SelfAttention

    assert nets.macs(SelfAttention(8), torch.zeros(1, 8, 6, 6)) == 4 * 36 * 64 + 2 * 36 * 36 * 8


def test_the_published_sizes():
    """WaveDiff's authors give 7.05 G for the generator at CIFAR-10's configuration; the facts 1.5 G for the critic."""
    x, t, z = torch.zeros(1, 3, 32, 32), torch.ones(1, dtype=torch.int64), torch.zeros(1, 100)
    with torch.device("meta"):
        generator, critic = nets.DDGANGenerator(3, 32, T=4), nets.DDGANCritic(3, 32, T=4)
    assert nets.macs(generator, x, t, z) / 1e9 == pytest.approx(7.05, rel=0.005)
    assert nets.macs(critic, x, t=t, x_t=x) / 1e9 == pytest.approx(1.5, rel=0.03)


def test_backward_and_double_backward():
    """A backward pass of a linear layer with a gradient to its input costs two forward passes."""
    layer, x = nn.Linear(6, 10), torch.randn(4, 6, requires_grad=True)
    with MacCounter() as counter:
        layer(x).sum().backward()
    assert counter.total == 3 * 4 * 60
    with MacCounter() as counter:
        (g,) = torch.autograd.grad(torch.tanh(layer(x)).sum(), x, create_graph=True)
        g.square().sum().backward()
    assert counter.total > 3 * 4 * 60


def test_what_is_not_counted_is_refused():
    with pytest.raises(ValueError, match="ReLU has no convolution"):
        nets.macs(nn.ReLU(), torch.zeros(1, 3))
