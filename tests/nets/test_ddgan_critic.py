import numpy as np
import pytest
import torch
import torch.nn.functional as F

from diffgan_fast.nets import DDGANCritic
from diffgan_fast.nets.deviation import MinibatchDeviation
from diffgan_fast.ops import r1_penalty

from .helpers import count, images, randomise
from .test_embedding import closed_form
from .test_fir import filtered

minibatch_deviation = MinibatchDeviation()
T4 = torch.tensor([1, 2, 4, 3])
TINY = dict(preset="8", T=4, stem=4, widths=(4, 6), halvings=1, emb_dim=4)


def tiny(size=4, **changes):
    return DDGANCritic(1, size, **{**TINY, **changes})


def pair(n, size=4, dtype=torch.float64):
    return images(n, 1, size, dtype=dtype), images(n, 1, size, seed=2, dtype=dtype)


def test_parameters_are_the_reference_s():
    with torch.device("meta"):
        assert count(DDGANCritic(3, 32, preset="small", T=4)) == 12_741_633
        assert count(DDGANCritic(3, 256, preset="large", T=4)) == 27_737_217
        assert count(DDGANCritic(1, 8, T=4)) == 478_465
        assert count(DDGANCritic(1, 28, T=4)) == 1_912_321


@pytest.mark.parametrize("size, preset", [(8, "8"), (28, "28"), (32, "small"), (256, "large")])
def test_without_a_preset_the_size_decides(size, preset):
    with torch.device("meta"):
        chosen, named = DDGANCritic(3, size, T=4), DDGANCritic(3, size, preset=preset, T=4)
    shapes = [{k: v.shape for k, v in network.state_dict().items()} for network in (chosen, named)]
    assert shapes[0] == shapes[1]


@pytest.mark.parametrize("size, last", [(8, 2), (28, 3), (32, 4)])
def test_resolutions(size, last):
    critic = DDGANCritic(1, size, T=4)
    seen = []
    critic.blocks[-1].register_forward_hook(lambda module, inputs, output: seen.append(output.shape[-1]))
    x, x_t = pair(2, size, torch.float32)
    assert critic(x, t=T4[:2], x_t=x_t).shape == (2,)
    assert seen == [last]


def test_the_large_critic_ends_at_4_px_of_256():
    with torch.device("meta"):
        critic = DDGANCritic(3, 256, preset="large", T=4)
        seen = []
        critic.blocks[-1].register_forward_hook(lambda module, inputs, output: seen.append(output.shape))
        x = torch.empty(1, 3, 256, 256)
        assert critic(x, t=torch.ones(1, dtype=torch.int64), x_t=x).shape == (1,)
    assert seen == [(1, 512, 4, 4)]


def written(state, x, t, x_t):
    """The tiny critic written out step by step, in float64, from the facts of the paper's network."""

    def conv(name, x, **options):
        return F.conv2d(x, state[f"{name}.weight"], state.get(f"{name}.bias"), **options)

    def linear(name, x):
        return x @ state[f"{name}.weight"].T + state[f"{name}.bias"]

    def leaky(x):
        return torch.where(x > 0, x, 0.2 * x)

    def halved(x):
        return torch.from_numpy(filtered(x.numpy(), 1, 2, 1, 1))

    emb = torch.tensor([closed_form(n - 1, 4) for n in t.tolist()], dtype=torch.float64)
    emb = leaky(linear("time.2", leaky(linear("time.0", emb))))
    h = conv("stem", torch.cat([x, x_t], 1))
    for i, shrink in enumerate((False, True)):
        inner = conv(f"blocks.{i}.conv1", leaky(h), padding=1) + linear(f"blocks.{i}.emb", emb)[:, :, None, None]
        inner = leaky(inner)
        if shrink:
            h, inner = halved(h), halved(inner)
        h = (conv(f"blocks.{i}.conv2", inner, padding=1) + conv(f"blocks.{i}.skip", h)) / 2**0.5
    h = leaky(conv("head", torch.from_numpy(with_deviation(h.numpy())), padding=1))
    return linear("logit", h.sum((2, 3))).flatten()


def with_deviation(x):
    n = min(len(x), 4)
    value = np.empty((len(x), 1, *x.shape[2:]))
    for first in range(0, len(x), n):
        value[first : first + n] = np.sqrt(x[first : first + n].var(axis=0) + 1e-8).mean()
    return np.concatenate([x, value], 1)


