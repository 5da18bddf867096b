import math

import numpy as np
import pytest
import torch

from diffgan_fast import Schedule
from tests.ops import oracle

VP = {  # Denoising Diffusion GAN's tables; review and facts §B.1, computed independently of this code
    1: dict(beta=[0.999957]),
    2: dict(beta=[0.921324, 0.999451], c1=[1, 0.280350], c2=[0, 0.021588], var=[0, 0.920858]),
    4: dict(
        beta=[0.478255, 0.849206, 0.956418, 0.987404],
        abar=[0.521745, 0.0786760, 0.00342888, 0.0000431905],
        c1=[1, 0.665778, 0.269191, 0.057822],
        c2=[0, 0.201576, 0.193001, 0.111852],
        var=[0, 0.440819, 0.884202, 0.984061],
    ),
    8: dict(
        beta=[0.156445, 0.381493, 0.546501, 0.667488, 0.756197, 0.82124, 0.86893, 0.903898],
        c1=[1, 0.7326274, 0.5170993, 0.3524098, 0.2162555, 0.1141307, 0.0509045, 0.0191631],
        c2=[0, 0.2572616, 0.4218925, 0.4777906, 0.4638135, 0.4161173, 0.3609563, 0.3098778],
        var=[0, 0.1247926, 0.3423771, 0.553066, 0.7103275, 0.8082587, 0.8663402, 0.9035305],
    ),
}


@pytest.mark.parametrize("T", VP)
def test_ddgan_goldens(T):
    s = Schedule.vp(T)
    tables = dict(
        beta=s.betas,
        abar=s.alphas_cumprod,
        c1=s.posterior_mean_coef1,
        c2=s.posterior_mean_coef2,
        var=s.posterior_variance,
    )
    for name, want in VP[T].items():
        assert np.abs(tables[name][1:].numpy() - want).max() < 1e-6, name


def test_linear_tables_follow_the_definitions():
    s, (beta, alpha, abar) = Schedule.linear(300), oracle.linear_schedule(300)
    assert np.abs(s.betas.numpy() - beta).max() < 1e-15 and np.abs(s.alphas.numpy() - alpha).max() < 1e-15
    assert np.abs(s.alphas_cumprod.numpy() - abar).max() < 1e-14
    assert s.alphas_cumprod[0] == 1 and s.posterior_variance[:2].tolist() == [0, 0]
    assert s.posterior_mean_coef1[:2].tolist() == [1, 1] and s.posterior_mean_coef2[1] == 0
    assert np.allclose(s.snr[1:], abar[1:] / (1 - abar[1:]), rtol=1e-12) and math.isinf(s.snr[0])
    assert s.betas.dtype == torch.float64


def test_posterior_agrees_with_bayes():
    """q(x_{t-1} | x_t, x_0) from the product of the two Gaussians, by precisions."""
    s = Schedule.cosine(40)
    for t in range(2, 41):
        a, before, beta = float(s.alphas[t]), float(s.alphas_cumprod[t - 1]), float(s.betas[t])
        precision = a / beta + 1 / (1 - before)
        assert math.isclose(float(s.posterior_variance[t]), 1 / precision, rel_tol=1e-9)
        assert math.isclose(
            float(s.posterior_mean_coef1[t]), math.sqrt(before) / (1 - before) / precision, rel_tol=1e-9
        )
        assert math.isclose(float(s.posterior_mean_coef2[t]), math.sqrt(a) / beta / precision, rel_tol=1e-9)


def test_published_levels():
    assert abs(math.sqrt(Schedule.linear(300).alphas_cumprod[-1]) - 0.219) < 5e-4
    for T, level in ((10, 0.90374), (100, 0.36356), (500, 0.00635), (1000, 4.0e-5)):
        assert math.isclose(float(Schedule.linear(T).alphas_cumprod[-1]), level, rel_tol=1e-2)
    assert abs(float(Schedule.quadratic(100).alphas_cumprod[-1]) - 0.4846) < 1e-4
    assert abs(float(Schedule.linear_scaled(300).alphas_cumprod[-1]) - 3.4e-5) < 1e-6


def test_cosine_follows_the_paper():
    s, T = Schedule.cosine(1000), 1000

    def f(t):
        return math.cos((t / T + 0.008) / 1.008 * math.pi / 2) ** 2

    for t in (1, 10, 500, 900):
        assert math.isclose(float(s.alphas_cumprod[t]), f(t) / f(0), rel_tol=1e-9)
    assert float(s.betas.max()) == 0.999


def test_respacing_keeps_the_levels_and_the_names():
    full = Schedule.linear(1000)
    short = full.respace(50)
    assert short.T == 50 and short.timesteps[0] == 0 and short.timesteps[-1] == 1000
    assert torch.allclose(short.alphas_cumprod, full.alphas_cumprod[short.timesteps], rtol=1e-10)
    assert torch.equal(short.respace(10).timesteps, torch.arange(0, 1001, 100))
    assert torch.allclose(Schedule.vp(8).respace(4).betas, Schedule.vp(4).betas, rtol=1e-9)
    assert torch.allclose(full.respace(1000).betas, full.betas, atol=1e-12)


def test_matches_diffusers():
    diffusers = pytest.importorskip("diffusers")
    theirs = diffusers.DDPMScheduler(num_train_timesteps=300, beta_schedule="linear")
    assert torch.allclose(Schedule.linear(300).alphas_cumprod[1:].float(), theirs.alphas_cumprod, rtol=1e-4)


@pytest.mark.parametrize("bad", [0, -1, 1.5, True, "10"])
def test_bad_lengths_are_named(bad):
    with pytest.raises(ValueError, match="T must be"):
        Schedule.linear(bad)
    with pytest.raises(ValueError, match="steps must be"):
        Schedule.linear(10).respace(bad)


def test_bad_betas_are_named():
    for betas in ([], [0.1, 1.0], [0.0], [[0.1]]):
        with pytest.raises(ValueError, match="betas must"):
            Schedule.from_betas(betas)


def test_rows_are_built_once():
    s, like = Schedule.linear(5), torch.ones(1)
    a = s.rows("x", like, lambda s: s.betas)
    assert a.dtype == torch.float32 and s.rows("x", like, lambda s: s.alphas) is a
    assert s.rows("x", like.double(), lambda s: s.betas).dtype == torch.float64
