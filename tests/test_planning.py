"""The plan of a run: what is counted against what is known, and what is extrapolated against whole chains."""

import functools
import math

import pytest
import torch

import diffgan_fast as dgf
from diffgan_fast import planning

CPU = torch.device("cpu")
SMALL = dict(width=8, T=20, subset=64, critic_width=8, critic_start="scratch")


def test_the_peak_counts_tensors_alive_at_the_same_time():
    w = torch.randn(100, 100, requires_grad=True)

    def call():
        x = torch.randn(100, 100)  # one
        for _ in range(5):
            torch.randn(200, 100)  # two more, freed each time
        y = (x @ w).relu()  # product and its relu, of which the product goes
        y.sum().backward()  # the gradient of y, of the product (the same shape), of w

    unit = 100 * 100 * 4
    assert 4 * unit <= planning.peak_memory(call, CPU) <= 5.1 * unit


def test_the_extrapolation_meets_the_whole_chain():
    kind = dgf.methods.find("method2")
    config = kind.Config.make(batch_size=8, **{k: v for k, v in SMALL.items() if k != "subset"})
    plan = planning.measure(kind(config, (1, 8, 8)), dict, 0, CPU, tries=1)
    assert {row.recompute for row in plan.rows} == {"none", "step", 4}
    for row in plan.rows:
        whole = kind(kind.Config.make(**{**config.to_dict(), "recompute": row.recompute}), (1, 8, 8))
        peak, _ = planning._probe(whole, {}, 0, CPU, tries=0)
        assert row.peak == pytest.approx(peak, rel=0.03)
        assert row.seconds > 0 and plan.fits(row)


def test_a_plan_writes_nothing_and_leaves_the_networks_alone(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    net = dgf.nets.UNet.preset(8, 1, width=8)
    before = {k: v.clone() for k, v in net.state_dict().items()}
    plan = dgf.plan("method2", "digits", model=net, batch_size=4, **{k: v for k, v in SMALL.items() if k != "width"})
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())
    assert not list(tmp_path.iterdir())
    text = str(plan)
    assert "method2, batch 4, cpu" in text and all(word in text for word in ("none", "step", "MiB", "yes"))
    assert plan.recompute == plan.rows[0].recompute
    assert [row.seconds for row in plan.rows] == sorted(row.seconds for row in plan.rows)


@pytest.mark.parametrize("method", ["method3", "method4"])
def test_steps_of_both_networks_are_measured(method):
    """Not the first ones, in which the critic trains alone: they take a fraction of the memory."""
    options = dict(width=8, T=4, batch_size=4, subset=16, critic_width=8)
    (later,), (first,) = (dgf.plan(method, critic_steps=n, **options).rows for n in (0, 400))
    assert later.peak == first.peak


def no_room_for(method, batch, monkeypatch):
    """Steps of `batch` samples and more with plain autograd, or of more than twice as many, are out of memory."""
    kind, step = dgf.methods.find(method), dgf.methods.find(method).step

    def limited(self, state, batch_, key):
        c = self.config
        if c.batch_size >= (batch if getattr(c, "recompute", "") == "none" else 2 * batch):
            raise torch.OutOfMemoryError("CUDA out of memory")
        return step(self, state, batch_, key)

    monkeypatch.setattr(kind, "step", limited)


def test_plain_autograd_that_is_out_of_memory_leaves_the_others(monkeypatch):
    no_room_for("method2", 6, monkeypatch)
    options = {k: v for k, v in SMALL.items() if k != "subset"}
    plan = dgf.plan("method2", batch_size=6, subset=16, **options)
    assert plan.rows[-1] == planning.Row("none", math.inf, math.inf) and not plan.fits(plan.rows[-1])
    assert plan.recompute in ("step", 4) and len(plan.rows) == 3
    assert "inf" not in str(plan) and "nan" not in str(plan)
    with pytest.raises(dgf.TrainingError, match="a step at batch_size 12 does not fit into the memory of cpu"):
        dgf.plan("method2", batch_size=12, subset=16, **options)
    with pytest.raises(dgf.TrainingError, match="a step at batch_size 8 does not fit"):
        dgf.plan("method2", batch_size="auto", recompute="none", subset=16, **options)


def test_a_plan_of_the_largest_batch(monkeypatch):
    monkeypatch.setattr(planning, "largest_batch", lambda *_: 6)
    plan = dgf.plan("ddpm", batch_size="auto", width=8, T=4, subset=16)
    assert plan.batch_size == 6


def test_what_does_not_fit_is_not_chosen():
    rows = (planning.Row("none", 1000, 1.0), planning.Row("step", 90, 2.0))
    plan = planning.Plan("method2", 1, 1, CPU, 100, rows)
    assert plan.recompute == "step"
    assert planning.Plan("method2", 1, 1, CPU, 10, rows).recompute is None


@pytest.mark.parametrize("method", ["ddpm", "method3.5", "discriminator-guidance", "gan"])
def test_methods_without_a_chain_have_one_row(method):
    options = dict(width=8) if method != "ddpm" else dict(width=8, T=10)
    if method == "discriminator-guidance":
        options |= dict(T=4)
    (row,) = dgf.plan(method, "digits", batch_size=4, subset=16, **options).rows
    assert row.recompute is None and row.peak > 0 and row.seconds > 0


