"""The plain GAN against its algorithm written out in plain torch."""

import copy

import pytest
import torch
from torch import nn

import diffgan_fast as dgf
from diffgan_fast import nets, random
from diffgan_fast.engine import Batch, State
from tests.ops import oracle

SMALL = dict(width=8, critic_width=8, batch_size=16, log_every=2, sample_every=0, checkpoint_every=0, progress=False)
GAN = dgf.methods.find("gan")


def make(shape=(1, 8, 8), given=None, **options):
    """The method and its state."""
    method = GAN(GAN.Config(**{"width": 4, "critic_width": 4, **options}), shape)
    networks = method.networks(given or {})
    return method, State(networks, method.optimizers(networks), method.averaged, method.config)


def gradient(loss, net):
    return torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(net.parameters()), retain_graph=True)])


def test_losses_follow_the_algorithm():
    _, state = make((3, 10, 10))
    generator, critic = (state[name].double() for name in ("generator", "critic"))
    x0, z = torch.rand(6, 3, 10, 10, dtype=torch.float64) * 2 - 1, torch.randn(6, 100, dtype=torch.float64)
    loss, fooled, (on_real, on_fake) = dgf.methods.gan.losses(generator, critic, x0, z)
    fake = generator(z)
    torch.testing.assert_close((on_real, on_fake), (critic(x0), critic(fake)))

    want = -critic(x0).sigmoid().log().mean() - (1 - critic(fake.detach()).sigmoid()).log().mean()
    torch.testing.assert_close(loss, want)
    torch.testing.assert_close(gradient(loss, critic), gradient(want, critic))
    with torch.no_grad():
        critic.main[0].weight.mul_(-1)  # stands for the critic's update
    want = -critic(fake).sigmoid().log().mean()
    got = fooled()
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(gradient(got, generator), gradient(want, generator))

    loss, fooled, _ = dgf.methods.gan.losses(generator, critic, x0, z)
    loss.backward()
    assert all(p.grad is None for p in generator.parameters())
    before = [p.grad.clone() for p in critic.parameters()]
    fooled().backward()
    assert all(torch.equal(p.grad, g) and p.requires_grad for p, g in zip(critic.parameters(), before, strict=True))


def test_other_losses_are_the_named_ones():
    x0, z = torch.rand(4, 1, 8, 8), torch.randn(4, 3)
    generator, critic = lambda z: z.sum(1).view(-1, 1, 1, 1).expand(-1, 1, 8, 8), lambda x: x.sum((1, 2, 3))
    loss, fooled, _ = dgf.methods.gan.losses(generator, critic, x0, z, gan_loss="wgan")
    torch.testing.assert_close(loss, 64 * z.sum(1).mean() - x0.sum((1, 2, 3)).mean())
    torch.testing.assert_close(fooled(), -64 * z.sum(1).mean())


@pytest.mark.parametrize(
    "gan_loss, loss",
    [("nonsaturating", nn.BCEWithLogitsLoss()), ("lsgan", lambda *a: 0.5 * nn.functional.mse_loss(*a))],
)
def test_steps_are_those_of_plain_torch(gan_loss, loss):
    """Two steps: weights, running statistics and the count of forward passes that they hold."""
    method, state = make(lr=1e-3, critic_lr=5e-4, gan_loss=gan_loss)
    generator, critic = copy.deepcopy(state["generator"]), copy.deepcopy(state["critic"])
    g_optimizer = torch.optim.Adam(generator.parameters(), 1e-3, betas=(0.5, 0.999))
    d_optimizer = torch.optim.Adam(critic.parameters(), 5e-4, betas=(0.5, 0.999))
    for key in (7, 8):
        x0 = torch.rand(16, 1, 8, 8) * 2 - 1
        logged = method.step(state, Batch(x0), key)

        fake = generator(dgf.random.normal((16, 100), dgf.random.fold_in(key, "z")))
        on_real, on_fake = critic(x0), critic(fake.detach())
        d_loss = loss(on_real, torch.ones(16)) + loss(on_fake, torch.zeros(16))
        d_optimizer.zero_grad()
        d_loss.backward()
        d_optimizer.step()
        g_loss = loss(critic(fake), torch.ones(16))
        g_optimizer.zero_grad()
        g_loss.backward()
        g_optimizer.step()
        outputs = {"real_logit": on_real.mean(), "fake_logit": on_fake.mean()}
        torch.testing.assert_close(logged, {"critic_loss": d_loss, "generator_loss": g_loss, **outputs})
    for name, net in (("generator", generator), ("critic", critic)):
        torch.testing.assert_close(state[name].state_dict(), net.state_dict(), rtol=0, atol=2e-6, msg=name)
    assert generator.main[1].num_batches_tracked == 2  # one forward pass a step


