import numpy as np
import pytest
import torch
import torch.nn.functional as F

from diffgan_fast.nets import StyleGAN2Critic, StyleGAN2Generator
from diffgan_fast.nets.stylegan2 import ModulatedConv2d, PathLength
from diffgan_fast.ops import r1_penalty

from .helpers import count, images, randomise
from .test_fir import filtered

W = 6


def generator(size=8, **changes):
    return randomise(
        StyleGAN2Generator(1, size, **{**dict(z_dim=3, width=4, latent=W), **changes}).double().eval(), 1, 1.0
    )


def critic(**changes):
    return randomise(StyleGAN2Critic(1, 8, **{**dict(width=4), **changes}).double())


def test_parameters_are_the_reference_s():
    """Of the CIFAR-10 configuration: 19.9 and 20.7 million, summed here from the layers' description."""
    linear, conv = 512 * 512 + 512, 9 * 512 * 512 + 512
    layer, image = linear + conv + 1, linear + 3 * 512 + 3
    with torch.device("meta"):
        assert count(StyleGAN2Generator(3, 32)) == 2 * linear + 16 * 512 + 7 * layer + 4 * image == 19_947_539
        head = conv + 9 * 512 + (16 * 512 * 512 + 512) + 513
        assert count(StyleGAN2Critic(3, 32)) == 4 * 512 + 6 * conv + head == 20_720_641
        more = 3 * 512 * 512  # three 1x1 skip connections without bias
        assert count(StyleGAN2Critic(3, 32, residual=True)) == 20_720_641 + more


@pytest.mark.parametrize("size", [8, 12, 28, 32, 40])
def test_sizes(size):
    x = StyleGAN2Generator(2, size, z_dim=4, width=8, latent=8)(torch.randn(4, 4))
    assert x.shape == (4, 2, size, size)
    assert StyleGAN2Critic(2, size, width=8)(x).shape == (4,)


def test_wide_layers_are_narrow_at_high_resolution():
    with torch.device("meta"):
        widths = [layer.bias.numel() for layer in StyleGAN2Generator(3, 256).layers[::2]]
    assert widths == [512, 512, 512, 512, 512, 256, 128]