@pytest.mark.parametrize("n", [1, 3, 4, 8])
def test_the_critic_follows_its_description(n):
    critic = randomise(tiny().double(), scale=0.5)
    x, x_t = pair(n)
    t = T4.repeat(2)[:n]
    with torch.no_grad():
        expected = written(critic.state_dict(), x, t, x_t)
        torch.testing.assert_close(critic(x, t=t, x_t=x_t), expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("n", [1, 2, 3, 4, 8, 12])
def test_minibatch_deviation_is_its_formula(n):
    x = images(n, 3, 5, dtype=torch.float64)
    np.testing.assert_allclose(minibatch_deviation(x).numpy(), with_deviation(x.numpy()), rtol=1e-12)


def test_minibatch_deviation_does_not_see_how_the_batch_is_divided():
    x = images(12, 3, 5)
    parts = torch.cat([minibatch_deviation(part) for part in x.split([4, 8])])
    assert torch.equal(minibatch_deviation(x), parts)


def test_minibatch_deviation_of_equal_samples():
    """1e-4 of float32 arithmetic also in float16, where 1e-8 is nothing, and a gradient that is a number."""
    x = images(1, 3, 5).repeat(4, 1, 1, 1).half().requires_grad_()
    value = minibatch_deviation(x)[:, 3]
    torch.testing.assert_close(value, torch.full_like(value, 1e-4))
    (gradient,) = torch.autograd.grad(value.sum(), x)
    assert gradient.isfinite().all()


@pytest.mark.parametrize("n", [0, 5, 6, 10])
def test_a_batch_that_does_not_divide_into_groups_is_named(n):
    x, x_t = pair(n, dtype=torch.float32)
    with pytest.raises(ValueError, match=f"x holds {n} samples"):
        tiny()(x, t=torch.ones(n, dtype=torch.int64), x_t=x_t)


def test_depends_on_all_it_is_given():
    critic = randomise(tiny(), scale=0.5)
    x, x_t = pair(4, dtype=torch.float32)
    logits = critic(x, t=T4, x_t=x_t)
    for changed in (critic(x + 0.1, t=T4, x_t=x_t), critic(x, t=T4 % 4 + 1, x_t=x_t), critic(x, t=T4, x_t=x_t + 0.1)):
        assert (changed - logits).abs().min() > 1e-4
    torch.testing.assert_close(critic(x, T4, x_t), logits)


def test_logits_are_nearly_zero_at_initialisation():
    torch.manual_seed(0)
    x, x_t = pair(4, 8, torch.float32)
    assert 0 < DDGANCritic(1, 8, T=4)(x, t=T4, x_t=x_t).abs().max() < 1e-2


def test_double_backward_agrees_with_finite_differences():
    critic = randomise(tiny().double(), scale=0.5)
    x, x_t = pair(4)
    x.requires_grad_()
    assert torch.autograd.gradcheck(lambda x: critic(x, t=T4, x_t=x_t), x)
    assert torch.autograd.gradgradcheck(lambda x: critic(x, t=T4, x_t=x_t), x)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_r1_reaches_the_parameters(layout):
    """The gradient of R1 along one change of the first conv, against a finite difference of R1."""
    critic = randomise(tiny().double(), scale=0.5).to(memory_format=layout)
    x, x_t = (v.contiguous(memory_format=layout) for v in pair(4))
    weight = critic.blocks[0].conv1.weight
    (gradient,) = torch.autograd.grad(r1_penalty(critic, x, t=T4, x_t=x_t), weight)
    direction, values = torch.ones_like(weight), []
    for sign in (1, -1):
        with torch.no_grad():
            weight += sign * 1e-6 * direction
        values.append(r1_penalty(critic, x, t=T4, x_t=x_t).item())
        with torch.no_grad():
            weight -= sign * 1e-6 * direction
    assert gradient.sum().item() == pytest.approx((values[0] - values[1]) / 2e-6, rel=1e-4)
    assert gradient.abs().max() > 1e-3


@pytest.mark.parametrize(
    "options, message",
    [
        ({"size": 1}, "size is 1"),
        ({"widths": ()}, "widths is 0"),
        ({"stem": 0}, "stem is 0"),
        ({"halvings": 3}, "halvings is 3"),
        ({"T": 0}, "T is 0"),
        ({"preset": "medium"}, "preset is 'medium'"),
        ({"preset": None, "size": 64}, "size is 64"),
    ],
)
def test_bad_arguments_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        tiny(**options)


def test_bad_calls_are_named():
    x, x_t = pair(4, dtype=torch.float32)
    with pytest.raises(ValueError, match=r"x is \[4, 1, 8, 8\]"):
        tiny()(pair(4, 8, torch.float32)[0], t=T4, x_t=x_t)
    with pytest.raises(ValueError, match=r"x_t is \[4, 1, 8, 8\]"):
        tiny()(x, t=T4, x_t=pair(4, 8, torch.float32)[1])
