"""What holds for every network."""

import pytest
import torch
from torch import nn

from diffgan_fast.nets import (
    DCGANCritic,
    DCGANGenerator,
    DDGANCritic,
    DDGANGenerator,
    DDGANPointGenerator,
    LevelCritic,
    MLPCritic,
    MLPDenoiser,
    MLPGenerator,
    SNGANCritic,
    SNGANGenerator,
    StudentUNet,
    StyleGAN2Critic,
    StyleGAN2Generator,
    UNet,
)

from .helpers import images, randomise

T3 = torch.tensor([1, 7, 20])
Y3 = torch.tensor([0, 4, 10])

# name: (constructor, arguments of a call)
NETWORKS = {
    "unet": (
        lambda: UNet(3, 8, width=16, multipliers=(1, 2), blocks=1, attention=(4,), num_classes=10),
        (images(3, 3, 8), T3, Y3),
    ),
    "unet preset": (lambda: UNet.preset(8, 1), (images(3, 1, 8), T3)),
    "student": (lambda: StudentUNet(num_classes=10, T=20), (images(3, 1, 28), T3, Y3)),
    "critic": (
        lambda: DCGANCritic(3, 28, width=16, inputs=("x", "x_t", "t"), T=20),
        (images(3, 3, 28), T3, images(3, 3, 28, seed=2)),
    ),
    "critic, layer norm": (lambda: DCGANCritic(3, 32, width=16, norm="layer"), (images(3, 3, 32),)),
    "points": (lambda: MLPDenoiser(hidden=16), (torch.randn(3, 2), T3)),
    "points, critic": (
        lambda: MLPCritic(hidden=16, inputs=("x", "x_t", "t"), T=20),
        (torch.randn(3, 2), T3, torch.randn(3, 2)),
    ),
    "generator": (lambda: DCGANGenerator(3, 28, width=8), (torch.randn(3, 100),)),
    "ddgan": (
        lambda: DDGANGenerator(3, 8, T=20, width=16, latent=16),
        (images(3, 3, 8), T3, torch.randn(3, 100)),
    ),
    "ddgan, critic": (
        lambda: DDGANCritic(3, 8, T=20, stem=8, widths=(8, 16), halvings=2, emb_dim=16),
        (images(3, 3, 8), T3, images(3, 3, 8, seed=2)),
    ),
    "ddgan, points": (lambda: DDGANPointGenerator(hidden=16, T=20), (torch.randn(3, 2), T3, torch.randn(3, 8))),
    "points, generator": (lambda: MLPGenerator(z_dim=5, hidden=16), (torch.randn(3, 5),)),
    "sngan generator": (lambda: SNGANGenerator(3, 8, z_dim=5, width=8), (torch.randn(3, 5),)),
    "sngan critic": (lambda: SNGANCritic(3, 8, width=8), (images(3, 3, 8),)),
    "stylegan2 generator": (
        lambda: StyleGAN2Generator(3, 8, z_dim=5, width=8, latent=6, style_mixing=0.5),
        (torch.randn(3, 5),),
    ),
    "stylegan2 critic": (lambda: StyleGAN2Critic(3, 8, width=8), (images(3, 3, 8),)),
    "stylegan2 critic, residual": (lambda: StyleGAN2Critic(3, 8, width=8, residual=True), (images(3, 3, 8),)),
    "told the level": (
        lambda: LevelCritic(nn.Flatten(), 48, "mapping", dim=16),
        (images(3, 3, 4), T3, torch.tensor([0.0, 0.3, 1.0])),
    ),
}


@pytest.fixture(params=NETWORKS.values(), ids=NETWORKS.keys())
def case(request):
    return request.param


def cast(arguments, **options):
    """The floating-point arguments moved to another dtype or memory format."""
    return [a.to(**options) if a.is_floating_point() and a.ndim == 4 else a for a in arguments]


def test_seed_decides_the_initialisation(case):
    make, _ = case

    def weights(seed):
        torch.manual_seed(seed)
        return make().state_dict()

    first, again, other = weights(0), weights(0), weights(1)
    assert all(torch.equal(first[k], again[k]) for k in first)
    assert any(not torch.equal(first[k], other[k]) for k in first)


def test_state_dict_holds_tensors_and_carries_the_whole_network(case):
    make, arguments = case
    network, copy = randomise(make()), make()
    assert all(type(v) is torch.Tensor for v in network.state_dict().values())
    copy.load_state_dict(network.state_dict())
    assert torch.equal(network.eval()(*arguments), copy.eval()(*arguments))


@pytest.mark.parametrize("training", [True, False])
def test_channels_last_gives_the_same_result_and_gradients(case, training):
    make, arguments = case
    network = randomise(make()).train(training)
    other = make().train(training).to(memory_format=torch.channels_last)
    other.load_state_dict(network.state_dict())  # a spectral norm's estimates too
    torch.manual_seed(0)  # for networks that draw noise
    expected = network(*arguments)
    torch.manual_seed(0)
    value = other(*cast(arguments, memory_format=torch.channels_last))
    assert (value - expected).abs().max() <= 1e-5 * max(1.0, expected.abs().max().item())
    expected.square().mean().backward()
    value.square().mean().backward()
    for (name, p), q in zip(network.named_parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(q.grad, p.grad, rtol=1e-3, atol=1e-5, msg=name)


def test_float64_agrees_with_float32(case):
    make, arguments = case
    network = randomise(make()).eval()
    expected = network(*arguments)
    double = [a.double() if a.is_floating_point() else a for a in arguments]
    value = network.double()(*double)
    assert value.dtype == torch.float64
    torch.testing.assert_close(value.float(), expected, rtol=1e-4, atol=1e-4)


def test_every_parameter_receives_a_gradient(case):
    make, arguments = case
    network = randomise(make())
    network(*arguments).square().mean().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in network.parameters())
    assert not [n for n, p in network.named_parameters() if n.endswith("weight") and not p.grad.any()]


def test_compiles_into_one_graph(case):
    make, arguments = case
    network = randomise(make()).eval()
    compiled = torch.compile(network, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(*arguments), network(*arguments), rtol=1e-4, atol=1e-5)
    torch._dynamo.reset()


def test_runs_under_autocast(case):
    make, arguments = case
    network = randomise(make()).eval()
    with torch.autocast("cpu", torch.bfloat16):
        value = network(*arguments)
    expected = network(*arguments)
    assert (value - expected).abs().max() < 0.05 * expected.abs().max()
