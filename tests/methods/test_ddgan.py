"""Denoising Diffusion GAN against its algorithm written out in plain torch."""

import copy
import json
import math

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from torch.nn.functional import softplus

import diffgan_fast as dgf
from diffgan_fast.engine import Batch, State
from diffgan_fast.nets import ddgan as ddgan_generator
from tests import mixture
from tests.ops import oracle

DDGAN = dgf.methods.find("ddgan")
fold = dgf.random.fold_in


class Generator(nn.Module):
    """x̂0 of images or points, told t and z; it remembers what it was told."""

    def __init__(self, size=1, z_dim=3):
        super().__init__()
        self.mix, self.time, self.latent = nn.Linear(size, size), nn.Linear(1, size), nn.Linear(z_dim, size)
        self.seen = []

    def forward(self, x, t, z):
        self.seen.append((x.detach(), t, z))
        told = self.time(t[:, None].to(x.dtype)) + self.latent(z)
        return torch.tanh(self.mix(x.flatten(1)) + told).view(x.shape)


class Critic(nn.Module):
    """Logits that are no quadratic of x, so that R1 has a gradient of its own."""

    def __init__(self, size=1):
        super().__init__()
        self.first, self.last = nn.Linear(2 * size + 1, 8), nn.Linear(8, 1)

    def forward(self, x, t, x_t):
        seen = torch.cat((x.flatten(1), x_t.flatten(1), t[:, None].to(x.dtype)), 1)
        return self.last(torch.tanh(self.first(seen)))[:, 0]


def abar(T, t):
    """abar_t of the variance-preserving SDE from 1e-3 to 1 in T steps, float64; t a tensor or a number."""
    s = 1e-3 + (1 - 1e-3) * torch.as_tensor(t, dtype=torch.float64) / T
    level = lambda s: torch.exp(-19.9 * s**2 / 2 - 0.1 * s)  # noqa: E731
    return level(s) / level(torch.tensor(1e-3, dtype=torch.float64))


def numbers(shape, key, stream=0, first=0):
    return torch.tensor(oracle.normal(math.prod(shape), key, first, stream)).view(shape)


class Step:
    """What a step draws, and its losses by their formulas, float64."""

    def __init__(self, T, key, x0, z_dim=3, predicts="x0"):
        self.T, self.key, self.x0, self.z_dim, self.predicts = T, key, x0.double(), z_dim, predicts

    def judged(self, part, generator):
        key, x0, n = fold(self.key, part), self.x0, len(self.x0)
        t = torch.tensor([1 + (oracle.word(i, fold(key, "t")) * self.T >> 32) for i in range(n)])
        a, before = (abar(self.T, at).view(-1, *[1] * (x0.dim() - 1)) for at in (t, t - 1))
        pair, alpha = fold(key, "pair"), a / before
        x_prev = before.sqrt() * x0 + (1 - before).sqrt() * numbers(x0.shape, pair)
        x_t = alpha.sqrt() * x_prev + (1 - alpha).sqrt() * numbers(x0.shape, pair, stream=1)
        fake = generator(x_t, t, numbers((n, self.z_dim), fold(key, "z")))
        if self.predicts == "x0":
            mean = before.sqrt() * (1 - alpha) / (1 - a) * fake + alpha.sqrt() * (1 - before) / (1 - a) * x_t
            std = ((1 - alpha) * (1 - before) / (1 - a)).sqrt()
            fake = mean + std * numbers(x0.shape, fold(key, "posterior"))
        return t, x_prev, x_t, fake

    def critic_loss(self, generator, critic, r1_gamma=0.0):
        t, x_prev, x_t, fake = self.judged("critic", generator)
        x_prev.requires_grad_()
        logits = critic(x_prev, t, x_t)
        loss = softplus(-logits).mean() + softplus(critic(fake.detach(), t, x_t)).mean()
        (g,) = torch.autograd.grad(logits.sum(), x_prev, create_graph=True)
        return loss + r1_gamma / 2 * g.flatten(1).square().sum(1).mean()

    def generator_loss(self, generator, critic):
        t, _, x_t, fake = self.judged("generator", generator)
        return softplus(-critic(fake, t, x_t)).mean()


