"""The oracle's closed forms, against autograd and against plain simulation."""

import pytest
import torch

from tests import mixture

THREE = mixture.Mixture((0.5, 0.3, 0.2), ((-1.0, 0.3), (0.7, 0.9), (0.2, -1.4)), (0.04, 0.25, 0.5))
OTHER = mixture.two_gaussians(0.3, (-0.5, 0.0), (1.0, 1.0), 0.6)


def test_scores_are_the_gradients_of_the_log_densities():
    abar = torch.tensor([1.0, 0.9, 0.5, 0.1, 1e-4], dtype=torch.float64)
    x = torch.randn(5, 2, dtype=torch.float64, requires_grad=True)
    for p in (THREE, OTHER, mixture.gaussians25(0.5)):
        (want,) = torch.autograd.grad(p.log_density(x, abar).sum(), x)
        torch.testing.assert_close(p.score(x, abar), want, rtol=1e-12, atol=1e-12)
        part = abar[1:, None]  # Tweedie: x = sqrt(abar) E[x_0 | x] + sqrt(1 - abar) E[eps | x]
        again = part.sqrt() * p.x0(x[1:], abar[1:]) + (1 - part).sqrt() * p.eps(x[1:], abar[1:])
        torch.testing.assert_close(again, x[1:], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("abar", (0.9, 0.3))
def test_the_noised_law_and_the_best_predictions(abar):
    """Errors of conditional means are orthogonal to every function of x_t; the best critic is the ratio of laws."""
    n = 200_000
    x0, eps = THREE.sample(n, 1), torch.randn(n, 2, dtype=torch.float64)
    x = abar**0.5 * x0 + (1 - abar) ** 0.5 * eps
    v = abar**0.5 * eps - (1 - abar) ** 0.5 * x0

    def zero(samples):
        assert (samples.mean(0).abs() < 4 * samples.std(0) / n**0.5).all()

    centred = x - THREE.mean(abar)
    zero(centred)
    zero((centred[:, :, None] * centred[:, None] - THREE.cov(abar)).flatten(1))
    features = torch.cat((torch.ones(n, 1), x, x.sin(), (2 * x).cos(), x.prod(1, keepdim=True).tanh()), 1)
    for truth, best in ((x0, THREE.x0(x, abar)), (eps, THREE.eps(x, abar)), (v, THREE.v(x, abar))):
        zero(((truth - best)[:, :, None] * features[:, None]).flatten(1))
    ratio = (OTHER.log_density(x, abar) - THREE.log_density(x, abar)).exp()  # its mean under p is q's total, 1
    zero(ratio - 1)
    zero(ratio[:, None] * x - OTHER.mean(abar))
