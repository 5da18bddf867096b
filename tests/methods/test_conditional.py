"""Class-conditional denoisers: label dropout and classifier-free guidance. And the control run without a critic."""

import copy

import pytest
import torch
from torch import nn

import diffgan_fast as dgf
from diffgan_fast import nets
from diffgan_fast.engine import Batch
from diffgan_fast.methods.diffusion import noise_levels
from tests.methods import by_hand
from tests.methods.by_hand import Denoiser, T, images, make, same_weights
from tests.ops import oracle

TINY = dict(batch_size=8, log_every=1, sample_every=0, checkpoint_every=0, progress=False)
LABELS = torch.arange(40) % 3
DATA = dgf.data.load(images(40, seed=1).numpy(), labels=LABELS.numpy())


class Told(Denoiser):
    """A denoiser of three classes that remembers what it was told."""

    def __init__(self):
        super().__init__(classes=3)
        self.seen = []

    def forward(self, x, t, y):
        self.seen.append((t, y))
        return super().forward(x, t, y)


# Training: labels and their dropout.


@pytest.mark.parametrize("share", (0.0, 0.1, 0.37, 1.0))
def test_the_share_of_dropped_labels(share):
    method, _ = make("ddpm", given={"denoiser": Denoiser(classes=3)}, classes=3, conditional=True, label_dropout=share)
    y = torch.arange(20_000) % 3
    told = method.condition(y, 5)["y"]
    assert ((told == 3) | (told == y)).all()
    dropped = (told == 3).double()
    assert abs(float(dropped.mean()) - share) <= 4 * (share * (1 - share) / 20_000) ** 0.5
    for label in range(3):  # whatever the class
        assert abs(float(dropped[y == label].mean()) - share) <= 4 * (share * (1 - share) / 6600) ** 0.5
    want = [float(u) < share for u in oracle.uniform(50, dgf.random.fold_in(5, "label"))]
    assert dropped[:50].bool().tolist() == want
    assert torch.equal(method.condition(y, None)["y"], y)  # sampling drops none


def test_label_dropout_does_not_depend_on_the_batch():
    method, _ = make("ddpm", given={"denoiser": Denoiser(classes=3)}, classes=3, conditional=True, label_dropout=0.5)
    y = torch.arange(60) % 3
    whole = method.condition(y, 5)["y"]
    parts = [method.condition(y[a:b], 5, a)["y"] for a, b in ((0, 17), (17, 60))]
    assert torch.equal(torch.cat(parts), whole)
    assert not torch.equal(method.condition(y, 6)["y"], whole)
    assert torch.equal(method.condition(y, 5)["y"], whole) and y.max() == 2


@pytest.mark.parametrize("prediction", ("eps", "v"))
def test_steps_of_a_conditional_ddpm_are_those_of_plain_torch(prediction):
    torch.manual_seed(6)
    method, state = make("ddpm", given={"denoiser": Told()}, classes=3, conditional=True, label_dropout=0.5, lr=0.01,
                         adam_beta1=0.6, prediction=prediction)  # fmt: skip
    kept, hand = by_hand.Recording(state), by_hand.copies(state)["denoiser"]
    optimizer, first = by_hand.adam(hand, 0.01, 0.6), 4
    for key in (7, 8):
        x0, y = images(12, seed=key), torch.arange(12) % 3
        logged = method.step(state, Batch(x0, y, first), key)
        draws = {name: oracle.uniform(12, dgf.random.fold_in(key, name), first) for name in ("t", "label")}
        t = torch.tensor([1 + int(T * u) for u in draws["t"]])
        told = torch.where(torch.tensor(draws["label"]) < 0.5, 3, y)
        assert 0 < (told == 3).sum() < 12
        eps, (root, rest) = by_hand.noise(x0.shape, dgf.random.fold_in(key, "noise"), first), by_hand.levels(t)
        out = hand(root * x0 + rest * eps, t, told)
        target = eps if prediction == "eps" else root * eps - rest * x0
        loss = ((out - target) ** 2).mean()
        by_hand.follow(hand, optimizer, loss, kept.gradients["denoiser"])
        torch.testing.assert_close(logged, {"loss": loss}, rtol=1e-4, atol=1e-5)
        assert torch.equal(state["denoiser"].seen[-1][1], told)
    torch.testing.assert_close(state["denoiser"].state_dict(), hand.state_dict(), rtol=1e-5, atol=1e-6)


