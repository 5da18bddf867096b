"""Method 4 against its algorithm written out in plain torch."""

import pytest
import torch
from torch import nn

import diffgan_fast as dgf
from diffgan_fast import nets
from diffgan_fast.engine import Batch
from tests.methods import by_hand
from tests.methods.by_hand import ALPHA, BETA, Denoiser, T, images, make, same_weights
from tests.ops import oracle

S = dgf.Schedule.linear(T, *by_hand.BETAS)
METHOD4 = dgf.methods.find("method4")


class Judge(nn.Module):
    """A critic that remembers what it was shown."""

    def __init__(self, dtype=torch.float32):
        super().__init__()
        self.layer, self.seen = nn.Linear(64, 1, dtype=dtype), []

    def forward(self, x, t=None, x_t=None):
        self.seen.append((x, t, x_t))
        return self.layer(x.flatten(1))[:, 0]


def step_by_hand(x_t, eps, t, z):
    """x_{t-1} of DDPM with variance beta_t, and none at t = 1 (Ho et al. 2020, Algorithm 2)."""
    alpha, beta = (torch.tensor(table, dtype=eps.dtype)[t].view(-1, 1, 1, 1) for table in (ALPHA, BETA))
    abar = torch.tensor(by_hand.ABAR, dtype=eps.dtype)[t].view(-1, 1, 1, 1)
    mean = (x_t - beta / (1 - abar).sqrt() * eps) / alpha.sqrt()
    return mean + torch.where(t.view(-1, 1, 1, 1) > 1, beta.sqrt(), torch.zeros_like(beta)) * z


def test_real_and_fake_differ_by_the_error_of_the_noise_alone():
    """-beta_t / sqrt(alpha_t (1 - abar_t)) (eps_hat - eps), for every t, in float64."""
    t = torch.arange(1, T + 1)
    x0 = torch.randn(T, 1, 8, 8, dtype=torch.float64)
    eps, z = (torch.tensor(oracle.normal(64 * T, k, 64 * 3)).view_as(x0) for k in (11, dgf.random.fold_in(11, "step")))
    abar = torch.tensor(by_hand.ABAR, dtype=torch.float64)[t].view(-1, 1, 1, 1)
    x_t = abar.sqrt() * x0 + (1 - abar).sqrt() * eps
    critic = Judge(torch.float64)
    loss, fooled = dgf.methods.method4.losses(
        lambda x, t: 0.3 * x.tanh(), critic, x0, t, S, 11, mse_weight=0.5, first_sample=3
    )
    (real, told, seen), (fake, *_) = critic.seen
    alpha, beta = (torch.tensor(table, dtype=torch.float64)[t].view(-1, 1, 1, 1) for table in (ALPHA, BETA))
    eps_hat = 0.3 * x_t.tanh()
    want = -beta / (alpha * (1 - abar)).sqrt() * (eps_hat - eps)
    torch.testing.assert_close(fake - real, want, rtol=1e-12, atol=1e-12)
    assert all(float(d.abs().max()) > 1e-3 for d in fake - real)
    torch.testing.assert_close(real, step_by_hand(x_t, eps, t, z), rtol=0, atol=1e-10)
    torch.testing.assert_close(seen, x_t, rtol=0, atol=1e-10)
    assert torch.equal(told, t)

    want = by_hand.bce(critic(real), 1.0) + by_hand.bce(critic(fake), 0.0)
    torch.testing.assert_close(loss, want)
    with torch.no_grad():
        critic.layer.weight.mul_(-3)  # stands for the critic's update
    want = by_hand.bce(critic(fake), 1.0) + 0.5 * ((eps_hat - eps) ** 2).mean()
    got = fooled()
    torch.testing.assert_close(got, want)
    assert not got.requires_grad and critic.layer.weight.requires_grad  # the critic's gradients are left alone


