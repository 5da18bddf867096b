"""Diffusion-GAN against its algorithm written out in plain torch."""

import copy

import pytest
import torch
from torch import nn

import diffgan_fast as dgf
from diffgan_fast import nets
from diffgan_fast.engine import Batch, State
from diffgan_fast.methods import diffusion_gan
from diffgan_fast.methods.diffusion_gan import BehindNoise
from tests.methods.by_hand import adam, bce

METHOD = dgf.methods.find("diffusion-gan")
SMALL = dict(width=8, critic_width=8, batch_size=16, log_every=2, sample_every=0, checkpoint_every=0, progress=False)
TOLD = ("none", "plane", "concat", "projection", "mapping")


def make(shape=(2,), given=None, **options):
    method = METHOD(METHOD.Config(**{"width": 4, "critic_width": 4, "z_dim": 5, **options}), shape)
    networks = method.networks(given or {})
    return method, State(networks, method.optimizers(networks), method.averaged, method.config)


def folded(key, name):
    return dgf.random.fold_in(key, name)


@pytest.mark.parametrize("variant, r1_gamma", [("paper", 0.0), ("paper", 0.7), ("as-coded", 0.0), ("as-coded", 0.7)])
def test_steps_are_those_of_the_algorithm(variant, r1_gamma):
    """Six steps of plain torch. Paper: critic, then generator, with the reals' t for the fakes. Code: the generator
    first, each on its own z, and every t by itself. Both update T last. R1 is of clean samples, through the noise that
    the critic has just seen, in every second step and twice as heavy."""
    coded = variant == "as-coded"
    # T grows at once: all logits are above the threshold, which does not hang on how those near 0 are rounded
    options = dict(lr=1e-3, critic_lr=5e-4, ada_kimg=0.5, sigma=0.3, threshold=-5.0, r1_gamma=r1_gamma, r1_every=2)
    method, state = make(variant=variant, **options)
    generator, critic, d = (copy.deepcopy(state[name]) for name in ("generator", "critic", "diffusion"))
    g_adam, d_adam = adam(generator, 1e-3), adam(critic, 5e-4)

    def judged(x, t, key):
        y, t = d(x, t, key)
        return critic(y, t=t, level=d.level(t)), t

    for key in range(6):
        x0, state.step = torch.randn(16, 2), key
        logged = method.step(state, Batch(x0), key)

        def train_generator(fake, key=key):
            loss = bce(judged(fake, None, folded(key, "generator"))[0], 1.0)
            g_adam.zero_grad()
            loss.backward()
            g_adam.step()
            return loss

        fake = generator(dgf.random.normal((16, 5), folded(key, "z")))
        if coded:
            g_loss = train_generator(fake)
            fake = generator(dgf.random.normal((16, 5), folded(key, "z of the critic")))
        on_real, t = judged(x0, None, folded(key, "real"))
        on_fake, _ = judged(fake.detach(), None if coded else t, folded(key, "fake"))
        d_loss = bce(on_real, 1.0) + bce(on_fake, 0.0)
        total = d_loss
        if r1_gamma and key % 2 == 0:
            clean = x0.clone().requires_grad_()
            logits, _ = judged(clean, t, folded(key, "real"))
            (slope,) = torch.autograd.grad(logits.sum(), clean, create_graph=True)
            total = d_loss + 2 * r1_gamma / 2 * slope.square().sum(1).mean()
        d_adam.zero_grad()
        total.backward()
        d_adam.step()
        if not coded:
            g_loss = train_generator(fake)
        want = {"critic_loss": d_loss, "generator_loss": g_loss, "p": d.p, "T": d.T}
        want |= {"real_logit": on_real.mean(), "fake_logit": on_fake.mean()}
        torch.testing.assert_close(logged, want)
        d.update(on_real.detach(), folded(key, "levels"))
    assert int(d.T) > 50
    # as coded the mapping network's weights have gradients so small that Adam makes steps of their rounding
    tolerance = 3e-3 if coded else 5e-6
    for name, net in (("generator", generator), ("critic", critic)):
        torch.testing.assert_close(state[name].state_dict(), net.state_dict(), rtol=0, atol=tolerance, msg=name)
    assert torch.equal(state["diffusion"].slots, d.slots)