def test_adam_beta1_of_the_ddpm():
    for options, beta1 in ((dict(), 0.9), (dict(adam_beta1=0.5), 0.5)):
        _, state = make("ddpm", given={"denoiser": Denoiser()}, **options)
        assert state.optimizers["denoiser"].param_groups[0]["betas"] == (beta1, 0.999)


def test_the_loss_takes_a_condition():
    net, x0, y, t = Denoiser(classes=3), images(4), torch.tensor([2, 0, 3, 1]), torch.tensor([1, 2, 4, T])
    got = dgf.methods.ddpm.losses(net, x0, t, dgf.Schedule.linear(T, *by_hand.BETAS), 9, cond={"y": y}, first_sample=2)
    eps, (root, rest) = by_hand.noise(x0.shape, 9, 2), by_hand.levels(t)
    torch.testing.assert_close(got, ((net(root * x0 + rest * eps, t, y) - eps) ** 2).mean())


# Sampling: labels and guidance.


@pytest.mark.filterwarnings("ignore:the schedule leaves")
@pytest.mark.parametrize(
    "options",
    [
        dict(),
        dict(guidance_scale=3.0),
        dict(guidance_scale=0.4, variance="posterior", prediction="v"),
        dict(guidance_scale=2.0, sampler="ddim", eta=0.5, sample_steps=3),
        dict(guidance_scale=2.0, data_range="unit", clip_x0=False),
        dict(guidance_scale=0.0),
    ],
    ids=str,
)
def test_samples_are_those_of_plain_torch(options, tmp_path):
    torch.manual_seed(2)
    options = {**by_hand.LINEAR, "conditional": True, "steps": 0, "ema": 0.0, **options, **TINY}
    run = dgf.train("ddpm", DATA, tmp_path, model=Told(), **options)
    how = {k: options[k] for k in ("prediction", "variance", "sampler", "eta") if k in options}
    how |= {"kept": (0, 2, 4, 6)} if "sample_steps" in options else {}
    how |= {"uncond": {"y": torch.full((5,), 3)}, "s": options.get("guidance_scale", 1.0)}
    how |= {"clip_x0": options.get("clip_x0", True), "first": 7}
    net, key = copy.deepcopy(run.state["denoiser"]).eval(), dgf.random.fold_in(dgf.random.key(4), "sample")

    def want(y):
        with torch.no_grad():
            x = by_hand.sample(net, (5, 1, 8, 8), key, cond={"y": y}, **how)
        return (2 * x - 1 if "data_range" in options else x).clamp(-1, 1)

    y = torch.tensor([2, 0, 0, 1, 2])
    x = run.sample(5, seed=4, first=7, labels=y)
    torch.testing.assert_close(x, want(y), rtol=0, atol=2e-4)
    torch.testing.assert_close(run.sample(5, seed=4, first=7), want(torch.tensor([1, 2, 0, 1, 2])), rtol=0, atol=2e-4)
    if options.get("guidance_scale") == 0:  # no class at all
        assert torch.equal(x, run.sample(5, seed=4, first=7))
    else:
        assert not torch.allclose(x, run.sample(5, seed=4, first=7), atol=1e-3)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A conditional ddpm, hardly trained."""
    torch.manual_seed(8)
    options = dict(model=Denoiser(classes=3), steps=3, T=5, conditional=True, label_dropout=0.3, **TINY)
    return dgf.train("ddpm", DATA, tmp_path_factory.mktemp("base"), **options)


def test_labels_of_samples(base):
    whole = base.sample(7, seed=1)
    assert torch.equal(whole, base.sample(7, seed=1, labels=[0, 1, 2, 0, 1, 2, 0]))
    near_enough = dict(rtol=0, atol=1e-5)
    torch.testing.assert_close(base.sample(7, seed=1, batch=3), whole, **near_enough)
    torch.testing.assert_close(base.sample(3, seed=1, first=4), whole[4:], **near_enough)  # in turn by number
    twos = base.sample(7, seed=1, labels=2)
    for labels in ([2] * 7, torch.full((7,), 2), (2,) * 7, torch.tensor(2)):
        assert torch.equal(base.sample(7, seed=1, labels=labels), twos)
    torch.testing.assert_close(base.sample(7, seed=1, labels=2, batch=2), twos, **near_enough)
    torch.testing.assert_close(twos[2::3], whole[2::3], **near_enough)
    assert not torch.allclose(twos[0], whole[0], atol=1e-3)
    mixed = base.sample(7, seed=1, labels=[0, 2, 2, 2, 1, 0, 0], batch=4)
    torch.testing.assert_close(mixed[1:4], twos[1:4], **near_enough)


@pytest.mark.parametrize("labels", [3, -1, [0, 1], [0, 1, 3], 1.0, torch.zeros(3), torch.zeros(3, 1).long(), True, []])
def test_bad_labels_are_named(base, labels):
    with pytest.raises(ValueError, match="labels must be one int or 3 ints in 0..2"):
        base.sample(3, labels=labels)


def test_labels_of_a_run_that_is_told_none(tmp_path):
    run = dgf.train("ddpm", DATA, tmp_path, model=Denoiser(), steps=0, T=5, **TINY)
    with pytest.raises(ValueError, match="labels must be None: this run's denoiser is told no class"):
        run.sample(3, labels=1)
    run = dgf.train("ddpm", DATA.values, tmp_path / "unlabelled", model=Denoiser(), steps=0, T=5, **TINY)
    with pytest.raises(ValueError, match="labels must be None: the data .* have no classes"):
        run.sample(3, labels=1)


# A class decides the image.


class Levels(nn.Module):
    """x0_hat is one grey a class: what a class-conditional network can learn at once."""

    def __init__(self):
        super().__init__()
        self.grey = nn.Embedding(4, 1)
        nn.init.zeros_(self.grey.weight)

    def forward(self, x, t, y):
        return self.grey(y)[:, :, None, None] + 0 * x


def test_samples_of_a_class_are_of_that_class(tmp_path):
    grey = torch.tensor([-0.8, 0.0, 0.6])
    y = torch.arange(300) % 3
    data = dgf.data.load(grey[y].view(-1, 1, 1, 1).expand(-1, 1, 8, 8).numpy().copy(), labels=y.numpy())
    common = dict(steps=200, T=20, batch_size=64, ema=0.0, lr=0.03, conditional=True, sample_every=0, progress=False)
    run = dgf.train("ddpm", data, tmp_path / "a", model=Levels(), prediction="x0", **common)
    means = run.sample(30, seed=1).mean((1, 2, 3))
    torch.testing.assert_close(means, grey.repeat(10), rtol=0, atol=0.05)
    assert run.sample(4, labels=2).mean().item() == pytest.approx(0.6, abs=0.05)
    nobody = run.state["denoiser"].grey.weight[3].item()  # learnt on the images whose class was left out
    assert nobody == pytest.approx(float(grey.mean()), abs=0.1)
    guided = dgf.train("ddpm", data, tmp_path / "b", base=run, model=Levels(), steps=0, progress=False)
    assert torch.equal(guided.sample(5), run.sample(5))


def test_the_u_net_learns_its_classes(tmp_path):
    """With a network of the library: dark and bright images."""
    y = torch.arange(64) % 2
    dark_bright = ((1.4 * y - 0.7).view(-1, 1, 1, 1) + 0.1 * images(64)).clamp(-1, 1)
    data = dgf.data.load(dark_bright.numpy(), labels=y.numpy())
    run = dgf.train("ddpm", data, tmp_path, steps=30, T=5, width=8, batch_size=32, lr=1e-2, ema=0.0, prediction="x0",
                    conditional=True, sample_every=0, progress=False)  # fmt: skip
    assert run.state["denoiser"].num_classes == 2
    means = run.sample(24, seed=1).mean((1, 2, 3))
    assert (means[::2] < -0.35).all() and (means[1::2] > 0.35).all()
    assert (run.sample(12, seed=1, labels=0).mean((1, 2, 3)) < -0.35).all()


# What fine-tunes a conditional base.

TUNING = {
    "method1": dict(critic_start="scratch", critic_width=4),
    "method2": dict(critic_start="scratch", critic_width=4, recompute=2),
    "method3": dict(critic_steps=1, critic_width=4),
    "method3.5": dict(critic_steps=1, critic_width=4),
    "method4": dict(critic_width=4),
    "discriminator-guidance": dict(critic_width=4, fakes=9),
}


@pytest.mark.parametrize("name", TUNING)
def test_every_method_tunes_a_conditional_base(base, name, tmp_path):
    model = Told()
    run = dgf.train(name, DATA, tmp_path, base=base, model=model, steps=2, **TUNING[name], **TINY)
    c = run.method.config
    assert (c.conditional, c.label_dropout, c.T) == (True, 0.3, 5)
    trains = name != "discriminator-guidance"
    assert same_weights(model, base.state.sampling_net("denoiser")) != trains
    again = dgf.load(tmp_path, model=Told())
    assert torch.equal(again.sample(4, labels=[0, 0, 1, 2]), run.sample(4, labels=[0, 0, 1, 2]))
    assert not torch.allclose(run.sample(1, labels=0), run.sample(1, labels=1), atol=1e-4)
    seen = torch.cat([y for _, y in model.seen])
    assert 0 <= int(seen.min()) and int(seen.max()) <= 3
    for change in (dict(conditional=False), dict(guidance_scale=2.0), dict(label_dropout=0.0)):
        with pytest.raises(ValueError, match=f"{next(iter(change))} is .* in the base run"):
            dgf.train(name, DATA, tmp_path / "x", base=base, model=Told(), **change, **TINY)


@pytest.mark.parametrize("name, dropped", [("method2", False), ("method3.5", True), ("method4", True)])
def test_what_the_denoiser_is_told_in_tuning(name, dropped):
    """Methods 3 to 4 train it with label dropout, and the chain of 1 and 2 draws images of the batch's classes."""
    net = Told()
    options = {**TUNING[name], "conditional": True, "label_dropout": 0.5}
    method, state = make(name, given={"denoiser": net}, classes=3, **options)
    state.step, y, key = 1, torch.arange(16) % 3, 9
    method.step(state, Batch(images(16), y, 3), key)
    u = torch.tensor(oracle.uniform(16, dgf.random.fold_in(key, "label"), 3))
    want = torch.where(u < 0.5, 3, y) if dropped else y
    assert net.seen and all(torch.equal(told, want) for _, told in net.seen)