def case(size=2, seed=0):
    torch.manual_seed(seed)
    return Generator(size).double(), Critic(size).double(), torch.randn(6, size, dtype=torch.float64)


def gradient(loss, net):
    found = torch.autograd.grad(loss, list(net.parameters()), retain_graph=True, allow_unused=True)
    return torch.cat([torch.zeros_like(p).flatten() if g is None else g.flatten()
                      for g, p in zip(found, net.parameters(), strict=True)])  # fmt: skip


@pytest.mark.parametrize("T", (1, 2, 4))
@pytest.mark.parametrize("predicts", ("x0", "x_prev"))
@pytest.mark.parametrize("r1_gamma", (0.0, 0.7))
def test_losses_follow_the_algorithm(T, predicts, r1_gamma):
    generator, critic, x0 = case()
    S, step = dgf.Schedule.vp(T), Step(T, 5, x0, predicts=predicts)
    loss, fooled = dgf.methods.ddgan.losses(generator, critic, x0, S, 5, z_dim=3, predicts=predicts, r1_gamma=r1_gamma)
    want = step.critic_loss(generator, critic, r1_gamma)
    torch.testing.assert_close(loss, want, rtol=1e-9, atol=0)
    torch.testing.assert_close(gradient(loss, critic), gradient(want, critic), rtol=1e-7, atol=1e-10)
    with torch.no_grad():
        critic.first.weight.mul_(-1)  # stands for the critic's update
    got, want = fooled(), step.generator_loss(generator, critic)
    torch.testing.assert_close(got, want, rtol=1e-9, atol=0)
    torch.testing.assert_close(gradient(got, generator), gradient(want, generator), rtol=1e-7, atol=1e-10)


def test_each_loss_leaves_the_other_network_alone():
    generator, critic, x0 = case()
    loss, fooled = dgf.methods.ddgan.losses(generator, critic, x0, dgf.Schedule.vp(4), 5, z_dim=3, r1_gamma=1.0)
    loss.backward()
    assert all(p.grad is None for p in generator.parameters())
    before = [p.grad.clone() for p in critic.parameters()]
    fooled().backward()
    assert all(torch.equal(p.grad, g) and p.requires_grad for p, g in zip(critic.parameters(), before, strict=True))
    (x, t, z), (x2, t2, z2) = generator.seen
    assert not torch.equal(x, x2) and not torch.equal(t, t2) and not torch.equal(z, z2)


def make(shape=(1, 4, 4), **options):
    """The method with the small networks above, and its state."""
    torch.manual_seed(1)
    size = math.prod(shape)
    method = DDGAN(DDGAN.Config(**{"z_dim": 3, **options}), shape)
    networks = method.networks({"generator": Generator(size), "critic": Critic(size)})
    return method, State(networks, method.optimizers(networks), method.averaged, method.config)


