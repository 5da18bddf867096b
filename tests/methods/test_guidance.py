"""Discriminator guidance against its algorithm written out in plain torch, and what its critic is worth."""

import json

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import diffgan_fast as dgf
from diffgan_fast import nets
from diffgan_fast.engine import Batch
from diffgan_fast.run import fingerprint
from tests.methods import by_hand
from tests.methods.by_hand import Denoiser, T, images, make, same_weights
from tests.ops import oracle

GUIDANCE = dgf.methods.find("discriminator-guidance")
TINY = dict(batch_size=8, log_every=1, sample_every=0, checkpoint_every=0, progress=False)
DATA = images(40, seed=1)


class Judge(nn.Module):
    """A smooth critic of x and t."""

    def __init__(self, pixels=64):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(pixels + 1, 8), nn.Tanh(), nn.Linear(8, 1))

    def forward(self, x, t, x_t=None):
        return self.layers(torch.cat((x.flatten(1), t[:, None] / 10), 1))[:, 0]


def noised(x, t, key, first=0):
    root, rest = by_hand.levels(t)
    return root * x + rest * by_hand.noise(x.shape, key, first)


def test_the_loss_for_a_loop_of_ones_own():
    critic, t = Judge(), torch.tensor([1, 3, 4, T])
    real, fake = images(4), images(4, seed=8)
    schedule = dgf.Schedule.linear(T, *by_hand.BETAS)
    loss = dgf.methods.guidance.losses(critic, real, fake, t, schedule, 9, first_sample=5)
    keys = [dgf.random.fold_in(9, name) for name in ("real", "fake")]
    on_real, on_fake = (critic(noised(x, t, k, 5), t) for x, k in zip((real, fake), keys, strict=True))
    want = by_hand.bce(on_real, 1.0) + by_hand.bce(on_fake, 0.0)
    torch.testing.assert_close(loss, want)
    by_hand.near(by_hand.gradient(loss, critic), by_hand.gradient(want, critic))


