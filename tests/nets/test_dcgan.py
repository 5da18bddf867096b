import pytest
import torch

from diffgan_fast.nets import DCGANCritic, DCGANGenerator
from diffgan_fast.ops import r1_penalty

from .helpers import count, images, randomise

T3 = torch.tensor([1, 151, 300])


@pytest.mark.parametrize(
    "inputs, parameters",
    [(("x",), 661_248), (("x", "t"), 662_272), (("x", "x_t"), 662_272), (("x", "x_t", "t"), 663_296)],
)
def test_student_critics_have_the_authors_parameter_counts(inputs, parameters):
    assert count(DCGANCritic(1, 28, inputs=inputs, T=300)) == parameters


def test_cifar_critic_has_the_authors_parameter_count():
    assert count(DCGANCritic(3, 32)) == 2_759_424


def test_generator_has_the_authors_parameter_count():
    assert count(DCGANGenerator(1, 28)) == 3_573_696


def test_public_weights_load_as_they_are():
    """Keys and shapes of the csinva repository's MNIST netD and netG."""
    critic = {k: tuple(v.shape) for k, v in DCGANCritic(1, 28).state_dict().items() if v.ndim == 4}
    assert critic == {
        "main.0.weight": (64, 1, 4, 4),
        "main.2.weight": (128, 64, 4, 4),
        "main.5.weight": (256, 128, 4, 4),
        "main.8.weight": (1, 256, 4, 4),
    }
    generator = {k: tuple(v.shape) for k, v in DCGANGenerator(1, 28).state_dict().items() if v.ndim == 4}
    assert generator == {
        "main.0.weight": (100, 512, 4, 4),
        "main.3.weight": (512, 256, 4, 4),
        "main.6.weight": (256, 128, 4, 4),
        "main.9.weight": (128, 64, 4, 4),
        "main.12.weight": (64, 1, 1, 1),
    }


@pytest.mark.parametrize("norm", ["batch", "layer", None])
@pytest.mark.parametrize("size", [4, 5, 7, 8, 11, 16, 28, 31, 32, 64])
def test_one_logit_per_sample_at_every_size(size, norm):
    critic = DCGANCritic(2, size, width=4, norm=norm)
    assert critic(images(3, 2, size)).shape == (3,)


@pytest.mark.parametrize("size", [8, 28, 32])
def test_every_pixel_counts(size):
    x = images(2, 1, size).requires_grad_()
    (gradient,) = torch.autograd.grad(DCGANCritic(1, size, norm=None)(x).sum(), x)
    assert (gradient != 0).all()


def test_critic_without_norm_is_homogeneous():
    """No biases and LeakyReLU: D(cx) = c·D(x) for c > 0, and so <∇D(x), x> = D(x)."""
    critic = DCGANCritic(2, 28, width=8, norm=None).double()
    x = images(4, 2, 28, dtype=torch.float64).requires_grad_()
    logits = critic(x)
    (gradient,) = torch.autograd.grad(logits.sum(), x)
    torch.testing.assert_close((gradient * x).sum(dim=(1, 2, 3)), logits)
    torch.testing.assert_close(critic(3 * x), 3 * logits)


@pytest.mark.parametrize("norm", ["layer", None])
def test_samples_do_not_see_each_other(norm):
    critic = DCGANCritic(1, 16, width=8, norm=norm)
    x = images(3, 1, 16)
    torch.testing.assert_close(critic(x), torch.cat([critic(x[n : n + 1]) for n in range(3)]))


