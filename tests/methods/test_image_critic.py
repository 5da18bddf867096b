"""Methods 1 and 2 against their algorithm written out in plain torch, and where their critic comes from."""

import json
import shutil

import pytest
import torch
from torch import nn

import diffgan_fast as dgf
from diffgan_fast import nets
from diffgan_fast.engine import Batch
from diffgan_fast.engine.config import option
from diffgan_fast.methods import gan
from diffgan_fast.run import fingerprint
from tests.methods import by_hand
from tests.methods.by_hand import Denoiser, T, images, make, near, same_weights

NAMES = ("method1", "method2")
RATES = {"method1": dict(lr=0.01), "method2": dict(lr=0.01, critic_lr=0.02)}


def made(name, given=None, **options):
    """A method with a small critic; ten channels, so that its batch norm has something to say."""
    torch.manual_seed(5)
    classes = 3 if options.get("conditional") else 0
    given = {"denoiser": Denoiser(classes=classes), "critic": nets.DCGANCritic(1, 8, width=4), **(given or {})}
    return make(name, given=given, classes=classes, critic_start="scratch", **{**RATES[name], **options})


OPTIONS = [
    dict(),
    dict(chain_mode="train"),
    dict(judged="clamped"),
    dict(chain_clip_x0=True),
    dict(clip_x0=False, chain_clip_x0=True),
    dict(data_range="unit", clip_x0=False),
    dict(data_range="unit", clip_x0=False, judged="clamped", chain_mode="train"),
    dict(variance="posterior", prediction="v", gan_loss="lsgan"),
    dict(sampler="ddim", eta=0.5, sample_steps=3),
    dict(grad_steps=2, recompute="none"),
    dict(grad_steps=2, recompute=2),
    dict(conditional=True),
    dict(conditional=True, guidance_scale=2.0, grad_steps=4, adam_beta1=0.7),
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_steps_are_those_of_plain_torch(name, options):
    """Two steps: losses, gradients, weights, running statistics and how many batches they have seen."""
    method, state = made(name, **options)
    kept, hand = by_hand.Recording(state), by_hand.copies(state)
    denoiser, critic = hand["denoiser"], hand["critic"]
    beta1 = options.get("adam_beta1", {"method1": 0.9, "method2": 0.5}[name])
    optimizer = by_hand.adam(denoiser, 0.01, beta1)
    critic_optimizer = by_hand.adam(critic, 0.02, beta1)
    critic_loss, denoiser_loss = by_hand.LOSSES[options.get("gan_loss", "nonsaturating")]
    how = {k: options[k] for k in ("variance", "prediction", "sampler", "eta") if k in options}
    how |= {"clip_x0": options.get("clip_x0", True) and options.get("chain_clip_x0", False)}
    how |= {"last": options.get("grad_steps", T), "s": options.get("guidance_scale", 1.0)}
    how |= {"kept": (0, 2, 4, 6)} if "sample_steps" in options else {}
    for key in (7, 8):
        real, y = images(10, seed=key), torch.arange(10) % 3
        if options.get("conditional"):
            how |= {"cond": {"y": y}, "uncond": {"y": torch.full_like(y, 3)}}
        logged = method.step(state, Batch(real, y), key)

        denoiser.train(options.get("chain_mode") == "train")
        fake = by_hand.sample(denoiser, real.shape, key, **how)
        if options.get("data_range") == "unit":
            fake = 2 * fake - 1
        if options.get("judged") == "clamped":
            assert 0.05 < (fake.abs() > 1).float().mean() < 0.95
            fake = fake.clamp(-1, 1)
        want = {}
        if name == "method2":
            want["critic_loss"] = critic_loss(critic(real), critic(fake.detach()))
            by_hand.follow(critic, critic_optimizer, want["critic_loss"], kept.gradients["critic"])
        else:
            critic.eval()
        want["denoiser_loss"] = denoiser_loss(critic(fake))
        by_hand.follow(denoiser, optimizer, want["denoiser_loss"], kept.gradients["denoiser"])
        torch.testing.assert_close(logged, want, rtol=1e-4, atol=1e-5)
    for part in ("denoiser", "critic"):
        torch.testing.assert_close(state[part].state_dict(), hand[part].state_dict(), rtol=1e-5, atol=1e-6, msg=part)
    runs = 2 * len(how.get("kept", range(T + 1))) - 2
    runs *= 2 if "guidance_scale" in options else 1
    assert denoiser.norm.num_batches_tracked == (runs if options.get("chain_mode") == "train" else 0)
    assert all(layer.training for net in state.nets.values() for layer in net.modules())


def test_what_the_options_change():
    """No option of the test above is without effect there."""

    def loss(**options):
        method, state = made("method2", **options)
        return method.step(state, Batch(images(10), torch.arange(10) % 3), 7)["denoiser_loss"].item()

    plain = loss()
    changes = [o for o in OPTIONS[1:] if o.keys() - {"grad_steps", "recompute", "clip_x0"} and "conditional" not in o]
    assert all(abs(loss(**o) - plain) > 1e-3 for o in changes if o != dict(clip_x0=False, chain_clip_x0=True))
    assert loss(clip_x0=False, chain_clip_x0=True) == plain
    told = loss(conditional=True)
    assert abs(told - loss(conditional=True, guidance_scale=2.0)) > 1e-3


class Judge(nn.Module):
    """A critic that remembers what it was shown, and in which state it was."""

    def __init__(self):
        super().__init__()
        self.layer, self.seen = nn.Linear(64, 1), []

    def forward(self, x):
        self.seen.append((x, self.training, self.layer.weight.detach().clone()))
        return self.layer(x.flatten(1))[:, 0]


def test_what_the_critic_of_method_2_sees():
    """Real images, x_0 without its graph, and after its update x_0 with its graph."""
    method, state = made("method2", given={"critic": Judge()})
    real = images(4)
    method.step(state, Batch(real), 7)
    (a, _, before), (b, _, at_fake), (c, _, after) = state["critic"].seen
    assert a is real and not b.requires_grad and c.requires_grad and torch.equal(b, c)
    assert torch.equal(before, at_fake) and not torch.equal(before, after)
    assert all(training for _, training, _ in state["critic"].seen)
    assert all(p.requires_grad and p.grad is None for p in state["critic"].parameters())


def test_method_1_leaves_the_critic_alone():
    """Weights, running statistics, modes, also of layers that stood in eval mode."""
    critic = nets.DCGANCritic(1, 8, width=4)
    method, state = made("method1", given={"critic": critic})
    critic.main[2].eval()
    before = {k: v.clone() for k, v in critic.state_dict().items()}
    start = by_hand.copies(state)["denoiser"]
    for key in (1, 2, 3):
        assert set(method.step(state, Batch(images(4)), key)) == {"denoiser_loss"}
    assert all(torch.equal(v, before[k]) for k, v in critic.state_dict().items())
    assert critic.training and critic.main[1].training and not critic.main[2].training
    assert all(p.requires_grad and p.grad is None for p in critic.parameters())
    assert "critic" not in state.optimizers and not same_weights(start, state["denoiser"])
    judge = Judge()
    method, state = made("method1", given={"critic": judge})
    method.step(state, Batch(images(4)), 7)
    ((x, training, _),) = judge.seen  # real images are not looked at
    assert x.requires_grad and not training


@pytest.mark.parametrize("options", [dict(), dict(chain_mode="train"), dict(grad_steps=3)], ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_how_a_step_is_recomputed_changes_nothing(name, options):
    losses, weights = [], []
    for recompute in ("none", "step", 1, 2, 4, 50):
        method, state = made(name, recompute=recompute, **options)
        for key in (1, 2):
            losses.append(method.step(state, Batch(images(4)), key))
        weights.append({f"{n}.{k}": v for n, net in state.nets.items() for k, v in net.state_dict().items()})
    for i in range(2, len(losses)):
        torch.testing.assert_close(losses[i], losses[i % 2], rtol=1e-5, atol=1e-6)
    for other in weights[1:]:
        torch.testing.assert_close(other, weights[0], rtol=1e-4, atol=2e-4)


@pytest.mark.parametrize("name", NAMES)
def test_a_split_batch_sees_the_same_noise(name):
    method, state = made(name)
    real = images(7)
    whole = method.generate(state, Batch(real), 3)
    parts = [method.generate(state, Batch(real[:3]), 3), method.generate(state, Batch(real[3:], first_sample=3), 3)]
    torch.testing.assert_close(torch.cat(parts), whole)
    assert not torch.allclose(parts[0], method.generate(state, Batch(real[:3], first_sample=3), 3))


@pytest.mark.parametrize("module", (dgf.methods.method1, dgf.methods.method2))
def test_the_losses_for_a_loop_of_ones_own(module):
    torch.manual_seed(2)
    denoiser, critic = Denoiser(classes=3).eval(), nets.DCGANCritic(1, 8, width=4)
    schedule, real, y = dgf.Schedule.linear(T, *by_hand.BETAS), images(5), torch.arange(5) % 3
    common = dict(cond={"y": y}, first_sample=4, variance="posterior")
    loss, fooled = module.losses(denoiser, critic, real, schedule, 9, to_image=torch.tanh, recompute=2, **common)
    fake = by_hand.sample(denoiser, real.shape, 9, cond={"y": y}, first=4, variance="posterior").tanh()
    want = by_hand.bce(critic(real), 1.0) + by_hand.bce(critic(fake.detach()), 0.0)
    torch.testing.assert_close(loss, want)
    loss.backward()
    assert all(p.grad is None for p in denoiser.parameters())
    near(torch.cat([p.grad.flatten() for p in critic.parameters()]), by_hand.gradient(want, critic))
    kept = [p.grad.clone() for p in critic.parameters()]
    with torch.no_grad():
        critic.main[0].weight.mul_(-2)  # stands for the critic's update
    want = by_hand.bce(critic(fake), 1.0)
    got = fooled()
    torch.testing.assert_close(got, want)
    got.backward()
    grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in denoiser.parameters()]
    near(torch.cat([g.flatten() for g in grads]), by_hand.gradient(want, denoiser), 1e-3)
    assert all(torch.equal(p.grad, g) and p.requires_grad for p, g in zip(critic.parameters(), kept, strict=True))

    other, _ = module.losses(denoiser, critic, real, schedule, 9, gan_loss="lsgan", **common)
    raw = by_hand.sample(denoiser, real.shape, 9, cond={"y": y}, first=4, variance="posterior")
    torch.testing.assert_close(other, by_hand.LOSSES["lsgan"][0](critic(real), critic(raw.detach())))
    _, short = module.losses(denoiser, critic, real, schedule, 9, grad_steps=1, **common)
    cut = by_hand.sample(denoiser, real.shape, 9, cond={"y": y}, first=4, variance="posterior", last=1)
    near(by_hand.gradient(short(), denoiser), by_hand.gradient(by_hand.bce(critic(cut), 1.0), denoiser), 1e-3)


# Runs: where the critic comes from.

TINY = dict(batch_size=8, log_every=1, sample_every=0, checkpoint_every=0, progress=False)
IMAGES = images(40, seed=1)
QUIET = pytest.mark.filterwarnings("ignore:the schedule leaves")


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A base and a `gan`, hardly trained."""
    folder, common = tmp_path_factory.mktemp("runs"), dict(data=IMAGES, **TINY)
    torch.manual_seed(8)
    base = dgf.train("ddpm", out=folder / "base", model=Denoiser(), steps=2, T=5, **common)
    gan = dgf.train("gan", out=folder / "gan", steps=2, width=4, critic_width=4, **common)
    return base, gan


def tune(name, out, runs, **options):
    options = {"data": IMAGES, "base": runs[0], "steps": 2, **TINY, **options}
    return dgf.train(name, out=out, **options)


@pytest.mark.parametrize("name", NAMES)
def test_a_critic_can_come_from_a_run_its_path_or_a_module(name, runs, tmp_path):
    base, gan = runs
    before = fingerprint(base.state.sampling_net("denoiser")), fingerprint(gan.state["critic"])
    start = tune(name, tmp_path / "start", runs, critic=gan, steps=0)
    assert same_weights(start.state["critic"], gan.state["critic"])
    assert same_weights(start.state["denoiser"], base.state.sampling_net("denoiser"))
    tuned = tune(name, tmp_path / "run", runs, critic=gan)
    by_path = tune(name, tmp_path / "path", runs, critic=gan.path)
    module = nets.DCGANCritic(1, 8, width=4)
    module.load_state_dict(gan.state["critic"].state_dict())
    own = tune(name, tmp_path / "own", runs, critic=module)
    for run in (by_path, own):
        assert all(same_weights(run.state[part], tuned.state[part]) for part in ("denoiser", "critic"))
    trained = name == "method2"
    assert same_weights(tuned.state["critic"], gan.state["critic"]) != trained
    assert not same_weights(tuned.state["denoiser"], start.state["denoiser"])
    assert own.state["critic"] is module
    assert before == (fingerprint(base.state.sampling_net("denoiser")), fingerprint(gan.state["critic"]))
    assert tuned.method.config.critic_width == by_path.method.config.critic_width == 4
    stored = json.loads((tmp_path / "run" / "config.json").read_text())
    assert stored["critic"] == {"step": 2, "weights": before[1]} and stored["given"] == ["denoiser"]
    again = dgf.load(tmp_path / "run", model=Denoiser())
    assert torch.equal(again.sample(3), tuned.sample(3))
    with pytest.raises(ValueError, match="your own 'critic'"):
        dgf.load(tmp_path / "own", model=Denoiser())
    assert not (tmp_path / "run" / "critic").exists()


@pytest.mark.parametrize("name", NAMES)
def test_a_critic_from_scratch(name, runs, tmp_path):
    run = tune(name, tmp_path, runs, critic_start="scratch", critic_width=64, steps=0)
    assert not (tmp_path / "critic").exists()
    assert sum(p.numel() for p in run.state["critic"].parameters()) == 64 * 16 + 64 * 128 * 16 + 256 + 128 * 4
    assert float(run.state["critic"].main[2].weight.detach().std()) == pytest.approx(0.02, rel=0.05)  # DCGAN's
    assert json.loads((tmp_path / "config.json").read_text())["critic"] is None


def test_a_critic_that_does_not_suit_is_named(runs, tmp_path):
    base, gan = runs
    out = tmp_path / "x"
    for name in ("method3", "method4", "discriminator-guidance", "ddpm"):
        with pytest.raises(ValueError, match=f"critic must be a network for method '{name}'"):
            dgf.train(name, IMAGES, out, critic=gan, **TINY)
    other = dgf.train("gan", IMAGES, tmp_path / "sngan", network="sngan", steps=0, critic_width=4, progress=False)
    for run in (base, other):
        with pytest.raises(
            ValueError, match="critic must be a network for method 'method1': a run of 'gan' with DCGAN"
        ):
            tune("method1", out, runs, critic=run)
    with pytest.raises(ValueError, match="critic_width is 4 in the critic run, and cannot be 8 here"):
        tune("method2", out, runs, critic=gan, critic_width=8)
    with pytest.raises(ValueError, match="holds no run"):
        tune("method2", out, runs, critic=tmp_path)
    with pytest.raises(ValueError, match="critic must be None or a network with critic_start='scratch'"):
        tune("method2", out, runs, critic=gan, critic_start="scratch")
    with pytest.raises(ValueError, match=r"critic must be a run on data of shape \[3, 8, 8\] .* not of \[1, 8, 8\]"):
        dgf.train("method2", torch.rand(9, 3, 8, 8), out, model=Denoiser(), critic=gan, **TINY)
    for change, message in [
        (dict(recompute=0), "recompute must be at least 1"),
        (dict(recompute="all"), "recompute must be '.*' or int, got 'all'"),
        (dict(grad_steps=0), "grad_steps must be at least 1"),
        (dict(grad_steps=6), r"grad_steps must be in 1\.\.5, the steps of the chain; got 6"),
        (dict(judged="images"), "judged must be one of"),
        (dict(critic_start="gan"), "critic_start must be one of"),
    ]:
        with pytest.raises(ValueError, match=message):
            tune("method2", out, runs, critic=gan, **change)
    assert not out.exists()
    with pytest.raises(ValueError, match="method 'method2' has no such network"):
        tune("method2", out, runs, critic=gan, generator=nn.Identity())
    with pytest.raises(ValueError, match=r"grad_steps must be in 1\.\.3"):
        dgf.methods.find("method1").Config(T=8, sample_steps=3, grad_steps=4)
    with pytest.raises(ValueError, match="data must be images"):
        dgf.train("method1", torch.rand(9, 2), tmp_path / "z", model=Denoiser(), critic_start="scratch", **TINY)


@pytest.fixture
def brief(monkeypatch):
    """The `gan` that a method trains first takes two steps."""
    base = gan.GANConfig
    brief = type("Brief", (base,), {"__annotations__": {"steps": int, "width": int}})
    brief.steps, brief.width = option(2, "training steps", low=0), option(4, "channels", low=1)
    monkeypatch.setattr(gan.GAN, "Config", gan.dataclass(kw_only=True)(brief))


def test_a_gan_is_trained_first_and_reused(runs, brief, tmp_path, monkeypatch):
    class Stop(Exception):
        pass

    def stop(run, row):
        raise Stop

    options = dict(critic_width=6, seed=3)
    with pytest.raises(Stop):  # before there is a checkpoint
        tune("method2", tmp_path / "a", runs, callbacks=[stop], **options)
    first = dgf.load(tmp_path / "a" / "critic")
    assert first.method.name == "gan" and first.state.step == 2 and first.method.config.critic_width == 6
    monkeypatch.setattr(gan.GAN, "step", None)  # it is not trained again
    run = tune("method2", tmp_path / "a", runs, resume=True, **options)
    shutil.move(tmp_path / "a" / "critic", tmp_path / "critic")  # nor needed any more
    longer = tune("method2", tmp_path / "a", runs, resume=True, **{**options, "steps": 4})
    given = tune("method2", tmp_path / "b", runs, critic=first, seed=3, steps=4)
    assert run.state.step == 2 and longer.state.step == 4
    assert all(same_weights(longer.state[part], given.state[part]) for part in ("denoiser", "critic"))
    assert not (tmp_path / "a" / "critic").exists() and not (tmp_path / "b" / "critic").exists()
    stored = [json.loads((tmp_path / name / "config.json").read_text())["critic"] for name in "ab"]
    assert stored[0] == stored[1] == {"step": 2, "weights": fingerprint(first.state["critic"])}
    other = nets.DCGANCritic(1, 8, width=6)
    with pytest.raises(ValueError, match="other settings .given"):
        tune("method2", tmp_path / "a", runs, resume=True, critic=other, **{**options, "steps": 5})
    base, wrong = runs
    with pytest.raises(ValueError, match=r"other settings \(critic, critic_width\).* started with base= and critic="):
        tune("method2", tmp_path / "a", runs, resume=True, critic=wrong, seed=3, steps=5)


@pytest.mark.parametrize(
    "options", [dict(), dict(chain_mode="train", lr_schedule="cosine", warmup=2, clip_grad=0.1, ema=0.9)], ids=str
)
@pytest.mark.parametrize("name", NAMES)
def test_a_stopped_run_goes_on_bit_for_bit(name, options, runs, tmp_path):
    options = dict(options, steps=5, critic=runs[1], flip=True)
    whole = tune(name, tmp_path / "whole", runs, **options)

    def stop(run, row):
        if row["step"] == 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        tune(name, tmp_path / "cut", runs, callbacks=[stop], **{**options, "checkpoint_every": 3})
    torch.manual_seed(99)
    cut = tune(name, tmp_path / "cut", runs, resume=True, **options)
    for kind in ("nets", "ema"):
        a, b = getattr(whole.state, kind), getattr(cut.state, kind)
        assert a.keys() == b.keys() and all(same_weights(a[part], b[part]) for part in a)
    rows = [[{k: v for k, v in row.items() if k != "seconds"} for row in run.history] for run in (whole, cut)]
    assert rows[0] == rows[1] and [row["step"] for row in rows[0]] == [1, 2, 3, 4, 5]
    assert torch.equal(whole.sample(3), cut.sample(3))


def test_the_presets_are_the_documents_settings():
    """As its notebook has them: T = 300 linear in [0, 1], ten images a step, clamped before they are judged."""
    for name, own in (
        ("method1", dict(lr=1e-4, adam_beta1=0.9)),
        ("method2", dict(lr=1e-5, adam_beta1=0.5, critic_lr=1e-5)),
    ):
        kind, steps = dgf.methods.find(name), {"method1": 10, "method2": 50}[name]
        coded = dict(judged="clamped", chain_mode="train", critic_start="pretrained", grad_steps=None, batch_size=10)
        by_hand.check_options(kind.Config.make("as-coded"), steps=steps, **by_hand.NOTEBOOK, **own, **coded)
        ours = dict(judged="raw", chain_mode="eval", critic_start="pretrained", grad_steps=None)
        by_hand.check_options(kind.Config.make("student"), **by_hand.NOTEBOOK, **own, **ours)
    kind = dgf.methods.find("method2")
    method = kind(kind.Config.make("as-coded"), (1, 28, 28))
    networks = method.networks({})
    assert sum(p.numel() for p in networks["critic"].parameters()) == 661_248
    assert [o.param_groups[0]["betas"] for o in method.optimizers(networks).values()] == [(0.5, 0.999)] * 2
