"""Methods 3 and 3.5 against the algorithm written out by hand."""

import pytest
import torch
from torch import nn

import diffgan_fast as dgf
from diffgan_fast import adversarial
from tests.ops import oracle

S = dgf.Schedule.linear(300)


class Denoiser(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(1, 1, 3, padding=1)

    def forward(self, x, t):
        return self.conv(x)


class Critic(nn.Module):
    """Linear in what it sees, so that its logits can be written down."""

    def __init__(self, size):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(size))
        self.seen = []

    def forward(self, x, t=None, x_t=None):
        self.seen.append((x.requires_grad, t, x_t))
        return x.flatten(1) @ self.weight


@pytest.mark.parametrize("module", [dgf.methods.method3, dgf.methods.method35])
def test_losses_follow_the_algorithm(module):
    torch.manual_seed(0)
    denoiser, critic = Denoiser(), Critic(25)
    x0, t = torch.randn(4, 1, 5, 5), torch.tensor([1, 20, 150, 300])
    loss, denoiser_loss = module.losses(denoiser, critic, x0, t, S, 11, mse_weight=0.5)

    eps = torch.tensor(oracle.normal(100, 11), dtype=torch.float32).view(4, 1, 5, 5)
    abar = torch.tensor(oracle.linear_schedule(300)[2])[t].float().view(-1, 1, 1, 1)
    eps_hat = denoiser(abar.sqrt() * x0 + (1 - abar).sqrt() * eps, t)
    real, fake = eps.flatten(1) @ critic.weight, eps_hat.flatten(1) @ critic.weight
    want = -torch.sigmoid(real).log().mean() - (1 - torch.sigmoid(fake)).log().mean()
    assert torch.allclose(loss, want, rtol=1e-4)
    want = -torch.sigmoid(fake).log().mean() + 0.5 * (eps_hat - eps).square().mean()
    assert torch.allclose(denoiser_loss(), want, rtol=1e-4)


def test_the_critics_loss_does_not_reach_the_denoiser():
    denoiser, critic = Denoiser(), Critic(25)
    loss, denoiser_loss = dgf.methods.method3.losses(
        denoiser, critic, torch.randn(4, 1, 5, 5), torch.tensor([9] * 4), S, 1
    )
    loss.backward()
    assert denoiser.conv.weight.grad is None and critic.weight.grad is not None
    denoiser_loss().backward()
    assert denoiser.conv.weight.grad.abs().sum() > 0


def test_the_denoisers_loss_uses_the_updated_critic():
    denoiser, critic = Denoiser(), Critic(25)
    _, denoiser_loss = dgf.methods.method3.losses(
        denoiser, critic, torch.randn(4, 1, 5, 5), torch.tensor([9] * 4), S, 1
    )
    before = float(denoiser_loss())
    with torch.no_grad():
        critic.weight.mul_(-3)
    assert float(denoiser_loss()) != before


def test_what_each_critic_is_built_to_see():
    for name, inputs, count in (
        ("method3", "eps", 661_248),
        ("method3.5", "eps,t", 662_272),
        ("method3.5", "eps,x_t,t", 663_296),
    ):
        kind = dgf.methods.find(name)
        config = kind.Config.make("student", inputs=inputs)
        critic = kind(config, (1, 28, 28)).networks({"denoiser": Denoiser()})["critic"]
        assert sum(p.numel() for p in critic.parameters()) == count
    student = dgf.methods.find("ddpm")
    net = student(student.Config.make("student"), (1, 28, 28)).networks({})["denoiser"]
    assert sum(p.numel() for p in net.parameters()) == 1_737_153


def test_the_presets_are_the_documents_settings():
    for name in ("method3", "method3.5"):
        config = dgf.methods.find(name).Config.make("paper")
        assert (config.lr, config.critic_lr, config.batch_size, config.T) == (1e-5, 1e-4, 128, 300)
        assert (config.beta_1, config.beta_T, config.mse_weight) == (1e-4, 0.02, 0.0)
    optimizers = dgf.methods.find("method3")(config, (1, 28, 28)).optimizers(
        {"denoiser": Denoiser(), "critic": Critic(4)}
    )
    assert optimizers["critic"].param_groups[0]["betas"] == (0.5, 0.999)
    base = dgf.methods.find("ddpm").Config.make("student")
    assert (base.lr, base.data_range, base.variance, base.network) == (1e-3, "unit", "beta", "student")


def test_a_critic_of_noise_alone_learns_to_tell_a_perfect_denoiser():
    """For N(0, 1) data the best prediction sqrt(1 - abar) x_t has variance 1 - abar < 1: its size gives it away."""
    t, n = 60, 512
    abar = float(S.alphas_cumprod[t])
    # (a DCGAN critic could not: without biases or with batch norm its sign does not depend on the size of its input)
    critic = nn.Sequential(nn.Flatten(), nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 1))
    optimizer = torch.optim.Adam(critic.parameters(), 3e-3)
    for step in range(150):
        x_t, eps = dgf.ops.add_noise(torch.randn(n, 1, 8, 8), t, S, step, return_noise=True)
        real, fake = critic(eps), critic((1 - abar) ** 0.5 * x_t)
        loss = adversarial.critic_loss(real, fake)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    right = ((real > 0).float().mean() + (fake < 0).float().mean()) / 2
    assert right > 0.95