class Recording(nn.Module):
    """A generator that remembers its latents, and whose images know no bounds."""

    def __init__(self):
        super().__init__()
        self.scale, self.seen = nn.Parameter(torch.ones(())), []

    def forward(self, z):
        self.seen.append(z)
        return (self.scale * z[:, :1]).view(-1, 1, 1, 1).expand(-1, 1, 8, 8)


def test_a_split_batch_sees_the_same_latents():
    generator = Recording()
    method, state = make(given={"generator": generator}, z_dim=5)
    x0 = torch.rand(7, 1, 8, 8)
    method.step(state, Batch(x0), 3)
    method.step(state, Batch(x0[:3]), 3)
    method.step(state, Batch(x0[3:], first_sample=3), 3)
    whole, *parts = generator.seen
    assert torch.equal(torch.cat(parts), whole)
    want = torch.tensor(oracle.normal(35, dgf.random.fold_in(3, "z")), dtype=torch.float32).view(7, 5)
    torch.testing.assert_close(whole, want, rtol=0, atol=5e-6)


def test_own_networks_are_taken():
    given = {"generator": Recording(), "critic": nets.DCGANCritic(1, 8, width=4, norm=None)}
    method, state = make(given=given)
    assert state.nets == given
    x = method.sample(state, 50, 1, ema=False)
    assert x.min() == -1 and x.max() == 1 and not x.requires_grad


def test_samples_are_numbered_and_change_nothing():
    generator = nets.DCGANGenerator(3, 8, width=4).to(memory_format=torch.channels_last)
    method, state = make((3, 8, 8), given={"generator": generator}, ema=0.5)
    for key in range(3):
        method.step(state, Batch(torch.rand(16, 3, 8, 8)), key)
    before = copy.deepcopy(state["generator"].state_dict())
    for ema in (True, False):
        whole = method.sample(state, 7, 5, ema=ema)
        assert whole.shape == (7, 3, 8, 8) and whole.dtype == torch.float32 and whole.is_contiguous()
        torch.testing.assert_close(method.sample(state, 3, 5, first=4, ema=ema), whole[4:])
        assert not torch.allclose(method.sample(state, 7, 6, ema=ema), whole)
    assert not torch.equal(method.sample(state, 7, 5), method.sample(state, 7, 5, ema=False))
    with pytest.raises(ValueError, match="labels must be None"):
        method.sample(state, 7, 5, labels=torch.zeros(7, dtype=torch.int64))
    assert state["generator"].training
    torch.testing.assert_close(state["generator"].state_dict(), before, rtol=0, atol=0)


def test_the_preset_is_the_published_configuration():
    config = GAN.Config.make("dcgan")
    assert config.steps * config.batch_size == 100 * 60_000
    assert (config.batch_size, config.lr, config.critic_lr, config.ema) == (64, 2e-4, 2e-4, 0)
    method = GAN(config, (1, 28, 28))
    networks = method.networks({})
    counts = {name: sum(p.numel() for p in net.parameters()) for name, net in networks.items()}
    assert counts == {"generator": 3_573_696, "critic": 661_248}
    for conv in (networks["generator"].main[3], networks["critic"].main[5]):
        assert float(conv.weight.detach().std()) == pytest.approx(0.02, rel=0.03)
    assert all(o.param_groups[0]["betas"] == (0.5, 0.999) for o in method.optimizers(networks).values())


@pytest.mark.parametrize("shape, network", [
    ((2,), "dcgan"), ((2,), "sngan"), ((1, 8, 10), "auto"), ((1, 9, 9), "auto"), ((1, 6, 6), "sngan"),
])  # fmt: skip
def test_other_data_are_refused(shape, network):
    with pytest.raises(ValueError, match="data must be square images"):
        make(shape, network=network)
    with pytest.raises(ValueError, match=r"data must be points \[N, D\] for method 'gan' with network='mlp'"):
        make((1, 8, 8), network="mlp")