def modulated(layer, x, w, up):
    """By definition: the weights of each sample, scaled and divided by their norms (Karras et al. 2020, Eqs. 1, 3)."""
    out = []
    style = w @ layer.style.weight.T / W**0.5 + layer.style.bias
    for image, s in zip(x, style, strict=True):
        weight = layer.weight / layer.weight[0].numel() ** 0.5 * s[None, :, None, None]
        if layer.demodulate:
            weight = weight / (weight.square().sum((1, 2, 3), keepdim=True) + 1e-8).sqrt()
        if up:
            bigger = F.conv_transpose2d(image[None], weight.transpose(0, 1), stride=2)
            out.append(torch.from_numpy(4 * filtered(bigger.numpy(), 1, 1, 1, 1)))
        else:
            out.append(F.conv2d(image[None], weight, padding=weight.shape[-1] // 2))
    return torch.cat(out)


@torch.no_grad()
def test_a_modulated_convolution_is_that_of_each_sample_s_weights():
    x, w = images(3, 4, 6, dtype=torch.float64), torch.randn(3, W, dtype=torch.float64)
    for options in (dict(), dict(doubles=True), dict(demodulate=False)):
        layer = ModulatedConv2d(4, 5, 3, W, **options).double()
        expected = modulated(layer, x, w, "doubles" in options) * (2**0.5 if layer.demodulate else 1)
        torch.testing.assert_close(layer(x, w), expected, rtol=0, atol=1e-12)


@torch.no_grad()
def test_the_generator_follows_its_description():
    net, z = generator(), torch.randn(3, 3, dtype=torch.float64)

    def leaky(x):
        return torch.where(x > 0, x, 0.2 * x) * 2**0.5

    w = z / (z.square().mean(1, keepdim=True) + 1e-8).sqrt()
    for layer, inputs in zip(net.mapping, (3, W), strict=True):
        w = leaky(w @ (0.01 * layer.weight / inputs**0.5).T + 0.01 * layer.bias)
    torch.testing.assert_close(net.styles(z), w)
    ws = torch.randn(3, 4, W, dtype=torch.float64)

    def styled(layer, x, w, up):
        y = modulated(layer.conv, x, w, up)
        return leaky(y + layer.strength * layer.noise + layer.bias[:, None, None])

    def image(layer, x, w):
        return modulated(layer.conv, x, w, False) + layer.bias[:, None, None]

    first, second, third = net.layers
    x = styled(first, net.constant.expand(3, 4, 4, 4), ws[:, 0], False)
    small = image(net.images[0], x, ws[:, 1])
    x = styled(third, styled(second, x, ws[:, 1], True), ws[:, 2], False)
    large = torch.from_numpy(filtered(small.numpy(), 2, 1, 2, 1)) + image(net.images[1], x, ws[:, 3])
    torch.testing.assert_close(net.synthesis(ws), large, rtol=0, atol=1e-11)
    torch.testing.assert_close(net(z), net.synthesis(w[:, None].expand(-1, 4, -1)))


@torch.no_grad()
@pytest.mark.parametrize("residual", [False, True])
def test_the_critic_follows_its_description(residual):
    net, x = critic(residual=residual), images(8, 1, 8, dtype=torch.float64)

    def leaky(x):
        return torch.where(x > 0, x, 0.2 * x) * 2**0.5

    def conv(layer, x, **options):
        return F.conv2d(x, layer.weight / layer.weight[0].numel() ** 0.5, layer.bias, **options)

    first, _, block, _, last, _, _, hidden, _, logit = net.main
    x = leaky(conv(first, x))
    h = torch.from_numpy(filtered(leaky(conv(block.convs[0], x, padding=1)).numpy(), 1, 1, 2, 2))
    h = leaky(conv(block.convs[1], h, stride=2))
    if residual:
        h = (h + conv(block.skip, torch.from_numpy(filtered(x.numpy(), 1, 2, 1, 1)))) / 2**0.5
    group = h.view(2, 4, 4, 4, 4)
    spread = (group.var(1, correction=0) + 1e-8).sqrt().mean((1, 2, 3)).repeat_interleave(4)
    h = torch.cat((h, spread.view(8, 1, 1, 1).expand(-1, 1, 4, 4)), 1)
    h = leaky(conv(last, h, padding=1)).flatten(1)
    h = leaky(h @ hidden.weight.T / 64**0.5 + hidden.bias)
    expected = (h @ logit.weight.T / 4**0.5 + logit.bias).flatten()
    torch.testing.assert_close(net(images(8, 1, 8, dtype=torch.float64)), expected, rtol=0, atol=1e-12)


def test_its_start_keeps_the_size_of_signals():
    """What equalised layers are for: outputs of order one at any width."""
    torch.manual_seed(0)
    net = StyleGAN2Generator(1, 8, z_dim=128, width=8, latent=128)
    assert all(95 < layer.weight.std() < 105 and not layer.bias.any() for layer in net.mapping)
    assert 0.5 < net.styles(torch.randn(64, 128)).square().mean().sqrt() < 2
    for layer in net.layers:
        assert (layer.conv.style.bias == 1).all() and layer.strength == 0 and 0.9 < layer.conv.weight.std() < 1.1
    for width in (16, 128):
        x = StyleGAN2Generator(1, 16, z_dim=32, width=width, latent=width)(torch.randn(32, 32))
        assert 0.5 < x.std() < 4
        logits = StyleGAN2Critic(1, 16, width=width)(torch.randn(32, 1, 16, 16))
        assert 0.003 < logits.std() < 3


@torch.no_grad()
def test_noise_and_mixing_are_of_training():
    net, z = generator(), torch.randn(64, 3, dtype=torch.float64)
    assert torch.equal(net(z), net(z))
    torch.testing.assert_close(net(z)[:5], net(z[:5]))  # a function of each z
    net.train()
    first, second = net(z[:1].expand(64, 3)), net(z[:1].expand(64, 3))
    assert (first[0] - first[1]).abs().max() > 1e-3 and (first - second).abs().amin(0).max() > 1e-4
    for layer in net.layers:
        layer.strength.zero_()
    first = net(z[:1].expand(64, 3))
    torch.testing.assert_close(first, first[:1].expand_as(first))
    net.style_mixing = 1.0
    plain = net.styles(z)[:, None].expand(-1, net.styled, -1)
    seen = set()
    for seed in range(30):
        torch.manual_seed(seed)
        kept = (net.mixed(z) == plain).all(2)
        assert (kept == kept[0]).all()  # the batch is mixed from one layer on
        seen.add(int(kept[0].sum()))
        assert kept[0, : kept[0].sum()].all()
    assert seen == {1, 2, 3}  # each of the four styles but the first may be the first of the other z
    net.style_mixing = 0.5
    mixed = [not torch.equal(net.mixed(z), plain) for _ in range(200)]
    assert 0.35 < np.mean(mixed) < 0.65


def test_path_lengths_are_those_of_the_jacobian():
    net, tracked = generator().train(), PathLength().double()
    for layer in net.layers:
        layer.strength.data.zero_()
    z, y = torch.randn(3, 3, dtype=torch.float64), images(3, 1, 8, dtype=torch.float64)
    lengths = tracked(net, z, y)
    for i in range(3):
        ws = net.styles(z[i : i + 1])[:, None].expand(-1, 4, -1).detach()
        jacobian = torch.autograd.functional.jacobian(lambda ws: net.synthesis(ws).flatten(), ws)
        reached = torch.einsum("p,plw->lw", y[i].flatten() / 8, jacobian[:, 0])
        torch.testing.assert_close(lengths[i], reached.square().sum(1).mean().sqrt(), rtol=1e-6, atol=1e-4)
    tracked.follow(torch.tensor(5.0))
    tracked.follow(torch.tensor(7.0))
    torch.testing.assert_close(tracked.mean.item(), 0.05 + 0.01 * (7 - 0.05), rtol=1e-6, atol=0)


def test_a_path_of_no_length_has_a_gradient():
    net, tracked = generator(), PathLength().double()
    for layer in net.images:
        layer.conv.weight.data.zero_()
    z, y = torch.randn(2, 3, dtype=torch.float64), images(2, 1, 8, dtype=torch.float64)
    lengths = tracked(net, z, y)
    (gradient,) = torch.autograd.grad((lengths - 1).square().mean(), net.constant)
    assert lengths.max() <= 1e-4 and gradient.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@torch.no_grad()
def test_half_precision_is_of_images_alone(dtype):
    """Styles and norms stay in float32, and so does the sum of images; what layers hand on is half."""
    net = randomise(StyleGAN2Generator(1, 16, z_dim=8, width=32, latent=8), 1, 1.0).eval()
    z, seen = torch.randn(8, 8), []
    for layer in net.layers:
        layer.register_forward_hook(lambda layer, given, out: seen.append((given[1].dtype, out.dtype)))
    want = net(z)
    seen.clear()
    with torch.autocast("cpu", dtype, cache_enabled=False):
        got = net(z)
    assert got.dtype == torch.float32 and set(seen) == {(torch.float32, dtype)}
    assert (got - want).square().mean().sqrt() < 0.02 * want.square().mean().sqrt()


def test_the_penalty_of_path_lengths_has_its_gradient():
    net, tracked = generator(), PathLength().double()
    z, y = torch.randn(2, 3, dtype=torch.float64), images(2, 1, 8, dtype=torch.float64)
    parameters = [net.layers[1].conv.weight, net.layers[2].conv.style.weight, net.constant, net.mapping[0].weight]

    def penalty():
        return tracked(net, z, y).square().mean()

    gradients = torch.autograd.grad(penalty(), parameters)
    for parameter, gradient in zip(parameters, gradients, strict=True):
        direction = torch.randn_like(parameter)
        values = []
        for sign in (1, -1):
            parameter.data.add_(direction, alpha=sign * 1e-5)
            values.append(penalty().item())
            parameter.data.sub_(direction, alpha=sign * 1e-5)
        torch.testing.assert_close(
            (gradient * direction).sum().item(), (values[0] - values[1]) / 2e-5, rtol=1e-5, atol=1e-7
        )


def test_r1_of_the_critic_is_exact():
    net, x = critic(), images(4, 1, 8, dtype=torch.float64).requires_grad_()
    (gradient,) = torch.autograd.grad(net(x).sum(), x)
    torch.testing.assert_close(r1_penalty(net, x.detach()), gradient.square().sum((1, 2, 3)).mean())


def test_bad_arguments_are_named():
    for size in (4, 6, 7, 34):
        with pytest.raises(ValueError, match=f"^size is {size}; it must be 4 or an odd number below 16, times a power"):
            StyleGAN2Generator(1, size)
        with pytest.raises(ValueError, match=f"^size is {size}"):
            StyleGAN2Critic(1, size)
    with pytest.raises(ValueError, match="^style_mixing is 1.5; it must be in"):
        StyleGAN2Generator(1, 8, style_mixing=1.5)
    with pytest.raises(ValueError, match="^mapping is 0; it must be at least 1"):
        StyleGAN2Generator(1, 8, mapping=0)
    with pytest.raises(ValueError, match=r"^z is \[2, 4\]; it must be \[N, 3\]"):
        generator()(torch.randn(2, 4, dtype=torch.float64))
    with pytest.raises(ValueError, match=r"^ws is \[2, 3, 6\]; it must be \[N, 4, 6\]"):
        generator().synthesis(torch.randn(2, 3, W, dtype=torch.float64))
    with pytest.raises(ValueError, match="^x holds 6 samples; .* 1 to 4, or a multiple of 4"):
        critic()(images(6, 1, 8, dtype=torch.float64))
    with pytest.raises(ValueError, match="^x is "):
        critic()(images(4, 1, 12, dtype=torch.float64))
