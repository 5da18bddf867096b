import math

import pytest
import torch

import diffgan_fast as dgf

S = dgf.Schedule.linear_scaled(40)


def exact(mean, std):
    """The best denoiser for N(mean, std^2): eps* = sqrt(1-abar) (x - sqrt(abar) mean) / (abar std^2 + 1 - abar)."""

    def model(x, t):
        a = S.alphas_cumprod[t].to(x.dtype).view(-1, 1)
        return (1 - a).sqrt() * (x - a.sqrt() * mean) / (a * std**2 + 1 - a)

    return model


CASES = [  # options, and how far the standard deviation may lie off: the posterior variance (eta = 1) is a lower bound
    (dict(), 0.05),
    (dict(sampler="ddim"), 0.05),
    (dict(sampler="ddim", eta=1.0), 0.08),
    (dict(steps=20), 0.05),
]


@pytest.mark.parametrize("options, slack", CASES)
def test_the_exact_denoiser_samples_the_data(options, slack):
    n, mean, std = 40_000, 0.3, 0.5
    x = dgf.sample(exact(mean, std), (n, 1), S, 3, **options)
    assert abs(float(x.mean()) - mean) < 0.03 and abs(float(x.std()) - std) < slack


def test_samples_do_not_depend_on_their_batch():
    model = exact(0.0, 0.7)
    whole = dgf.sample(model, (9, 2), S, 5)
    parts = [dgf.sample(model, (b - a, 2), S, 5, first_sample=a) for a, b in ((0, 2), (2, 9))]
    assert torch.equal(torch.cat(parts), whole)


def test_the_network_is_told_the_original_step():
    told = []

    def model(x, t):
        told.append(int(t[0]))
        return torch.zeros_like(x)

    dgf.sample(model, (2, 2), S, 5, steps=4)
    assert told == [40, 30, 20, 10]


def test_on_step_sees_every_state():
    seen = []
    x = dgf.sample(exact(0, 1), (2, 2), S, 5, steps=3, on_step=lambda t, x: seen.append((t, x)))
    assert [t for t, _ in seen] == [3, 2, 1, 0] and torch.equal(seen[-1][1], x)


def test_dictionary_of_conditions_reaches_the_network():
    def model(x, t, *, shift):
        return x * 0 + shift

    a, b = (dgf.sample(model, (3, 2), S, 5, cond={"shift": s}) for s in (0.0, 0.1))
    assert not torch.equal(a, b)


def test_bad_arguments_are_named():
    with pytest.raises(ValueError, match="sampler must be"):
        dgf.sample(exact(0, 1), (2, 2), S, 5, sampler="heun")
    with pytest.raises(ValueError, match="steps must be"):
        dgf.sample(exact(0, 1), (2, 2), S, 5, steps=41)
    assert math.isfinite(float(dgf.sample(exact(0, 1), (1, 1), S, 5)))