def test_losses_serve_a_loop_of_ones_own():
    _, state = make(condition="plane")
    generator, critic, d = (state[name] for name in ("generator", "critic", "diffusion"))
    x0, z = torch.randn(6, 2), torch.randn(6, 5)
    loss, fooled, (on_real, on_fake) = diffusion_gan.losses(generator, critic, d, x0, z, 3)
    y, t = d(x0, key=folded(3, "real"))
    g, _ = d(generator(z), t, key=folded(3, "fake"))
    torch.testing.assert_close(on_real, critic(y, level=d.level(t)))
    torch.testing.assert_close(on_fake, critic(g, level=d.level(t)))
    torch.testing.assert_close(loss, bce(on_real, 1.0) + bce(on_fake, 0.0))
    loss.backward()
    assert all(p.grad is None for p in generator.parameters())
    before = [p.grad.clone() for p in critic.parameters()]
    fooled().backward()
    assert all(p.grad.abs().sum() > 0 for p in generator.parameters())
    assert all(torch.equal(p.grad, g) and p.requires_grad for p, g in zip(critic.parameters(), before, strict=True))


def test_the_penalty_is_of_the_clean_image_through_the_noise():
    """|grad_x D(sqrt(abar) x + …)|² carries abar: for a linear critic it is abar_t |w|²."""

    class Linear(nn.Module):
        def __init__(self):
            super().__init__()
            self.w = nn.Parameter(torch.tensor([3.0, 4.0]))

        def forward(self, x, **_):
            return x @ self.w

    d, critic = dgf.AdaptiveDiffusion(T_min=100, T_max=100), Linear()
    t = torch.tensor([0, 100, 100, 50])
    got = dgf.ops.r1_penalty(BehindNoise(critic, d), torch.randn(4, 2), t=t, key=4)
    abar = 1 - d.level(t) ** 2
    torch.testing.assert_close(got, 25 * abar.mean())
    (g,) = torch.autograd.grad(got, critic.w)
    torch.testing.assert_close(g, 2 * critic.w.detach() * abar.mean())
    with pytest.raises(ValueError, match="BatchNorm2d.*normalises by the batch"):
        noisy = BehindNoise(nets.DCGANCritic(1, 8, width=4), d)
        dgf.ops.r1_penalty(noisy, torch.randn(4, 1, 8, 8), t=t, key=4)


@pytest.mark.parametrize(
    "network, shape", [("mlp", (2,)), ("dcgan", (1, 8, 8)), ("sngan", (3, 8, 8)), ("stylegan2", (3, 8, 8))]
)
@pytest.mark.parametrize("condition", TOLD)
def test_every_network_is_told_in_every_way(network, shape, condition):
    method, state = make(shape, network=network, condition=condition)
    x = torch.rand(1, *shape).expand(4, *shape).contiguous()
    critic = state["critic"].eval()
    out = critic(x, t=torch.arange(4), level=torch.linspace(0, 1, 4))
    spread = float((out.max() - out.min()).detach())  # an MLP's last rows are rounded in another way
    assert out.shape == (4,) and (spread < 1e-6) == (condition == "none")
    logged = method.step(state, Batch(torch.rand(8, *shape)), 1)
    assert all(v.isfinite() for v in logged.values())
    assert any("parametrizations" in k for k in critic.state_dict()) == (network == "sngan")


def test_a_users_own_critic_takes_what_it_wants():
    class Own(nn.Module):
        def __init__(self):
            super().__init__()
            self.main, self.told = nn.Linear(3, 1), []

        def forward(self, y, level, **_):
            self.told.append(level)
            return self.main(torch.cat((y, level[:, None]), 1)).flatten()

    own = Own()
    method, state = make(given={"critic": own})
    method.step(state, Batch(torch.randn(8, 2)), 1)
    assert state["critic"] is own and torch.equal(own.told[0], own.told[1]) and len(own.told) == 3


def test_options_reach_the_noiser():
    _, state = make(noise="pixel-priority", sigma=0.2, T_min=7, mixing="uniform", noise_schedule="fixed", d_target=0.1)
    text = repr(state["diffusion"])
    for part in ("T=7..1000", "uniform", "sigma=0.2", "fixed", "d_target=0.1"):
        assert part in text
    _, state = make(variant="as-coded")
    assert "T=10..1000" in repr(state["diffusion"]) and state["critic"].embedding.as_coded
    assert [tuple(layer.weight.shape) for layer in state["critic"].mapping] == 8 * [(512, 512)]