OPTIONS = [
    dict(),
    dict(forwards="two"),
    dict(inputs="x_prev,x_t,t", critic_depth=2, gan_loss="lsgan"),
    dict(prediction="v", mse_weight=0.3, data_range="unit", clip_x0=False),
    dict(prediction="x0", inputs="x_prev,t"),
    dict(critic_on=1, critic_off=1),
    dict(critic_steps=2),
    dict(conditional=True, label_dropout=0.0),
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_steps_are_those_of_plain_torch(options):
    """Three steps: losses, gradients, weights and running statistics."""
    torch.manual_seed(4)
    classes = 3 if options.get("conditional") else 0
    common = dict(lr=0.01, critic_lr=0.02, critic_width=4, **options)
    method, state = make("method4", given={"denoiser": Denoiser(classes=classes)}, classes=classes, **common)
    kept, hand = by_hand.Recording(state), by_hand.copies(state)
    denoiser, critic = hand["denoiser"], hand["critic"]
    optimizer, critic_optimizer = by_hand.adam(denoiser, 0.01), by_hand.adam(critic, 0.02)
    critic_loss, denoiser_loss = by_hand.LOSSES[options.get("gan_loss", "nonsaturating")]
    names, first = options.get("inputs", "x_prev").split(","), 2
    for key in (7, 8, 9):
        x, y = images(9, seed=key), torch.arange(9) % 3
        logged = method.step(state, Batch(x, y, first), key)

        x0 = (x + 1) / 2 if options.get("data_range") == "unit" else x
        u = oracle.uniform(9, dgf.random.fold_in(key, "t"), first)  # integers in [0, T) from the same words
        t = torch.tensor([1 + int(v * T) for v in u])
        eps, z = (by_hand.noise(x.shape, dgf.random.fold_in(key, name), first) for name in ("noise", "step"))
        root, rest = by_hand.levels(t)
        x_t = root * x0 + rest * eps
        cond = {"y": y} if classes else {}

        def predict(x_t=x_t, t=t, root=root, rest=rest, cond=cond):
            out = denoiser(x_t, t, **cond)
            return {"eps": out, "x0": (x_t - root * out) / rest, "v": root * out + rest * x_t}[method.config.prediction]

        def judge(shown, x_t=x_t, t=t):
            plane = ((t - 1) / T).view(-1, 1, 1, 1).expand(-1, 1, 8, 8)
            parts = {"x_prev": shown, "x_t": x_t, "t": plane}
            return critic.main(torch.cat([parts[name] for name in names], 1)).flatten()

        step, want = key - 7, {}
        alone, two = step < options.get("critic_steps", 0), options.get("forwards") == "two"
        if alone or two:
            denoiser.train(not two)
            with torch.no_grad():
                judged = predict()
            denoiser.train()
        if not alone:
            eps_hat = predict()
            judged = judged if two else eps_hat
        if alone or step % 2 == 0 or "critic_off" not in options:
            fake = step_by_hand(x_t, judged, t, z).detach()
            want["critic_loss"] = critic_loss(judge(step_by_hand(x_t, eps, t, z)), judge(fake))
            by_hand.follow(critic, critic_optimizer, want["critic_loss"], kept.gradients["critic"])
        if not alone:
            want["denoiser_loss"] = denoiser_loss(judge(step_by_hand(x_t, eps_hat, t, z)))
            want["denoiser_loss"] = want["denoiser_loss"] + options.get("mse_weight", 0) * ((eps_hat - eps) ** 2).mean()
            by_hand.follow(denoiser, optimizer, want["denoiser_loss"], kept.gradients["denoiser"])
        torch.testing.assert_close(logged, want, rtol=1e-4, atol=1e-5)
        state.step += 1
    for part in ("denoiser", "critic"):
        torch.testing.assert_close(state[part].state_dict(), hand[part].state_dict(), rtol=1e-5, atol=2e-6, msg=part)


def trained(steps, **options):
    """Which networks each of the first steps trains."""
    method, state = make("method4", given={"denoiser": Denoiser()}, critic_width=4, **options)
    done, rows = dict.fromkeys(("critic", "denoiser"), 0), []
    for key in range(steps):
        logged = method.step(state, Batch(images(2)), key)
        now = {name for name in done if state.updates[name] > done[name]}
        assert {f"{name}_loss" for name in now} == logged.keys()
        done.update(state.updates)
        rows.append("".join(sorted(name[0] for name in now)))
        state.step += 1
    return rows


def test_the_critic_trains_in_turn():
    assert trained(4) == ["cd"] * 4
    assert trained(7, critic_on=2, critic_off=1) == ["cd", "cd", "d", "cd", "cd", "d", "cd"]
    assert trained(5, critic_on=1, critic_off=3) == ["cd", "d", "d", "d", "cd"]
    assert trained(4, critic_steps=2) == ["c", "c", "cd", "cd"]
    for forwards in ("one", "two"):  # a step always trains something
        rows = trained(6, critic_steps=3, critic_on=1, critic_off=3, forwards=forwards)
        assert rows[:3] == ["c", "c", "c"] and all("d" in row for row in rows[3:])


def test_a_run_with_a_resting_critic(tmp_path):
    """Rows of every step, and a stop in the midst of the cycle."""
    options = dict(data=images(20), steps=9, batch_size=4, T=5, critic_width=4, critic_on=2, critic_off=3,
                   critic_steps=4, log_every=1, sample_every=0, checkpoint_every=0, progress=False)  # fmt: skip
    model = Denoiser()
    start = {k: v.clone() for k, v in model.state_dict().items()}
    whole = dgf.train("method4", out=tmp_path / "whole", model=model, **options)
    told = [sorted(k[0] for k in row if k.endswith("_loss")) for row in whole.history]
    assert told[:4] == [["c"]] * 4 and all("d" in row for row in told[4:]) and ["d"] in told

    def stop(run, row):
        if row["step"] == 7:
            raise KeyboardInterrupt

    again = Denoiser()
    again.load_state_dict(start)
    with pytest.raises(KeyboardInterrupt):
        dgf.train("method4", out=tmp_path / "cut", model=again, callbacks=[stop], **options)
    cut = dgf.train("method4", out=tmp_path / "cut", model=Denoiser(), resume=True, **options)
    assert all(same_weights(cut.state[name], whole.state[name]) for name in ("denoiser", "critic"))
    drop = ("seconds",)
    rows = [[{k: v for k, v in row.items() if k not in drop} for row in run.history] for run in (whole, cut)]
    assert rows[0] == rows[1] and torch.equal(whole.sample(3), cut.sample(3))


def test_what_the_critic_is_built_to_see():
    for inputs, planes in (("x_prev", 3), ("x_prev,t", 4), ("x_prev,x_t", 6), ("x_prev,x_t,t", 7)):
        method, state = make("method4", (3, 8, 8), {"denoiser": Denoiser(3)}, inputs=inputs, critic_width=4)
        assert state["critic"].main[0].in_channels == planes
    judge = Judge()
    method, state = make("method4", given={"denoiser": Denoiser(), "critic": judge})
    method.step(state, Batch(images(3)), 1)
    assert len(judge.seen) == 3 and all(t.shape == (3,) and x_t.shape == x.shape for x, t, x_t in judge.seen)
    assert [x.requires_grad for x, *_ in judge.seen] == [False, False, True]
    with pytest.raises(ValueError, match="inputs must be one of x_prev"):
        make("method4", inputs="eps")


def test_the_deep_critic():
    """Twice as wide, and a second convolution at each resolution."""

    def critic(preset):
        method = METHOD4(METHOD4.Config.make(preset), (1, 28, 28))
        return method.networks({"denoiser": Denoiser()})["critic"]

    convs = [layer for layer in critic("deep-critic").main if isinstance(layer, nn.Conv2d)]
    shapes = [(1, 128, 4), (128, 128, 3), (128, 256, 4), (256, 256, 3), (256, 512, 4), (512, 512, 3), (512, 1, 4)]
    assert [(c.in_channels, c.out_channels, c.kernel_size[0]) for c in convs] == shapes
    assert sum(p.numel() for p in critic("student").parameters()) == 661_248
    norms = [layer for layer in critic("deep-critic").main if isinstance(layer, nn.BatchNorm2d)]
    assert [n.num_features for n in norms] == [128, 256, 256, 512, 512]
    assert critic("deep-critic")(torch.rand(2, 1, 28, 28)).shape == (2,)
    own = nets.DCGANCritic(1, 8, width=4, depth=3)
    assert make("method4", given={"denoiser": Denoiser(), "critic": own})[1]["critic"] is own


def test_the_presets_are_the_documents_settings():
    """Its notebook: 10 epochs of MNIST at batch 128, D in the first of every five, G in all."""
    epoch = -(-60_000 // 128)
    own = dict(steps=10 * epoch, critic_on=epoch, critic_off=4 * epoch, critic_steps=0, batch_size=128, lr=1e-5,
               critic_lr=1e-4, forwards="two", inputs="x_prev", mse_weight=0.0, critic_init="default",
               critic_depth=1)  # fmt: skip
    by_hand.check_options(METHOD4.Config.make("as-coded"), **by_hand.NOTEBOOK, **own)
    method, state = make("method4", given={"denoiser": Denoiser()}, critic_width=4)
    assert [o.param_groups[0]["betas"] for o in state.optimizers.values()] == [(0.5, 0.999)] * 2
    for preset in ("paper", "student", "deep-critic"):
        common = dict(
            critic_steps=0, critic_on=1, critic_off=0, batch_size=128, T=300, ema=0.0, lr=1e-5, critic_lr=1e-4
        )
        by_hand.check_options(METHOD4.Config.make(preset), **common)
