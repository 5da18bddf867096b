import pytest
import torch

from diffgan_fast import nets

from .helpers import count, images


def test_parameters_at_32_pixels():
    """As the tables of Miyato et al. 2018 give them: convolutions with biases, and batch norms in the generator."""
    c, w = 3, 128
    first = 9 * c * w + w + 9 * w * w + w + c * w + w
    halving = 2 * (9 * w * w + w) + w * w + w
    assert count(nets.SNGANCritic(3, 32)) == first + halving + 2 * 2 * (9 * w * w + w) + w + 1
    g = 256
    block = 2 * (9 * g * g + g) + g * g + g + 2 * 2 * g
    linear, last = 128 * 16 * g + 16 * g, 2 * g + 9 * g * c + c
    assert count(nets.SNGANGenerator(3, 32)) == linear + 3 * block + last


@pytest.mark.parametrize("size", [8, 28, 32])
def test_sizes(size):
    x = nets.SNGANGenerator(2, size, z_dim=4, width=8)(torch.randn(3, 4))
    assert x.shape == (3, 2, size, size) and x.abs().max() <= 1
    assert nets.SNGANCritic(2, size, width=8)(x).shape == (3,)


def test_blocks_follow_their_description():
    """Written out: nearest doubling and means of 2 x 2 pixels, in both branches."""
    torch.manual_seed(0)
    critic, x = nets.SNGANCritic(1, 8, width=6).double().eval(), images(2, 1, 8, dtype=torch.float64)

    def pool(v):
        return v.unflatten(2, (-1, 2)).unflatten(4, (-1, 2)).mean((3, 5))

    first, second, third, fourth = critic.main[:4]
    h = pool(first.convs[1](first.convs[0](x).relu())) + pool(first.shortcut(x))
    h = pool(second.convs[1](second.convs[0](h.relu()).relu())) + pool(second.shortcut(h))
    for block in (third, fourth):
        h = h + block.convs[1](block.convs[0](h.relu()).relu())
    torch.testing.assert_close(critic(x), critic.main[-1](h.relu().sum((2, 3))).flatten())

    generator = nets.SNGANGenerator(1, 8, z_dim=3, width=4).double().eval()
    z = torch.randn(2, 3, dtype=torch.float64)
    block, norm, relu, last, tanh = generator.main
    h = generator.first(z).view(2, 4, 4, 4)

    def double(v):
        return v.repeat_interleave(2, 2).repeat_interleave(2, 3)

    a = block.convs[0](double(block.norms[0](h).relu()))
    h = block.convs[1](block.norms[1](a).relu()) + block.shortcut(double(h))
    torch.testing.assert_close(generator(z), last(norm(h).relu()).tanh())


def test_every_layer_of_the_critic_has_spectral_norm_one():
    critic = nets.SNGANCritic(3, 8, width=8)
    for _ in range(50):
        critic(images(2, 3, 8))
    layers = [m for m in critic.modules() if hasattr(m, "parametrizations")]
    assert len(layers) == 3 + 3 + 2 + 2 + 1
    for layer in layers:
        norm = torch.linalg.matrix_norm(layer.weight.detach().flatten(1), 2)
        assert float(norm) == pytest.approx(1, abs=1e-2)


def test_what_does_not_fit_is_named():
    for size in (6, 34, 4, 9):
        with pytest.raises(ValueError, match=f"size is {size}; it must be 4 or an odd number below 16"):
            nets.SNGANGenerator(3, size)
    with pytest.raises(ValueError, match="size is 30; it must be a multiple of 4"):
        nets.SNGANCritic(3, 30)
    with pytest.raises(ValueError, match=r"z is \[2, 5\]; it must be \[N, 4\]"):
        nets.SNGANGenerator(3, 8, z_dim=4)(torch.zeros(2, 5))