class Constant(nn.Module):
    """A critic that gives every sample the same."""

    def __init__(self, output):
        super().__init__()
        self.output = nn.Parameter(torch.tensor(output))

    def forward(self, y, **_):
        return self.output + 0 * y.flatten(1).sum(1)


@pytest.mark.parametrize("gan_loss, threshold, output, grows", [
    ("lsgan", None, 0.7, True), ("lsgan", None, 0.3, False), ("lsgan", 0.2, 0.3, True),
    ("hinge", None, 0.3, True), ("hinge", None, -0.3, False), ("wgan", 2.0, 3.0, True), ("wgan", 2.0, 1.0, False),
])  # fmt: skip
def test_T_grows_where_the_critic_is_sure_of_real_samples(gan_loss, threshold, output, grows):
    options = dict(gan_loss=gan_loss, threshold=threshold, ada_kimg=0.1, critic_lr=1e-6)
    method, state = make(given={"critic": Constant(output)}, **options)
    state["diffusion"].p.fill_(0.5)
    for key in range(4):
        method.step(state, Batch(torch.randn(8, 2)), key)
    assert float(state["diffusion"].p) == pytest.approx(0.5 + (0.32 if grows else -0.32))


def test_a_wasserstein_critic_needs_a_threshold_unless_T_is_fixed():
    message = "threshold must be a number for gan_loss='wgan'.*unless T_min is T_max; got None"
    with pytest.raises(ValueError, match=message):
        make(gan_loss="wgan")
    for options in (dict(threshold=0.0), dict(T_min=500), dict(T_min=9, T_max=9)):
        make(gan_loss="wgan", **options)


@pytest.mark.parametrize("shape", [(2,), (3, 8, 8)])
def test_features_as_coded_have_a_level_a_channel_that_the_critic_is_not_told(shape):
    options = dict(variant="as-coded", noise="feature", ada_kimg=0.01, critic_norm="none", r1_gamma=1.0, r1_every=1)
    method, state = make(shape, d_target=-1.0, **options)
    for key in range(8):
        logged = method.step(state, Batch(torch.rand(8, *shape)), key)
    assert all(v.isfinite() for v in logged.values()) and float(logged["p"]) > 0
    assert state["diffusion"].per_channel
    with pytest.raises(ValueError, match="condition must be auto or none where each channel.*; got 'concat'"):
        make(shape, condition="concat", **options)


def test_resuming_is_exact_and_the_page_shows_T(tmp_path):
    options = SMALL | dict(checkpoint_every=5, ada_kimg=0.2, d_target=-1.0)
    whole = dgf.train("diffusion-gan", out=tmp_path / "whole", steps=12, **options)

    def stop(run, row):
        if row["step"] == 6:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        dgf.train("diffusion-gan", out=tmp_path / "cut", steps=12, callbacks=[stop], **options)
    cut = dgf.train("diffusion-gan", out=tmp_path / "cut", steps=12, resume=True, **options)
    for name in ("generator", "critic", "diffusion"):
        torch.testing.assert_close(cut.state[name].state_dict(), whole.state[name].state_dict(), rtol=0, atol=0)
    timeless = [[{k: v for k, v in row.items() if k != "seconds"} for row in run.history] for run in (cut, whole)]
    assert timeless[0] == timeless[1] and timeless[0][-1]["T"] > 100 and timeless[0][-1]["images_seen"] == 192
    assert torch.equal(dgf.load(tmp_path / "cut").sample(5), whole.sample(5))
    html = (tmp_path / "whole" / "report.html").read_text()
    assert "Critic&#x27;s logits" in html and "Largest noise level T" in html


def test_few_data(tmp_path):
    run = dgf.train("diffusion-gan", "moons", tmp_path, subset=20, steps=3, **SMALL)
    assert run.history[-1]["step"] == 3
    a, b = (dgf.data.load("moons", subset=20).values for _ in range(2))
    assert torch.equal(a, b) and len(a) == 20


def test_what_a_critic_cannot_be_told():
    with pytest.raises(ValueError, match="condition must be auto, none, concat, .* as coded.*got 'plane'"):
        make(variant="as-coded", condition="plane")
    own = nets.MLPCritic(2, 8, 2)
    with pytest.raises(ValueError, match=r"condition must be auto for a critic of your own.*got 'projection'"):
        make(given={"critic": own}, condition="projection")