def test_the_largest_batch_fits_and_a_larger_one_does_not(monkeypatch):
    kind = dgf.methods.find("method2")
    options = {k: v for k, v in SMALL.items() if k != "subset"} | {"T": 4}
    method = kind(kind.Config.make(**options), (1, 8, 8))
    larger = kind(kind.Config.make(**options, batch_size=23), (1, 8, 8))
    room, _ = planning._probe(larger, {}, 0, CPU, tries=0)
    monkeypatch.setattr(planning, "free_memory", lambda device: room / planning.SHARE)
    assert planning.largest_batch(method, dict, 0, CPU, 1000) in (22, 23, 24)
    plain = dgf.methods.find("ddpm")
    method = plain(plain.Config.make(width=8, T=4), (1, 8, 8))
    assert planning.largest_batch(method, dict, 0, CPU, 7) == 7
    monkeypatch.setattr(planning, "free_memory", lambda device: 1000)
    with pytest.raises(dgf.TrainingError, match="not even one sample"):
        planning.largest_batch(method, dict, 0, CPU, 7)


def test_the_largest_batch_has_whole_groups_of_what_the_critic_compares(monkeypatch):
    monkeypatch.setattr(planning, "free_memory", lambda device: 2**40)
    kind = dgf.methods.find("ddgan")
    method = kind(kind.Config(width=8, critic_network="8"), (1, 8, 8))
    assert [planning.largest_batch(method, dict, 0, CPU, most) for most in (3, 7, 9)] == [3, 4, 8]


def test_a_batch_has_whole_groups_of_what_the_critic_compares():
    for method, options in (("ddgan", dict(critic_network="8", width=8)), ("gan", dict(network="stylegan2", width=8))):
        with pytest.raises(ValueError, match="^batch_size must be at most 4, the group that .*, or a multiple; got 6"):
            dgf.plan(method, data="digits", batch_size=6, **options)
        assert dgf.plan(method, data="digits", batch_size=3, **options).rows


def test_a_step_takes_the_mean_of_its_kinds(monkeypatch):
    """Of 12 steps, three with a penalty."""
    kind = dgf.methods.find("ddgan")
    step, slow = kind.step, []

    def timed(self, state, batch, key):
        slow.append(self.phase(state.step))
        return step(self, state, batch, key)

    monkeypatch.setattr(kind, "step", timed)
    monkeypatch.setattr(planning, "_seconds", lambda run: (run(), 5.0 if slow[-1] else 1.0)[1])
    (row,) = dgf.plan("ddgan", data="ring", width=8, critic_width=8, lazy_reg=4, steps=12, batch_size=4).rows
    assert row.seconds == (3 * 5.0 + 9 * 1.0) / 12


def test_an_automatic_batch_size_is_kept_on_resuming(tmp_path, monkeypatch):
    monkeypatch.setattr(planning, "largest_batch", lambda *_: 6)
    options = dict(width=8, T=4, subset=16, progress=False, sample_every=0)
    run = dgf.train("ddpm", out=tmp_path, batch_size="auto", steps=1, **options)
    assert run.method.config.batch_size == 6
    monkeypatch.setattr(planning, "largest_batch", lambda *_: 9)
    longer = dgf.train("ddpm", out=tmp_path, batch_size="auto", steps=2, resume=True, **options)
    assert longer.method.config.batch_size == 6 and longer.state.step == 2


def test_out_of_memory_ends_with_advice(tmp_path, monkeypatch):
    kind = dgf.methods.find("ddpm")

    def step(self, state, batch, key):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(kind, "step", step)
    with pytest.raises(dgf.TrainingError, match="out of memory at step 1: take a batch_size below 8; .*dgf.plan"):
        dgf.train("ddpm", out=tmp_path, batch_size=8, width=8, T=4, steps=1, subset=16, progress=False)


@pytest.mark.parametrize("advice", [dict(batch_size=4), dict(batch_size="auto"), dict(recompute="step")], ids=str)
def test_the_advice_can_be_followed_in_the_same_folder(advice, tmp_path, monkeypatch):
    """What was trained before the first step, the base, is used."""
    monkeypatch.setattr(planning, "largest_batch", lambda *_: 4)
    options = {k: v for k, v in SMALL.items() if k != "subset"} | dict(T=4, subset=16, progress=False, device="cpu")
    base = dgf.train("ddpm", out=tmp_path / "base", width=8, T=4, steps=1, subset=16, progress=False, device="cpu")
    no_room_for("method2", 6, monkeypatch)
    tune = functools.partial(dgf.train, "method2", out=tmp_path, base=base, steps=1, resume=True, **options)
    with pytest.raises(dgf.TrainingError, match="or recompute='step' or an int"):
        tune(batch_size=8, recompute="none")
    run = tune(**dict(batch_size=8, recompute="none") | advice)
    assert run.state.step == 1 and run.method.config.batch_size == (8 if "recompute" in advice else 4)
    assert dgf.load(tmp_path).method.config == run.method.config
    with pytest.raises(ValueError, match="other settings .batch_size"):
        tune(batch_size=5, recompute="step")


def test_memory_that_cannot_be_had_on_the_cpu_is_advised_on_too(tmp_path, monkeypatch):
    kind = dgf.methods.find("ddpm")
    monkeypatch.setattr(kind, "step", lambda *_: torch.empty(2**60, dtype=torch.uint8))
    with pytest.raises(dgf.TrainingError, match="out of memory at step 1"):
        dgf.train("ddpm", out=tmp_path, width=8, T=4, steps=1, subset=16, progress=False)