def test_points_have_the_papers_networks():
    """Two layers of 128 with LeakyReLU, in both."""
    method, state = make((2,), z_dim=7, width=None, critic_width=None)
    for name, (first, last) in {"generator": (7, 2), "critic": (2, 1)}.items():
        linears = [layer for layer in state[name].main if isinstance(layer, nn.Linear)]
        assert [(layer.in_features, layer.out_features) for layer in linears] == [(first, 128), (128, 128), (128, last)]
        others = [layer for layer in state[name].main if not isinstance(layer, nn.Linear)]
        assert all(isinstance(layer, nn.LeakyReLU) for layer in others)
        x = torch.randn(5, first)
        torch.testing.assert_close(state[name](x).view(5, -1), state[name].main(x))
    assert method.sample(state, 50, 1).shape == (50, 2)


def test_the_lazy_penalty_counts_for_the_steps_without_one():
    method, state = make((2,), r1_gamma=0.5, r1_every=3, critic_width=None)
    weight = state["critic"].main[0].weight
    x0, seen = torch.randn(6, 2), []
    for step in range(4):
        state.step = step
        loss = method.penalised(state, torch.zeros(()), state["critic"], x0)
        seen.append(float(loss.detach()))
    x = x0.clone().requires_grad_()
    (g,) = torch.autograd.grad(state["critic"].main(x).sum(), x)
    want = 3 * 0.5 / 2 * float(g.square().sum(1).mean())
    assert seen == pytest.approx([want, 0, 0, want]) and weight.requires_grad


def test_r1_needs_a_critic_without_batch_norm():
    method, state = make(r1_gamma=1.0)
    with pytest.raises(ValueError, match="BatchNorm2d.*normalises by the batch"):
        method.step(state, Batch(torch.rand(4, 1, 8, 8)), 0)
    method, state = make(r1_gamma=1.0, critic_norm="layer")
    assert method.step(state, Batch(torch.rand(4, 1, 8, 8)), 0)["critic_loss"].isfinite()


def test_large_images_are_drawn_few_at_a_time(tmp_path, monkeypatch):
    class Own(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.ones(1))

        def forward(self, z):
            return (self.weight * z[:, :1, None, None]).expand(-1, 3, 256, 256).contiguous()

    data, options = torch.zeros(2, 3, 256, 256), dict(progress=False, steps=0)
    run = dgf.train("gan", data, tmp_path, generator=Own(), critic=nets.DCGANCritic(3, 256, width=1), **options)
    seen, sample = [], run.method.sample
    monkeypatch.setattr(
        run.method, "sample", lambda state, n, *args, **how: (seen.append(n), sample(state, n, *args, **how))[1]
    )
    images = run.sample(20, seed=1)
    assert seen == [7, 7, 6]
    assert torch.equal(images, run.sample(20, seed=1, batch=20)) and seen[3:] == [20]


def test_path_lengths_are_penalised_in_every_fourth_step():
    """Half of the batch, around the running mean, with four times the weight; the mean follows after."""
    method, state = make(network="stylegan2", z_dim=5, path_length=2.0)
    generator, path = state["generator"].eval(), state["path_length"]
    path.mean.fill_(0.3)
    seen = []
    for step in range(5):
        state.step = step
        seen.append(float(method.smoothed(state, torch.zeros(()), 6, 9, 2).detach()))
        if step == 0:
            followed = float(path.mean)
            path.mean.fill_(0.3)
    z = random.normal((6, 5), random.fold_in(9, "z of the path"), first=2 * 5)[::2]
    y = random.normal((6, 1, 8, 8), random.fold_in(9, "path"), first=2 * 64)[::2]
    lengths = []
    for i in range(3):
        ws = generator.styles(z[i : i + 1])[:, None].expand(-1, generator.styled, -1).detach().requires_grad_()
        (g,) = torch.autograd.grad((generator.synthesis(ws) * y[i] / 8).sum(), ws)
        lengths.append(float(g.square().sum(2).mean().sqrt()))
    want = 4 * 2.0 * sum((v - 0.3) ** 2 for v in lengths) / 3
    assert seen == pytest.approx([want, 0, 0, 0, want], rel=1e-4)
    assert followed == pytest.approx(0.3 + 0.01 * (sum(lengths) / 3 - 0.3), rel=1e-5)