@pytest.mark.parametrize("options", [dict(), dict(data_range="unit", clip_x0=False)], ids=str)
def test_steps_are_those_of_plain_torch(options, tmp_path):
    """Three steps, with the critic that the method builds: losses, gradients, weights. And what prepare() draws."""
    torch.manual_seed(3)
    method, state = make(
        "discriminator-guidance", given={"denoiser": Denoiser()}, fakes=11, lr=0.01, critic_width=4, **options
    )
    method.prepare(state, 6, tmp_path)
    kept, hand = by_hand.Recording(state), by_hand.copies(state)
    critic, unit = hand["critic"], "data_range" in options
    denoiser = hand["denoiser"].eval()
    with torch.no_grad():
        fakes = by_hand.sample(denoiser, (11, 1, 8, 8), 6, clip_x0=not unit)
    stored = load_file(tmp_path / "fakes.safetensors")["samples"]
    torch.testing.assert_close(stored, ((2 * fakes - 1) if unit else fakes).clamp(-1, 1), rtol=0, atol=1e-4)

    optimizer, first = by_hand.adam(critic, 0.01, 0.9), 3
    for key in (7, 8, 9):
        x = images(6, seed=key)
        logged = method.step(state, Batch(x, None, first), key)
        chosen = oracle.uniform(6, dgf.random.fold_in(key, "fakes"), first)  # integers of the same words
        fake = torch.stack([stored[int(11 * u)] for u in chosen])
        t = torch.tensor([1 + int(T * u) for u in oracle.uniform(6, dgf.random.fold_in(key, "t"), first)])
        real, fake = ((x + 1) / 2, (fake + 1) / 2) if unit else (x, fake)
        plane = ((t - 1) / T).view(-1, 1, 1, 1).expand(-1, 1, 8, 8)
        seen = [noised(v, t, dgf.random.fold_in(key, n), first) for v, n in ((real, "real"), (fake, "fake"))]
        on_real, on_fake = (critic.main(torch.cat((v, plane), 1)) for v in seen)
        loss = by_hand.bce(on_real, 1.0) + by_hand.bce(on_fake, 0.0)
        by_hand.follow(critic, optimizer, loss, kept.gradients["critic"])
        torch.testing.assert_close(logged, {"critic_loss": loss}, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(state["critic"].state_dict(), critic.state_dict(), rtol=1e-5, atol=1e-6)
    assert same_weights(state["denoiser"], hand["denoiser"]) and state["denoiser"].training
    assert list(state.optimizers) == ["critic"] and not state.ema
    # a gradient in x must not depend on the other samples
    norms = [layer for layer in critic.main if isinstance(layer, nn.BatchNorm2d | nn.GroupNorm)]
    assert [type(layer) for layer in norms] == [nn.GroupNorm] and norms[0].num_groups == 1


@pytest.mark.parametrize(
    "options",
    [
        dict(guidance_weight=1.5, guide_from=0.5, logit_from=3),
        dict(guidance_weight=-0.0, guide_from=0.0, logit_from=1),
        dict(guidance_weight=2.0, guide_from=0.7, logit_from=5, prediction="v", variance="posterior"),
        dict(guidance_weight=1.0, guide_from=0.5, logit_from=3, sampler="ddim", eta=0.3, sample_steps=3),
        dict(guidance_weight=0.7, guide_from=1.0, logit_from=6, conditional=True, guidance_scale=3.0),
        dict(guidance_weight=0.7, guide_from=0.0, logit_from=1, data_range="unit", clip_x0=False),
    ],
    ids=str,
)
def test_samples_are_those_of_plain_torch(options):
    """The weight, from which t on it guides, and the denoiser's and the critic's eval mode."""
    torch.manual_seed(4)
    options, conditional = dict(options), "conditional" in options
    logit_from = options.pop("logit_from")
    critic = nn.ModuleDict({"judge": Judge(), "noise": nn.Dropout(0.5)})
    critic.forward = lambda x, t, x_t=None: 3 * critic["judge"](critic["noise"](x), t)
    classes = 3 if conditional else 0
    given = {"denoiser": Denoiser(classes=classes), "critic": critic}
    method, state = make("discriminator-guidance", given=given, classes=classes, **options)
    how = {k: options[k] for k in ("prediction", "variance", "sampler", "eta") if k in options}
    how |= {"kept": (0, 2, 4, 6)} if "sample_steps" in options else {}
    if conditional:
        how |= {"cond": {"y": torch.tensor([2, 0, 1, 2])}, "uncond": {"y": torch.full((4,), 3)}, "s": 3.0}
    x = method.sample(state, 4, 21, first=2)
    assert critic.training and state["denoiser"].training and not x.requires_grad
    denoiser, judge = state["denoiser"].eval(), critic.eval()

    def by_formulas(w, logit_from):
        with torch.no_grad():
            x = by_hand.sample(denoiser, (4, 1, 8, 8), 21, clip_x0=method.config.clip_x0, critic=judge, w=w,
                               logit_from=logit_from, first=2, **how)  # fmt: skip
        return (2 * x - 1 if "data_range" in options else x).clamp(-1, 1)

    w = options["guidance_weight"]
    torch.testing.assert_close(x, by_formulas(w, logit_from), rtol=0, atol=2e-4)
    differs = [(0.0, 1), (w, logit_from + 2)] if w else []  # the weight matters, and where it begins
    assert all((x - by_formulas(*others)).abs().max() > 1e-3 for others in differs)
    assert all(p.grad is None for net in state.nets.values() for p in net.parameters())


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    torch.manual_seed(8)
    folder = tmp_path_factory.mktemp("base")
    return dgf.train("ddpm", DATA, folder, model=Denoiser(), steps=3, T=5, ema=0.9, **TINY)


def tune(out, base, **options):
    options = {"steps": 4, "fakes": 12, "critic_width": 4, "base": base, **TINY, **options}
    return dgf.train("discriminator-guidance", DATA, out, **options)


def test_the_fakes_are_the_bases_samples_drawn_once(base, tmp_path, monkeypatch):
    whole = tune(tmp_path / "whole", base)
    path = tmp_path / "cut" / "fakes.safetensors"
    key = dgf.random.fold_in(dgf.random.key(0), "prepare")
    want = base.method.sample(base.state, 12, key)  # of the averaged weights, without guidance
    torch.testing.assert_close(load_file(tmp_path / "whole" / "fakes.safetensors")["samples"], want)

    def stop(run, row):
        if row["step"] == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        tune(tmp_path / "cut", base, callbacks=[stop])
    written = path.stat().st_mtime_ns
    drawn, draw = [], GUIDANCE.draw
    monkeypatch.setattr(GUIDANCE, "draw", lambda self, *a, **k: drawn.append(k) or draw(self, *a, **k))
    torch.manual_seed(99)
    cut = tune(tmp_path / "cut", base, resume=True)
    assert path.stat().st_mtime_ns == written
    assert len(drawn) == 2 and all(k.keys() >= {"on_step", "ema"} for k in drawn)  # the grid's and the strip's samples
    assert same_weights(cut.state["critic"], whole.state["critic"])
    rows = [[{k: v for k, v in row.items() if k != "seconds"} for row in run.history] for run in (whole, cut)]
    assert rows[0] == rows[1] and [row["step"] for row in rows[0]] == [1, 2, 3, 4]
    assert torch.equal(whole.sample(3), cut.sample(3))
    again = dgf.load(tmp_path / "cut", model=Denoiser())
    assert torch.equal(again.sample(5, seed=3), cut.sample(5, seed=3)) and not drawn.clear()
    assert fingerprint(cut.state["denoiser"]) == fingerprint(base.state.sampling_net("denoiser"))
    assert not same_weights(cut.state["denoiser"], base.state["denoiser"])  # which are not the averaged ones


def test_many_fakes_come_in_parts(base, tmp_path):
    tune(tmp_path, base, steps=0, fakes=1003)
    stored = load_file(tmp_path / "fakes.safetensors")["samples"]
    want = base.method.sample(base.state, 8, dgf.random.fold_in(dgf.random.key(0), "prepare"), first=995)
    assert stored.shape == (1003, 1, 8, 8) and len(stored.flatten(1).unique(dim=0)) == 1003
    torch.testing.assert_close(stored[995:], want, rtol=0, atol=1e-5)


def test_without_weight_it_samples_as_its_base(base, tmp_path):
    plain, guided = tune(tmp_path / "0", base, guidance_weight=0.0), tune(tmp_path / "1", base, guidance_weight=3.0)
    assert torch.equal(plain.sample(6, seed=2), base.sample(6, seed=2))
    assert same_weights(plain.state["critic"], guided.state["critic"])  # the weight concerns sampling alone
    assert not torch.allclose(guided.sample(6, seed=2), base.sample(6, seed=2), atol=1e-3)
    for change in (dict(ema=0.9), dict(lr_schedule="cosine"), dict(warmup=2), dict(clip_grad=1.0)):  # of a denoiser
        with pytest.raises(ValueError, match=f"{next(iter(change))} must be"):
            tune(tmp_path / "2", base, **change)
    with pytest.raises(ValueError, match="T is 5 in the base run"):
        tune(tmp_path / "2", base, T=6)
    assert not (tmp_path / "2").exists()


class Exact(nn.Module):
    """The best denoiser of images whose pixels are N(mean, 0.2^2)."""

    def __init__(self, mean, schedule):
        super().__init__()
        self.mean, self.abar = nn.Parameter(torch.tensor(mean)), schedule.alphas_cumprod.float()

    def forward(self, x, t):
        a = self.abar[t].view(-1, 1, 1, 1)
        return (1 - a).sqrt() * (x - a.sqrt() * self.mean) / (a * 0.04 + 1 - a)


class Linear(nn.Module):
    """Between two Gaussians of equal variance the best logit is linear: for each t a slope and a shift."""

    def __init__(self, T):
        super().__init__()
        self.table = nn.Embedding(T + 1, 2)
        nn.init.zeros_(self.table.weight)

    def forward(self, x, t, x_t=None):
        slope, shift = self.table(t).unbind(1)
        return slope * x.flatten(1).sum(1) + shift


def test_a_learned_critic_moves_a_wrong_denoiser_onto_the_data(tmp_path):
    """Data N(0.1, 0.2^2), a denoiser of N(-0.1, 0.2^2)."""
    data = (0.1 + 0.2 * dgf.random.normal((4000, 1, 4, 4), 3)).clamp(-1, 1)
    wrong = Exact(-0.1, dgf.Schedule.linear_scaled(20))
    run = dgf.train("discriminator-guidance", data, tmp_path, model=wrong, critic=Linear(20), steps=200, T=20,
                    fakes=4000, lr=0.03, batch_size=256, log_every=100, sample_every=0, checkpoint_every=0,
                    progress=False)  # fmt: skip
    assert float(load_file(tmp_path / "fakes.safetensors")["samples"].mean()) == pytest.approx(-0.1, abs=0.01)
    guided, alone = run.sample(1000, seed=4), run.method.draw(run.state, 1000, 4, {})
    assert float(alone.mean()) == pytest.approx(-0.1, abs=0.01)
    assert float(guided.mean()) == pytest.approx(0.1, abs=0.06)
    assert float(guided.std()) == pytest.approx(float(alone.std()), rel=0.05)
    assert wrong.mean.item() == pytest.approx(-0.1)
    assert json.loads((tmp_path / "config.json").read_text())["base"] is None


def test_from_which_t_on_the_critic_guides():
    for share, steps, want in (
        (0.01, 300, 3),
        (0.0, 300, 1),
        (0.55, 100, 55),
        (0.07, 100, 7),
        (0.071, 100, 8),
        (1, 9, 9),
    ):
        method, state = make("discriminator-guidance", given={"denoiser": Denoiser()}, guide_from=share, T=steps)
        assert method.reverse(state)["logit_from"] == want


def test_the_presets():
    paper, student = GUIDANCE.Config.make("paper"), GUIDANCE.Config.make("student")
    assert (paper.lr, paper.batch_size, paper.guidance_weight, paper.fakes) == (3e-4, 128, 2.0, 50_000)
    assert paper.steps * 128 == 60 * 100_000  # 60 epochs of as many real as generated images
    assert (student.lr, student.batch_size, student.guidance_weight) == (2e-4, 128, 1.5)
    assert (student.T, student.data_range, student.network, student.ema) == (300, "unit", "student", 0)
    assert isinstance(make("discriminator-guidance", given={"denoiser": Denoiser()})[1]["critic"], nets.DCGANCritic)
