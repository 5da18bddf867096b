import math

import pytest
import torch

from diffgan_fast.adversarial import critic_loss, generator_loss

REAL, FAKE = torch.tensor([2.0, -1.0], dtype=torch.float64), torch.tensor([0.5, -3.0], dtype=torch.float64)


def sigmoid(v):
    return 1 / (1 + math.exp(-v))


def mean(values):
    return sum(values) / len(values)


WANT = {
    "nonsaturating": (
        mean([-math.log(sigmoid(v)) for v in REAL]) + mean([-math.log(1 - sigmoid(v)) for v in FAKE]),
        mean([-math.log(sigmoid(v)) for v in FAKE]),
    ),
    "hinge": (mean([max(0, 1 - v) for v in REAL]) + mean([max(0, 1 + v) for v in FAKE]), -mean(FAKE)),
    "lsgan": (
        mean([0.5 * (v - 1) ** 2 for v in REAL]) + mean([0.5 * v**2 for v in FAKE]),
        mean([0.5 * (v - 1) ** 2 for v in FAKE]),
    ),
    "wgan": (mean(FAKE) - mean(REAL), -mean(FAKE)),
}
WANT["saturating"] = (WANT["nonsaturating"][0], mean([math.log(1 - sigmoid(v)) for v in FAKE]))


@pytest.mark.parametrize("kind", WANT)
def test_follow_the_formulas(kind):
    assert math.isclose(float(critic_loss(REAL, FAKE, kind)), float(WANT[kind][0]), rel_tol=1e-12)
    assert math.isclose(float(generator_loss(FAKE, kind)), float(WANT[kind][1]), rel_tol=1e-12)


def test_extreme_logits_stay_finite_with_gradients():
    for kind in WANT:
        logits = torch.tensor([-1e4, 1e4], requires_grad=True)
        total = critic_loss(logits, -logits, kind) + generator_loss(logits, kind)
        assert torch.isfinite(total) and torch.isfinite(torch.autograd.grad(total, logits)[0]).all()


def test_unknown_losses_are_named():
    with pytest.raises(ValueError, match="gan_loss must be one of nonsaturating"):
        critic_loss(REAL, FAKE, "bce")


def test_weights_of_samples_do_not_mix_them():
    weight, fake = torch.tensor([0.0, 1.0, 2.0]), torch.randn(3, 1)
    want = (weight * torch.nn.functional.softplus(-fake[:, 0])).mean()
    for logits in (fake, fake[:, 0]):
        torch.testing.assert_close(generator_loss(logits, weight=weight), want)
    with pytest.raises(ValueError, match=r"weight must be \[N\] = \[3\]"):
        generator_loss(fake, weight=weight[:2])