@pytest.mark.parametrize("inputs", ("eps", "eps,t", "eps,x_t,t"))
def test_method_35_of_a_conditional_denoiser(inputs):
    """A step, written out: two losses, by a critic that also sees x_t and t."""
    torch.manual_seed(1)
    method, state = make("method3.5", given={"denoiser": Told()}, classes=3, conditional=True, label_dropout=0.4,
                         inputs=inputs, critic_steps=0, critic_width=4, lr=0.01, critic_lr=0.02)  # fmt: skip
    kept, hand, key = by_hand.Recording(state), by_hand.copies(state), 7
    denoiser, critic = hand["denoiser"], hand["critic"]
    x0, y = images(10), torch.arange(10) % 3
    logged = method.step(state, Batch(x0, y), key)

    t = torch.tensor([1 + int(T * u) for u in oracle.uniform(10, dgf.random.fold_in(key, "t"))])
    told = torch.where(torch.tensor(oracle.uniform(10, dgf.random.fold_in(key, "label"))) < 0.4, 3, y)
    eps, (root, rest) = by_hand.noise(x0.shape, dgf.random.fold_in(key, "noise")), by_hand.levels(t)
    x_t = root * x0 + rest * eps
    eps_hat = denoiser(x_t, t, told)

    def judge(noise):
        parts = {"eps": noise, "x_t": x_t, "t": ((t - 1) / T).view(-1, 1, 1, 1).expand(-1, 1, 8, 8)}
        return critic.main(torch.cat([parts[name] for name in inputs.split(",")], 1)).flatten()

    want = {"critic_loss": by_hand.bce(judge(eps), 1.0) + by_hand.bce(judge(eps_hat.detach()), 0.0)}
    by_hand.follow(critic, by_hand.adam(critic, 0.02), want["critic_loss"], kept.gradients["critic"])
    want["denoiser_loss"] = by_hand.bce(judge(eps_hat), 1.0)
    by_hand.follow(denoiser, by_hand.adam(denoiser, 0.01), want["denoiser_loss"], kept.gradients["denoiser"])
    torch.testing.assert_close(logged, want, rtol=1e-4, atol=1e-5)
    for part in hand:
        torch.testing.assert_close(state[part].state_dict(), hand[part].state_dict(), rtol=1e-5, atol=2e-6, msg=part)