def test_what_is_stylegans_is_refused_elsewhere():
    for option in ("path_length", "style_mixing"):
        with pytest.raises(ValueError, match=f"^{option} must be 0 for a generator that is not StyleGAN2's; got 0.5"):
            make(**{option: 0.5})
    own = nets.StyleGAN2Generator(1, 8, z_dim=4, width=8, latent=8, style_mixing=0.7)
    with pytest.raises(ValueError, match="^style_mixing must be 0.7, as the generator that was given has it; got 0.0"):
        dgf.plan("gan", data="digits", generator=own, z_dim=4, steps=1, width=8)
    assert make(network="stylegan2", style_mixing=0.5)[1]["generator"].style_mixing == 0.5


def test_stylegans_networks_follow_the_size():
    """Two mapping layers and no skip connections up to 64 pixels, eight and some above."""
    with torch.device("meta"):
        for size, mapping, skips in ((64, 2, False), (128, 8, True)):
            nets = GAN(GAN.Config(network="stylegan2", width=8, critic_width=8), (3, size, size)).networks({})
            assert len(nets["generator"].mapping) == mapping
            assert (nets["critic"].main[2].skip is not None) == skips


def test_stylegans_samples_are_images(tmp_path):
    options = dict(SMALL, data="digits", network="stylegan2", z_dim=8, steps=2, batch_size=3)
    run = dgf.train("gan", out=tmp_path / "b", **options)
    images = run.sample(5, seed=2)
    assert images.shape == (5, 1, 8, 8) and images.abs().max() <= 1
    torch.testing.assert_close(run.sample(2, seed=2), images[:2], rtol=0, atol=1e-5)


def test_a_budget_in_thousands_of_samples():
    config = GAN.Config.make(kimg=3, batch_size=64)
    assert config.steps == 47 and GAN.Config(**config.to_dict()) == config  # 3008 samples
    assert GAN.Config.make("dcgan", kimg=0.1).steps == 2
    assert GAN.Config.make("sngan").steps == 100_000 and GAN.Config.make("sngan", steps=5).steps == 5
    with pytest.raises(ValueError, match="steps must not be given with kimg; got 5 and 3"):
        GAN.Config.make(kimg=3, steps=5)


def test_a_budget_can_be_raised(tmp_path):
    first = dgf.train("gan", "moons", tmp_path, kimg=0.032, **SMALL)
    assert first.history[-1]["images_seen"] == 32
    longer = dgf.train("gan", "moons", tmp_path, kimg=0.064, resume=True, **SMALL)
    assert [row["images_seen"] for row in longer.history] == [32, 64] and longer.state.step == 4


def test_resuming_is_exact(tmp_path):
    whole = dgf.train("gan", out=tmp_path / "whole", steps=8, **SMALL)

    def stop(run, row):
        if row["step"] == 6:
            raise KeyboardInterrupt

    options = SMALL | dict(checkpoint_every=5)
    with pytest.raises(KeyboardInterrupt):
        dgf.train("gan", out=tmp_path / "cut", steps=8, callbacks=[stop], **options)
    cut = dgf.train("gan", out=tmp_path / "cut", steps=8, resume=True, **options)
    for name in ("generator", "critic"):
        torch.testing.assert_close(cut.state[name].state_dict(), whole.state[name].state_dict(), rtol=0, atol=0)
    assert torch.equal(cut.sample(5), whole.sample(5))
    assert torch.equal(dgf.load(tmp_path / "cut").sample(5), whole.sample(5))


def test_it_learns_the_digits():
    """The samples' mean image nears that of the data, and their spread grows from next to nothing."""
    data = dgf.data.load("digits").batch(slice(None))
    method, state = make(width=8, critic_width=16, lr=1e-3, critic_lr=1e-3, ema=0.0)

    def measure():
        x = method.sample(state, 1000, 1)
        return (x.mean(0) - data.mean(0)).abs().mean(), x.std(0).mean() / data.std(0).mean()

    distance, spread = measure()
    for step in range(200):
        index = dgf.random.randint(len(data), 32, dgf.random.fold_in(0, step))
        method.step(state, Batch(data[index]), step)
    trained_distance, trained_spread = measure()
    assert trained_distance < 0.6 * distance
    assert spread < 0.1 and 0.4 < trained_spread < 1.2


def test_points_may_have_deeper_networks():
    _, state = make((2,), width=8, critic_width=6, layers=3)
    shapes = {name: [p.shape[0] for p in net.parameters() if p.dim() == 2] for name, net in state.nets.items()}
    assert shapes == {"generator": [8, 8, 8, 2], "critic": [6, 6, 6, 1]}
    _, state = make((2,), layers=4, critic_layers=1)
    assert len(list(state["generator"].parameters())) == 10 and len(list(state["critic"].parameters())) == 4
