import math

import pytest
import torch

from diffgan_fast import nets

from .helpers import count


def test_parameters():
    assert count(nets.MLPDenoiser()) == 296_450
    assert [count(nets.MLPCritic(layers=n)) for n in (3, 4, 6)] == [132_609, 198_401, 329_985]


def test_the_denoiser_follows_its_description():
    """Written out for one point: frequencies 10000^(-i/63), sines then cosines, 25 x, 25 y, t - 1."""
    net = nets.MLPDenoiser().double()
    x, t = torch.tensor([[0.3, -1.2]], dtype=torch.float64), 17
    features = []
    for value in (25 * 0.3, 25 * -1.2, t - 1):
        phases = [value * 10000 ** (-i / 63) for i in range(64)]
        features += [math.sin(p) for p in phases] + [math.cos(p) for p in phases]
    first, *blocks, last = net.layers
    h = first(torch.tensor([features], dtype=torch.float64))
    for block in blocks:
        h = h + block(h.relu())
    torch.testing.assert_close(net(x, torch.tensor([t])), last(h.relu()), rtol=1e-9, atol=1e-9)


def test_one_time_for_all_is_embedded_once_and_gives_the_same():
    net, x = nets.MLPDenoiser(hidden=32).double(), torch.randn(70, 2, dtype=torch.float64)
    t = torch.tensor([9])
    torch.testing.assert_close(net(x, t.expand(70)), net(x, t.repeat(70)), rtol=1e-12, atol=1e-12)


def test_times_beyond_256_in_half_the_bits():
    """bfloat16 has eight bits: t itself must not be rounded to it."""
    net, x = nets.MLPDenoiser(hidden=32), torch.randn(6, 2).bfloat16()
    t = torch.tensor([300, 301, 500, 777, 998, 999])
    want = net(x.float(), t)
    torch.testing.assert_close(net.bfloat16()(x, t).float(), want, rtol=0, atol=0.02)


@pytest.mark.parametrize("t", [torch.ones(0, dtype=torch.int64), torch.ones(1, dtype=torch.int64).expand(0)])
def test_no_points_are_denoised_to_none(t):
    assert nets.MLPDenoiser(hidden=8)(torch.randn(0, 2), t).shape == (0, 2)


@pytest.mark.parametrize("inputs", [("x",), ("x", "t"), ("x", "x_t"), ("x", "x_t", "t")])
def test_the_critic_is_its_main_after_join(inputs):
    critic = nets.MLPCritic(3, 16, 2, inputs=inputs, T=10)
    x, x_t, t = torch.randn(5, 3), torch.randn(5, 3), torch.randint(1, 11, (5,))
    logits = critic(x, t=t, x_t=x_t)
    assert logits.shape == (5,)
    torch.testing.assert_close(logits, critic.main(critic.join(x, t=t, x_t=x_t)).flatten())
    changed = critic(x, t=t % 10 + 1, x_t=x_t + 1)
    assert torch.equal(changed, logits) == (inputs == ("x",))


def test_bad_arguments_are_named():
    cases = [
        (lambda: nets.MLPDenoiser(hidden=0), "hidden is 0"),
        (lambda: nets.MLPCritic(layers=0), "layers is 0"),
        (lambda: nets.MLPCritic(inputs=("t",)), "inputs is"),
        (lambda: nets.MLPCritic(inputs=("x", "t")), "T is None"),
        (lambda: nets.MLPDenoiser()(torch.randn(4, 3), torch.ones(4, dtype=torch.int64)), r"x is \[4, 3\]"),
        (lambda: nets.MLPDenoiser()(torch.randn(4, 2), torch.tensor(3)), r"t is \[\]; it must be \[4\]"),
        (lambda: nets.MLPDenoiser()(torch.randn(4, 2), torch.tensor([3]).expand(3)), r"t is \[3\]; it must be \[4\]"),
        (lambda: nets.MLPCritic()(torch.randn(4, 3)), r"x is \[4, 3\]"),
        (lambda: nets.MLPCritic(inputs=("x", "x_t"))(torch.randn(4, 2)), "x_t is None"),
    ]
    for call, message in cases:
        with pytest.raises(ValueError, match=message):
            call()