def test_the_documents_conditional_networks():
    """Its conditional U-Net, and its critic of noise, image and time."""
    kind = dgf.methods.find("method3.5")
    config = kind.Config.make("as-coded", conditional=True, inputs="eps,x_t,t", guidance_scale=5.0)
    networks = kind(config, (1, 28, 28), 10).networks({})
    counts = {name: sum(p.numel() for p in net.parameters()) for name, net in networks.items()}
    assert counts == {"denoiser": 1_759_937, "critic": 663_296} and config.label_dropout == 0.1


# Errors.


def test_conditional_needs_labels(tmp_path):
    unlabelled, points = images(20), torch.rand(20, 2)
    for name in ("ddpm", "method1", "method3.5", "discriminator-guidance"):
        with pytest.raises(ValueError, match="conditional must be False: the data have no labels"):
            dgf.train(name, unlabelled, tmp_path / name, conditional=True, **TINY)
    for model in (Told(), None):
        with pytest.raises(ValueError, match="conditional must be False: the data have no labels"):
            dgf.train("ddpm", unlabelled, tmp_path / "own", model=model, conditional=True, steps=0, **TINY)
    for name in ("ddpm", "gan-enhanced"):
        for data in (points, "moons"):
            with pytest.raises(ValueError, match="conditional must be False"):
                dgf.train(name, data, tmp_path / "points", conditional=True, **TINY)
    assert not any(tmp_path.iterdir())
    with pytest.raises(ValueError, match="guidance_scale must be 1 unless conditional"):
        make("ddpm", classes=3, guidance_scale=2.0)
    with pytest.raises(ValueError, match="label_dropout must be 0..1"):
        make("ddpm", classes=3, conditional=True, label_dropout=1.5)


