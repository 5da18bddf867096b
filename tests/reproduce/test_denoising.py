"""The parts of the picture of a denoising step, against closed forms of a Gaussian mixture."""

import pytest
import torch
from scipy import stats

import diffgan_fast as dgf
from diffgan_fast.reproduce.denoising import compared, gaussian_step, true_step
from tests import mixture

S = dgf.Schedule.vp(4)


def test_bayes_from_points_is_that_of_their_law():
    """x_{t-1} of a mixture's points against the closed form: x_0 given x_t, then the posterior."""
    p, t, n = mixture.two_gaussians(0.7, (-2.0, 0.5), (1.5, 0.0), 0.3), 2, 20_000
    x_t = torch.tensor([0.1, 0.2])
    got = true_step(p.sample(40_000, 1).float(), x_t, t, S, n, 3).double()
    x = x_t.double().expand(n, -1)
    x0 = mixture.generator(p, S)(x, torch.full((n,), t), torch.randn(n, 3, dtype=torch.float64))
    c1, c2, var = (float(table[t]) for table in (S.posterior_mean_coef1, S.posterior_mean_coef2, S.posterior_variance))
    want = c1 * x0 + c2 * x + var**0.5 * torch.randn(n, 2, dtype=torch.float64)
    for axis in (0, 1):
        assert stats.ks_2samp(got[:, axis].numpy(), want[:, axis].numpy()).pvalue > 1e-3
    assert stats.ks_2samp((got @ x_t.double()).numpy(), (want @ x_t.double()).numpy()).pvalue > 1e-3


def test_of_one_point_the_step_is_the_posterior():
    got = true_step(torch.tensor([[1.0, -2.0]]), torch.tensor([0.3, 0.4]), 1, S, 5, 3)
    assert torch.equal(got, torch.tensor([[1.0, -2.0]]).expand(5, 2))


def test_the_gaussian_has_the_moments():
    truth = torch.randn(30_000, 2) @ torch.tensor([[1.0, 0.6], [0.0, 0.2]]) + torch.tensor([3.0, -1.0])
    got = gaussian_step(truth, 5)
    assert (got.mean(0) - truth.mean(0)).abs().max() < 0.03
    assert (got.T.cov() - truth.T.cov()).abs().max() < 0.03
    assert stats.kstest(((got[:, 0] - truth[:, 0].mean()) / truth[:, 0].std()).numpy(), "norm").pvalue > 1e-3


@pytest.mark.parametrize("data", ["ring", "gaussians25"])
def test_true_draws_are_as_far_from_each_other_as_samples_of_one_law(data, tmp_path):
    """At t = 1 too, where x_0 itself is drawn, and a point that is drawn twice spoils a divergence."""
    options = dict(preset="points", width=8, critic_width=8, steps=1, sample_every=0, progress=False)
    found = compared(dgf.train("ddgan", data, tmp_path / "run", **options), 5000)
    assert list(found) == [f"t = {t}" for t in (4, 3, 2, 1)]
    assert all(abs(step["kl"]["floor"]) < 0.08 for step in found.values())
    assert found["t = 1"]["kl"]["ddgan"] > 0.3