@pytest.mark.parametrize("norm", ["layer", None])
def test_double_backward_agrees_with_finite_differences(norm):
    critic = randomise(DCGANCritic(1, 8, width=2, norm=norm).double(), scale=0.5)
    x = images(2, 1, 8, dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(critic, x)
    assert torch.autograd.gradgradcheck(critic, x)


def test_inputs_are_concatenated_in_order():
    critic = DCGANCritic(2, 16, width=4, inputs=("x", "x_t", "t"), T=300)
    x, x_t = images(3, 2, 16), images(3, 2, 16, seed=2)
    joined = critic.join(x, T3, x_t)
    assert torch.equal(joined[:, :2], x)
    assert torch.equal(joined[:, 2:4], x_t)
    for plane, level in zip(joined[:, 4], (0.0, 0.5, 299 / 300), strict=True):
        assert torch.equal(plane, torch.full((16, 16), level))
    assert torch.equal(critic(x, T3, x_t), critic.main(joined).flatten())
    with pytest.raises(ValueError, match=r"t and level must be \[3\] here, one a sample; got \[3, 2\]"):
        critic(x, torch.ones(3, 2, dtype=torch.int64), x_t)


def test_inputs_not_asked_for_are_ignored():
    critic = DCGANCritic(1, 16, width=4)
    x = images(3, 1, 16)
    assert torch.equal(critic(x, t=T3, x_t=images(3, 1, 16, seed=2)), critic(x))


def test_he_initialisation_keeps_the_size_of_activations():
    torch.manual_seed(0)
    critic = DCGANCritic(1, 28, depth=2, norm=None, init="he")
    x = torch.randn(64, 1, 28, 28)
    for layer in critic.main[:-1]:
        x = layer(x)
        if isinstance(layer, torch.nn.LeakyReLU):
            assert 0.2 < x.square().mean() < 2  # pads take some
    assert 0.2 < critic.main[-1](x).std() < 3


def test_dcgan_initialisation():
    torch.manual_seed(0)
    for network in (DCGANCritic(3, 32, init="dcgan"), DCGANGenerator(3, 32)):
        for name, p in network.named_parameters():
            if p.ndim == 4 and p.numel() > 10_000:
                assert p.std().item() == pytest.approx(0.02, rel=0.03), name
                assert abs(p.mean().item()) < 1e-3, name
            elif p.ndim == 1 and name.endswith("weight"):
                assert p.mean().item() == pytest.approx(1.0, abs=0.01), name
                assert p.std().item() == pytest.approx(0.02, rel=0.4), name
            elif p.ndim == 1:
                assert not p.any(), name


@pytest.mark.parametrize("size", [8, 10, 16, 28, 32, 64])
@pytest.mark.parametrize("channels", [1, 3])
def test_generator_makes_images_of_the_size_asked_for(size, channels):
    generator = DCGANGenerator(channels, size, width=8)
    x = generator(torch.randn(2, 100))
    assert x.shape == (2, channels, size, size)
    assert x.abs().max() <= 1


def test_28_px_are_the_centre_of_32():
    small, large = DCGANGenerator(1, 28, width=8).eval(), DCGANGenerator(1, 32, width=8).eval()
    large.load_state_dict(small.state_dict())
    z = torch.randn(2, 100)
    torch.testing.assert_close(small(z), large(z)[:, :, 2:-2, 2:-2])


@pytest.mark.parametrize(
    "options, message",
    [
        ({"size": 3}, "size is 3"),
        ({"norm": "instance"}, "norm is 'instance'"),
        ({"inputs": ("t", "x"), "T": 10}, "inputs is"),
        ({"inputs": ("x", "t")}, "T is None"),
        ({"inputs": ("x", "t"), "T": 0}, "T is 0"),
        ({"init": "xavier"}, "init is 'xavier'"),
        ({"width": 0}, "width is 0"),
    ],
)
def test_bad_critic_arguments_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        DCGANCritic(**{"channels": 1, "size": 28, **options})


def test_bad_calls_are_named():
    critic = DCGANCritic(1, 28, inputs=("x", "x_t", "t"), T=300)
    x = images(3, 1, 28)
    with pytest.raises(ValueError, match=r"x is \[3, 1, 32, 32\]"):
        critic(images(3, 1, 32), T3, x)
    with pytest.raises(ValueError, match="t is None"):
        critic(x, x_t=x)
    with pytest.raises(ValueError, match="x_t is None"):
        critic(x, T3)
    with pytest.raises(ValueError, match=r"z is \[2, 64\]"):
        DCGANGenerator(1, 28)(torch.randn(2, 64))
    with pytest.raises(ValueError, match="size is 29"):
        DCGANGenerator(1, 29)


def test_a_deep_critic_has_its_penalty_in_closed_form():
    critic = DCGANCritic(1, 8, width=32, depth=2, norm=None).to(memory_format=torch.channels_last)
    x = images(4, 1, 8).contiguous(memory_format=torch.channels_last)
    got, want = r1_penalty(critic, x), r1_penalty(lambda x: critic(x), x)
    assert "Closed" in type(got.grad_fn).__name__ and "Closed" not in type(want.grad_fn).__name__
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-7)
    for g, w in zip(*(torch.autograd.grad(v, list(critic.parameters())) for v in (got, want)), strict=True):
        torch.testing.assert_close(g, w, rtol=1e-4, atol=1e-6)