def test_denoisers_that_are_not_conditional_are_told_nothing(tmp_path):
    """Labels of the data do not matter then, and its networks have none."""
    method, state = make("ddpm", classes=3, network="unet", width=8)
    assert state["denoiser"].num_classes == 0 and method.condition(torch.zeros(4).long(), 3) == {}
    assert method.guidance(None) == {"cond": {}, "uncond": {}}
    method, state = make("ddpm", (1, 28, 28), classes=3, network="student", conditional=True)
    assert isinstance(state["denoiser"], nets.StudentUNet) and state["denoiser"].num_classes == 3


# The control: the base trained on without a critic.


@pytest.mark.parametrize("classes", (0, 3))
def test_a_ddpm_goes_on_from_a_base(classes, tmp_path):
    torch.manual_seed(3)
    common = dict(data=DATA, conditional=bool(classes), **TINY)
    base = dgf.train("ddpm", out=tmp_path / "base", model=Denoiser(classes=classes), steps=4, T=5, ema=0.5, **common)
    start = base.state.sampling_net("denoiser")
    assert not same_weights(start, base.state["denoiser"])  # it starts from the averaged weights
    options = dict(base=base, lr=0.01, adam_beta1=0.5, ema=0.0, **TINY)
    zero = dgf.train("ddpm", DATA, tmp_path / "0", model=Denoiser(classes=classes), steps=0, **options)
    assert same_weights(zero.state["denoiser"], start) and zero.method.config.T == 5
    assert torch.equal(zero.sample(4), base.sample(4))
    before = copy.deepcopy(start.state_dict())
    run = dgf.train("ddpm", DATA, tmp_path / "1", model=Denoiser(classes=classes), steps=1, **options)
    assert all(torch.equal(v, before[k]) for k, v in start.state_dict().items())
    pairs = zip(run.state["denoiser"].parameters(), start.parameters(), strict=True)
    moved = max((a - b).abs().max().item() for a, b in pairs)
    assert moved == pytest.approx(0.01, rel=1e-3)  # the first step of a fresh Adam
    assert run.state.optimizers["denoiser"].param_groups[0]["betas"] == (0.5, 0.999)
    with pytest.raises(ValueError, match="T is 5 in the base run"):
        dgf.train("ddpm", DATA, tmp_path / "x", model=Denoiser(classes=classes), **{**options, "T": 6})
    assert dgf.load(tmp_path / "1", model=Denoiser(classes=classes)).state.step == 1


def test_noise_levels_are_told_the_classes():
    net = Told()
    method, _ = make("ddpm", given={"denoiser": net}, classes=3, conditional=True, label_dropout=1.0)
    y = torch.tensor([2, 0, 1, 1])
    rows = noise_levels(method, net, Batch(images(4), y), 5, levels=3)
    assert rows["t"] == [2, 4, 6] and all(torch.equal(told, y) for _, told in net.seen)