@pytest.mark.parametrize("updates", (1, 3))
def test_steps_are_those_of_plain_torch(updates):
    """Four steps: R1 in every third, cosine decay of both, Adam's betas, and the average of the generator.

    Each update of the critic has draws of its own, and R1 in the steps that have it; the losses are those of the last.
    """
    steps, lazy, gamma, lr, critic_lr = 4, 3, 0.5, 1e-2, 3e-3
    rates = dict(lr=lr, critic_lr=critic_lr, lr_schedule="cosine", adam_beta1=0.5, adam_beta2=0.9)
    method, state = make(steps=steps, r1_gamma=gamma, lazy_reg=lazy, ema=0.9, critic_updates=updates, **rates)
    generator, critic = (copy.deepcopy(state[name]).double() for name in ("generator", "critic"))
    average = copy.deepcopy(generator)
    optimizers = [
        torch.optim.Adam(net.parameters(), rate, betas=(0.5, 0.9))
        for net, rate in ((critic, critic_lr), (generator, lr))
    ]
    for s in range(steps):
        x0 = torch.rand(8, 1, 4, 4) * 2 - 1
        logged = method.step(state, Batch(x0), 30 + s)
        state.step += 1

        keys = [30 + s, fold(30 + s, 1), fold(30 + s, 2)][:updates]
        draws = [Step(4, key, x0) for key in keys]
        for optimizer, rate in zip(optimizers, (critic_lr, lr), strict=True):
            optimizer.param_groups[0]["lr"] = rate * 0.5 * (1 + math.cos(math.pi * s / steps))
        want = {}
        parts = [("critic_loss", optimizers[0], step) for step in draws] + [
            ("generator_loss", optimizers[1], draws[-1])
        ]
        for name, optimizer, step in parts:
            penalty = (0 if s % lazy else gamma,) if name == "critic_loss" else ()
            want[name] = getattr(step, name)(generator, critic, *penalty)
            optimizer.zero_grad()
            want[name].backward()
            optimizer.step()
        for a, p in zip(average.parameters(), generator.parameters(), strict=True):
            a.data.lerp_(p.data, 1 - min(0.9, 1 - (2 + s) ** (-2 / 3)))
        for name, loss in want.items():
            assert float(logged[name].detach()) == pytest.approx(float(loss.detach()), rel=1e-4)
    for mine, theirs in ((state["critic"], critic), (state["generator"], generator), (state.ema["generator"], average)):
        for p, q in zip(mine.parameters(), theirs.parameters(), strict=True):
            torch.testing.assert_close(p.double(), q, rtol=0, atol=1e-4)


def test_a_split_batch_sees_the_same_numbers():
    method, state = make()
    x0, seen = torch.rand(7, 1, 4, 4), state["generator"].seen
    for part, first in ((x0, 0), (x0[:3], 0), (x0[3:], 3)):
        method.step(state, Batch(part, first_sample=first), 3)
    whole, parts = seen[:2], [seen[2:4], seen[4:6]]
    for role in (0, 1):
        for what in (1, 2):  # t, z
            assert torch.equal(torch.cat([p[role][what] for p in parts]), whole[role][what])
        assert torch.equal(torch.cat([p[role][0] for p in parts]), whole[role][0])


@pytest.mark.parametrize("T", (1, 2, 4))
def test_samples_take_as_many_calls_as_steps(T):
    method, state = make(T=T, ema=0.5)
    x0 = torch.rand(8, 1, 4, 4)
    method.step(state, Batch(x0), 1)
    seen = state.ema["generator"].seen
    x = method.sample(state, 6, 5)
    assert [int(t[0]) for _, t, _ in seen] == list(range(T, 0, -1))
    assert x.shape == (6, 1, 4, 4) and x.abs().max() <= 1 and not x.requires_grad
    torch.testing.assert_close(method.sample(state, 2, 5, first=4), x[4:])
    assert not torch.allclose(method.sample(state, 6, 6), x)
    assert not torch.equal(method.sample(state, 6, 5, ema=False), x)
    assert torch.equal(method.sample(state, 6, 5, steps=T), x)
    with pytest.raises(ValueError, match=f"steps must be {T}, for which this run's generator was trained; got 9"):
        method.sample(state, 6, 5, steps=9)
    with pytest.raises(ValueError, match="labels must be None"):
        method.sample(state, 6, 5, labels=torch.zeros(6, dtype=torch.int64))


def test_without_a_latent_the_generator_sees_zeros():
    method, state = make(latent=False, ema=0.0)
    method.step(state, Batch(torch.rand(8, 1, 4, 4)), 1)
    method.sample(state, 4, 5)
    seen = state["generator"].seen
    assert len(seen) == 2 + 4 and all(z.shape[1] == 3 and not z.any() for _, _, z in seen)


