import math

import pytest
import torch

import diffgan_fast as dgf
from tests import mixture

S = dgf.Schedule.linear_scaled(40)


def exact(mean, std):
    """The best denoiser for N(mean, std^2): eps* = sqrt(1-abar) (x - sqrt(abar) mean) / (abar std^2 + 1 - abar)."""

    def model(x, t):
        a = S.alphas_cumprod[t].to(x.dtype).view(-1, 1)
        return (1 - a).sqrt() * (x - a.sqrt() * mean) / (a * std**2 + 1 - a)

    return model


def law(sd, schedule, *, sampler="ddpm", steps=None, eta=0.0, variance="beta"):
    """Mean and standard deviation of what the best denoiser for N(1, sd^2) samples in steps of finite size.

    Every step is x' = sqrt(b) x0 + sqrt(1 - b - s^2) eps + noise from level a to level b, linear in x.
    """
    T, mean, var = schedule.T, 0.0, 1.0
    kept = [round(i * T / steps) for i in range(steps + 1)] if steps else range(T + 1)
    abar = schedule.alphas_cumprod[list(kept)].tolist()
    for a, b in zip(abar[:0:-1], abar[-2::-1], strict=True):
        posterior = (1 - a / b) * (1 - b) / (1 - a)  # eta = 1
        s2 = posterior if sampler == "ddpm" else eta**2 * posterior
        by_x0, by_eps = a**0.5 * sd**2, (1 - a) ** 0.5  # times (x - sqrt(a)) / (variance of x_t)
        slope = (b**0.5 * by_x0 + (1 - b - s2) ** 0.5 * by_eps) / (a * sd**2 + 1 - a)
        added = 1 - a / b if sampler == "ddpm" and variance == "beta" else s2
        mean = b**0.5 + slope * (mean - a**0.5)
        var = slope**2 * var + (added if b < 1 else 0)  # no noise in the last step
    return mean, var**0.5


SAMPLERS = [
    dict(),
    dict(variance="posterior"),
    dict(sampler="ddim"),
    dict(sampler="ddim", eta=0.7),
    dict(sampler="ddim", eta=1.0),
    dict(steps=25),
    dict(sampler="ddim", steps=25),
    dict(sampler="ddim", steps=25, eta=1.0),
]


@pytest.mark.parametrize("prediction", ("eps", "x0", "v"))
@pytest.mark.parametrize("options", SAMPLERS, ids=str)
def test_gaussian_data_have_the_law_of_their_steps(options, prediction):
    n, sd, schedule = 50_000, 0.2, dgf.Schedule.cosine(40)
    model = mixture.denoiser(mixture.gaussian((1.0,), sd), schedule, prediction)
    x = dgf.sample(model, (n, 1), schedule, 3, prediction=prediction, **options)
    mean, std = law(sd, schedule, **options)
    assert abs(float(x.mean()) - mean) < 4 * std / n**0.5
    assert abs(float(x.std()) - std) < 4 * std / (2 * n) ** 0.5


def check_mixture(p, x, sd, slack=0.0):
    """x comes from p, with modes of standard deviation sd: chi-squared of their weights, their means and spread.

    slack: of the spread, for the few points that deterministic steps leave between modes.
    """
    n, dof = len(x), len(p.weights) - 1
    chi2 = n * ((p.modes(x)[0] - p.weights) ** 2 / p.weights).sum()
    assert float(chi2) < dof + 4 * (2 * dof) ** 0.5
    away = (x - p.means[p.component(x)]) / sd
    assert (away.mean(0).abs() < 4 / n**0.5).all()
    assert ((away**2).mean(0).sqrt() - 1).abs().max() < 4 / (2 * n) ** 0.5 + slack


MANY = [dict(), dict(variance="posterior"), dict(sampler="ddim"), dict(sampler="ddim", eta=1.0)]
FEWER = [dict(steps=100), dict(sampler="ddim", steps=100), dict(sampler="ddim", steps=100, eta=1.0)]


@pytest.mark.parametrize("options", MANY + FEWER, ids=str)
def test_25_gaussians_of_unequal_weights(options):
    schedule = dgf.Schedule.cosine(200)
    p = mixture.gaussians25(0.35, torch.arange(1, 26))
    x = dgf.sample(mixture.denoiser(p, schedule), (3000, 2), schedule, 7, **options)
    deterministic = options.get("sampler") == "ddim" and "eta" not in options
    check_mixture(p, x, law(0.05 * 0.35, schedule, **options)[1], slack=0.1 if deterministic else 0.0)


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