def test_predicting_x_prev_leaves_the_posterior_out():
    """The samples are the generator's last output, clamped; with the posterior they would be so only at t = 1."""
    method, state = make(predicts="x_prev", ema=0.0, T=2)
    net = state["generator"]
    x = method.sample(state, 4, 5)
    (_, two, _), (x_1, one, z) = net.seen
    assert (two == 2).all() and (one == 1).all()
    torch.testing.assert_close(x_1, net(*net.seen[0]).detach())
    torch.testing.assert_close(x, net(x_1, one, z).detach().clamp(-1, 1))


# T, batch (GPUs x each), lr of critic and generator, gamma, its interval, decay of the average, mirrored; images of
# training (epochs x images of the data); channels, their multiples, layers of the mapping network after the first
PUBLISHED = {
    "cifar10": (4, 4 * 64, 1.25e-4, 1.6e-4, 0.02, 15, 0.9999, True, 1800 * 50_000, 128, (1, 2, 2, 2), 4),
    "church256": (4, 8 * 8, 1e-4, 1.6e-4, 1, 10, 0.999, False, 500 * 120_000, 64, (1, 1, 2, 2, 4, 4), 3),
    "celeba256": (2, 8 * 4, 1e-4, 2e-4, 2, 10, 0.9999, True, 800 * 30_000, 64, (1, 1, 2, 2, 4, 4), 3),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_presets_are_the_published_configurations(name):
    c = DDGAN.Config.make(name)
    *settings, images, width, multipliers, mapping = PUBLISHED[name]
    found = [c.T, c.batch_size, c.critic_lr, c.lr, c.r1_gamma, c.lazy_reg, c.ema, c.flip]
    assert found == settings and c.z_dim == 100
    assert c.steps * c.batch_size == pytest.approx(images, rel=1e-5)
    assert (c.lr_schedule, c.adam_beta1, c.adam_beta2) == ("cosine", 0.5, 0.9)
    assert (c.gan_loss, c.predicts, c.latent, c.critic_updates) == ("nonsaturating", "x0", True, 1)
    assert (c.beta_min, c.beta_max, c.warmup, c.clip_grad, c.precision) == (0.1, 20.0, 0, 0.0, "fp32")
    shape = ddgan_generator.PRESETS[c.network]
    assert (shape.width, shape.multipliers, shape.mapping) == (width, multipliers, mapping)
    assert (shape.blocks, shape.attention, shape.dropout, shape.latent) == (2, (16,), 0.0, 256) and c.width is None
    assert c.critic_network == ("small" if name == "cifar10" else "large")


def test_the_schedule_is_the_published_one():
    c = DDGAN.Config.make("cifar10")
    other = DDGAN(DDGAN.Config(T=2, beta_min=1.0, beta_max=5.0), (2,)).schedule
    s = 1e-3 + (1 - 1e-3) * torch.arange(3, dtype=torch.float64) / 2
    level = torch.exp(-2 * s**2 - s)
    torch.testing.assert_close(other.alphas_cumprod, level / level[0], rtol=1e-12, atol=0)
    S = DDGAN(c, (3, 32, 32)).schedule
    torch.testing.assert_close(S.alphas_cumprod, abar(4, torch.arange(5)), rtol=1e-12, atol=0)


def test_networks_follow_the_size():
    """The authors' generator for the size, and DCGAN's critic, which the default rates suit; theirs if asked for."""

    def critic(size, **options):
        return DDGAN(DDGAN.Config.make(**options), (1, size, size)).networks({})["critic"]

    with torch.device("meta"):
        for size in (8, 28, 32, 256):
            assert isinstance(critic(size), dgf.nets.DCGANCritic)
        assert isinstance(critic(28, preset="mnist"), dgf.nets.DCGANCritic)
        assert isinstance(critic(32, preset="cifar10"), dgf.nets.DDGANCritic)
        assert isinstance(critic(8, critic_network="8"), dgf.nets.DDGANCritic)
    x, t = torch.randn(4, 1, 8, 8), torch.full((4,), 2)
    assert critic(8)(x, t=t, x_t=x + 1).shape == (4,)


@pytest.mark.parametrize("size", [8, 28])
def test_the_usual_critic_keeps_the_size_of_signals(size):
    """Two convolutions a resolution without a norm, of He's weights: its first logits are no thousandths."""
    torch.manual_seed(0)
    critic = DDGAN(DDGAN.Config(), (1, size, size)).networks({})["critic"]
    kinds = [type(layer) for layer in critic.main]
    assert not {nn.BatchNorm2d, nn.GroupNorm} & set(kinds)
    assert kinds.count(dgf.nets.Conv2d) == kinds.count(nn.Conv2d) - 1  # a strided one and one more each, and the last
    x, t = torch.randn(64, 1, size, size), torch.arange(64) % 4 + 1
    assert critic(x, t=t, x_t=x).square().mean().sqrt() > 0.1


def test_only_x0_is_bounded():
    for predicts, last in (("x0", nn.Tanh), ("x_prev", nn.Identity)):
        generator = DDGAN(DDGAN.Config(predicts=predicts), (1, 8, 8)).networks({})["generator"]
        assert isinstance(generator.head[-1], last)


def test_the_critic_is_as_wide_as_one_likes():
    def weights(shape, **options):
        return [tuple(p.shape) for p in DDGAN(DDGAN.Config(**options), shape).networks({})["critic"].parameters()]

    assert weights((1, 8, 8))[0] == (64, 3, 4, 4) and weights((1, 8, 8), critic_width=24)[0] == (24, 3, 4, 4)
    assert weights((2,))[0] == (256, 5) and weights((2,), critic_width=24)[0] == (24, 5)
    with pytest.raises(ValueError, match="critic_width must be None for the authors' critic '28', got 24"):
        weights((1, 28, 28), critic_width=24, critic_network="28")


def test_the_small_presets_are_the_defaults_with_other_networks():
    """The settings that were tuned at 8 pixels are where 28 begin."""
    mine, usual = (DDGAN.Config.make(preset).to_dict() for preset in ("mnist", None))
    assert {k: v for k, v in mine.items() if v != usual[k]} == {"steps": 20_000}


SMALL = dict(batch_size=8, log_every=2, sample_every=0, checkpoint_every=0, progress=False, z_dim=4)
DATA = {"digits": "digits", "points": "ring"}


@pytest.mark.parametrize("data", DATA.values(), ids=DATA)
def test_resuming_is_exact(tmp_path, data):
    options = SMALL | dict(data=data, steps=8, width=8, lazy_reg=2)
    whole = dgf.train("ddgan", out=tmp_path / "whole", **options)

    def stop(run, row):
        if row["step"] == 6:
            raise KeyboardInterrupt

    options["checkpoint_every"] = 5
    with pytest.raises(KeyboardInterrupt):
        dgf.train("ddgan", out=tmp_path / "cut", callbacks=[stop], **options)
    cut = dgf.train("ddgan", out=tmp_path / "cut", resume=True, **options)
    for name in ("generator", "critic"):
        torch.testing.assert_close(cut.state[name].state_dict(), whole.state[name].state_dict(), rtol=0, atol=0)
    assert torch.equal(cut.sample(5), whole.sample(5))
    assert torch.equal(dgf.load(tmp_path / "cut").sample(5), whole.sample(5))
    assert (tmp_path / "whole" / "samples" / "denoising.png").exists() == (data == "digits")
    with pytest.raises(ValueError, match="steps must be 4"):
        whole.sample(5, steps=3)


@pytest.mark.parametrize("options", [dict(T=1), dict(T=2), dict(latent=False), dict(predicts="x_prev")], ids=str)
@pytest.mark.parametrize("data", DATA.values(), ids=DATA)
def test_ablations_train_and_load(tmp_path, data, options):
    run = dgf.train("ddgan", data, tmp_path, steps=2, width=8, **SMALL, **options)
    assert torch.equal(dgf.load(tmp_path).sample(4), run.sample(4)) and run.sample(4).isfinite().all()
    stored = json.loads((tmp_path / "config.json").read_text())["config"]
    assert {name: stored[name] for name in options} == options


def test_an_unknown_prediction_is_named():
    generator, critic, x0 = case()
    with pytest.raises(ValueError, match="predicts must be one of x0, x_prev; got 'eps'"):
        dgf.methods.ddgan.losses(generator, critic, x0, dgf.Schedule.vp(4), 5, z_dim=3, predicts="eps")
    with pytest.raises(ValueError, match="predicts must be"):
        dgf.sampling.sample_posterior(generator, (2, 2), dgf.Schedule.vp(4), 5, z_dim=3, predicts="eps")
    with pytest.raises(ValueError, match="predicts must be"):
        DDGAN.Config(predicts="eps")


def test_other_data_are_refused():
    """By our networks; one's own may be for any."""
    own = {"generator": Generator(80), "critic": Critic(80)}
    for given in ({}, {"generator": own["generator"]}, {"critic": own["critic"]}):
        with pytest.raises(ValueError, match="data must be square images or points"):
            DDGAN(DDGAN.Config(), (1, 8, 10)).networks(given)
    assert DDGAN(DDGAN.Config(), (1, 8, 10)).networks(own) == own


@torch.no_grad()
def test_a_shown_step_is_one_of_the_averaged_generator():
    method = DDGAN(DDGAN.Config(T=4, z_dim=3, ema=0.9), (2,))
    nets = method.networks({"generator": Generator(2), "critic": Critic(2)})
    state = State(nets, method.optimizers(nets), method.averaged, method.config)
    state.ema["generator"].mix.weight.add_(1.0)
    state.ema["generator"].time.weight.add_(1.0)
    x = torch.randn(5, 2)
    shown = [method.denoise(state, x, t, 7) for t in (1, 3)]
    for t, found in zip((1, 3), shown, strict=True):
        wanted = dgf.sampling.generated_step(state.ema["generator"], x, t, method.schedule, 7, z_dim=3)
        assert torch.equal(found, wanted)
    assert (shown[0] - shown[1]).abs().min() > 1e-4


@torch.no_grad()
def test_strips_show_what_training_and_sampling_see():
    method = DDGAN(DDGAN.Config(T=3, width=8, z_dim=3), (1, 8, 8))
    nets = method.networks({})
    state = State(nets, method.optimizers(nets), method.averaged, method.config)
    x = torch.rand(2, 1, 8, 8) * 2 - 1
    strips = method.strips(state, x, 5)
    assert [t for t, _ in strips["noising"]] == [0, 1, 2, 3]
    assert [t for t, _ in strips["denoising"]] == [3, 2, 1, 0]
    for t, images in strips["noising"]:
        level = abar(3, t)
        noise = numbers((2, 1, 8, 8), 5)
        wanted = (level.sqrt() * x.double() + (1 - level).sqrt() * noise).clamp(-1, 1)
        torch.testing.assert_close(images.double(), wanted, rtol=0, atol=1e-5)
    assert torch.equal(strips["denoising"][-1][1], method.sample(state, 2, 5))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@torch.no_grad()
def test_a_step_is_of_the_generators_type(dtype):
    generator, S = Generator(2).to(dtype), dgf.Schedule.vp(4)
    x = torch.randn(5, 2).to(dtype)
    found = dgf.sampling.generated_step(generator, x, 3, S, 7, z_dim=3)
    assert found.dtype == dtype and generator.seen[-1][2].dtype == dtype


def test_networks_of_ones_own_are_for_this_run(tmp_path):
    """Said before there is a directory that could not be resumed."""
    for own, name, message in (
        (dict(generator=dgf.nets.DDGANGenerator(1, 8, T=4)), "z_dim", "z_dim must be 100, as the generator"),
        (dict(generator=dgf.nets.DDGANGenerator(1, 8, T=2, z_dim=4)), "T", "T must be 2, as the generator"),
        (dict(critic=dgf.nets.DDGANCritic(1, 8, T=2)), "T", "T must be 2, as the critic that was given has it; got 4"),
    ):
        with pytest.raises(ValueError, match=f"^{message}"):
            dgf.train("ddgan", data="digits", out=tmp_path / name, steps=1, progress=False, z_dim=4, **own)
        assert not (tmp_path / name).exists()


def test_betas_that_are_none_are_named_by_their_options():
    for beta_min, beta_max in ((0.0, 0.0), (0.1, 200.0)):
        with pytest.raises(
            ValueError, match=f"^beta_min and beta_max must lead to betas in .0, 1.; got {beta_min:g} and"
        ):
            DDGAN(DDGAN.Config(T=1, beta_min=beta_min, beta_max=beta_max), (2,))


def test_what_no_network_is_made_for_is_named():
    """By the option, before the first step."""

    def networks(size, given=None, **options):
        return DDGAN(DDGAN.Config(**options), (1, size, size)).networks(given or {})

    for size, fitting in ((16, "cifar10"), (64, "cifar10, 256")):
        for chosen in ("auto", "28"):
            message = f"^network must be one of {fitting} for images of {size} pixels; got '{chosen}'"
            with pytest.raises(ValueError, match=message):
                networks(size, network=chosen)
    with pytest.raises(ValueError, match="^network has none for images of 24 pixels; got 'auto' .or pass a network of"):
        networks(24)
    message = "^critic_network must be one of auto, dcgan, 8, 28, small for images of 16 pixels; got 'large'"
    with pytest.raises(ValueError, match=message):
        networks(16, {"generator": Generator()}, critic_network="large")
    networks(16, {"generator": Generator()}), networks(24, {"generator": Generator()}, critic_network="dcgan")


@pytest.mark.filterwarnings("ignore::diffgan_fast.metrics.SmallSampleWarning")
def test_it_is_planned_compared_exported_and_reported(tmp_path):
    common = dict(batch_size=8, T=2, width=8, sample_every=0, progress=False)
    plan = dgf.plan("ddgan", "digits", **{k: v for k, v in common.items() if k not in ("sample_every", "progress")})
    assert plan.rows[0].peak > 0 and plan.recompute is None
    rows = dgf.compare(["ddpm", "ddgan"], "digits", tmp_path, n=40, steps=2, log_every=1, **common)
    assert [row["method"] for row in rows] == ["ddpm", "ddgan"] and rows[1]["fid"] > 0
    run = dgf.load(tmp_path / "ddgan")
    weights = load_file(run.export(tmp_path / "generator.safetensors"))
    assert weights.keys() == run.state["generator"].state_dict().keys()
    page = (tmp_path / "ddgan" / "report.html").read_text()
    assert "From noise to image" in page and 'alt="Losses"' in page
    assert run.evaluate(40, metrics=["fid", "recall"]).keys() >= {"fid", "recall", "sample_seconds"}


@pytest.mark.slow
def test_two_large_steps_reach_two_modes(tmp_path):
    """Two narrow Gaussians four apart, which a Gaussian step could only bridge: both are found, in their shares."""
    p = mixture.two_gaussians(0.5, (-2.0, 0.0), (2.0, 0.0), 0.2)
    options = dict(T=2, width=64, z_dim=4, steps=600, batch_size=256, lr=1e-3, critic_lr=1e-3)
    run = dgf.train("ddgan", p.sample(5000, 1).float(), tmp_path, sample_every=0, progress=False, **options)
    x = run.sample(2000).double()
    near = torch.cdist(x, p.means).amin(1) < 0.6  # three standard deviations: 98.9 % of the data
    assert near.double().mean() > 0.85 and (p.modes(x)[0] - 0.5).abs().max() < 0.15
