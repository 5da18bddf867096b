"""The engine through its public face: a tiny network on the embedded digits."""

import contextlib
import json
import os
import signal
import threading

import pytest
import torch
from torch import nn

import diffgan_fast as dgf
from diffgan_fast.engine import checkpoint
from diffgan_fast.engine.feed import Order

TINY = dict(batch_size=16, T=10, log_every=2, sample_every=0, checkpoint_every=0, progress=False)


class Net(nn.Module):
    """A denoiser with everything that resume must bring back: weights, running statistics, dropout."""

    def __init__(self, channels=1):
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(channels + 1, 8, 3, padding=1),
            nn.BatchNorm2d(8),
            nn.SiLU(),
            nn.Dropout(0.2),
            nn.Conv2d(8, channels, 3, padding=1),
        )

    def forward(self, x, t):
        plane = (t.to(x.dtype) / 10).view(-1, 1, 1, 1).expand(-1, 1, *x.shape[2:])
        return self.body(torch.cat((x, plane), 1))


def weights(run):
    return {f"{k}.{n}": v for k, m in {**run.state.nets}.items() for n, v in m.state_dict().items()}


def same(a, b):
    a, b = weights(a), weights(b)
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def train(method, out, **options):
    if "model" not in options:
        options["model"] = Net()
    return dgf.train(method, **{"out": out, **TINY, **options})


METHODS = {
    "ddpm": {},
    "method3": dict(critic_steps=3, critic_width=8),
    "method3.5": dict(critic_steps=3, critic_width=8),
}


@pytest.mark.parametrize("method", METHODS)
def test_a_stopped_run_goes_on_bit_for_bit(method, tmp_path):
    """Ten steps in one go, and ten with a stop at seven: weights, averages, history and samples agree bit for bit."""
    torch.manual_seed(1)
    start = Net().state_dict()

    def net():
        model = Net()
        model.load_state_dict(start)
        return model

    options = dict(METHODS[method], flip=True, lr_schedule="cosine", clip_grad=1.0, checkpoint_every=7, warmup=3)
    whole = train(method, tmp_path / "whole", steps=10, model=net(), **options)

    def stop(run, row):
        if row["step"] == 8:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(method, tmp_path / "cut", steps=10, model=net(), callbacks=[stop], **options)
    torch.manual_seed(99)  # the caller's generator must not matter
    cut = train(method, tmp_path / "cut", steps=10, model=net(), resume=True, **options)
    assert same(whole, cut)
    assert all(
        torch.equal(a, b)
        for a, b in zip(whole.state.ema["denoiser"].parameters(), cut.state.ema["denoiser"].parameters(), strict=True)
    )
    assert torch.equal(whole.sample(5), cut.sample(5))
    drop = ("seconds", "gpu")
    rows = [[{k: v for k, v in row.items() if k not in drop} for row in run.history] for run in (whole, cut)]
    assert rows[0] == rows[1] and [row["step"] for row in rows[0]] == [2, 4, 6, 8, 10]


@pytest.mark.parametrize("conditional", [False, True])
def test_data_on_the_host_train_the_same_run(conditional, tmp_path):
    """In one go, and with a stop after which the data lie elsewhere: bit for bit what data on the device train."""
    options = dict(flip=True, steps=8, conditional=conditional)
    options |= dict(model=None, width=8, lr_schedule="cosine", label_dropout=0.3) if conditional else {}
    torch.manual_seed(1)
    whole = train("ddpm", tmp_path / "device", data_on="device", **options)
    torch.manual_seed(1)
    assert same(whole, train("ddpm", tmp_path / "host", data_on="host", **options))

    def stop(run, row):
        if row["step"] == 4:
            raise KeyboardInterrupt

    torch.manual_seed(1)
    with pytest.raises(KeyboardInterrupt):
        train("ddpm", tmp_path / "cut", data_on="host", callbacks=[stop], **options)
    assert same(whole, train("ddpm", tmp_path / "cut", data_on="device", resume=True, **options))
    torch.manual_seed(1)
    with pytest.raises(KeyboardInterrupt):
        train("ddpm", tmp_path / "again", data_on="device", callbacks=[stop], **options)
    assert same(whole, train("ddpm", tmp_path / "again", data_on="host", resume=True, **options))
    scores = [dgf.load(tmp_path / where, model=None if conditional else Net()).evaluate(20, metrics=["kid"])["kid"]
              for where in ("device", "host")]  # fmt: skip
    assert scores[0] == scores[1]


@pytest.mark.parametrize("end", ["complete", "interrupted", "a loss", "a step", "a gather"])
def test_no_thread_outlives_a_run(end, tmp_path, monkeypatch):
    """However it ends; and what fails in the thread ends the run with its own message."""

    def interrupt(run, row):
        if row["step"] < 10 and end != "a gather":  # some steps before the end it has gathered all
            assert any(thread.name == "batches" for thread in threading.enumerate())
        if end == "interrupted":
            os.kill(os.getpid(), signal.SIGTERM)

    class Bad(Net):
        def forward(self, x, t):
            if end == "a step":
                raise ArithmeticError("a fault of the network")
            return super().forward(x, t) * (float("nan") if end == "a loss" else 1.0)

    if end == "a gather":
        batch = Order.batch

        def failing(self, step):
            if step == 3 and threading.current_thread().name == "batches":
                raise OSError("a fault of the disk")
            return batch(self, step)

        monkeypatch.setattr(Order, "batch", failing)
    raised = {
        "interrupted": (KeyboardInterrupt, None),
        "a loss": (dgf.TrainingError, "not finite"),
        "a step": (ArithmeticError, "a fault of the network"),
        "a gather": (OSError, "a fault of the disk"),
    }
    kind, text = raised.get(end, (None, None))
    with pytest.raises(kind, match=text) if kind else contextlib.nullcontext():
        train("ddpm", tmp_path, steps=16, model=Bad(), data_on="host", callbacks=[interrupt])
    assert not [thread for thread in threading.enumerate() if thread.name == "batches"]


def test_a_run_can_be_made_longer(tmp_path):
    a = train("ddpm", tmp_path / "a", steps=9)
    torch.manual_seed(0)
    train("ddpm", tmp_path / "b", steps=4)
    with pytest.raises(ValueError, match="pass resume=True"):
        train("ddpm", tmp_path / "b", steps=9)
    b = train("ddpm", tmp_path / "b", steps=9, resume=True)
    assert b.state.step == 9 and a.history[-1]["images_seen"] == 9 * 16


def test_a_run_with_other_settings_is_not_resumed(tmp_path):
    train("ddpm", tmp_path, steps=2)
    for change, name in ((dict(lr=1e-5), "lr"), (dict(seed=3), "seed"), (dict(data="digits", subset=100), "subset")):
        with pytest.raises(ValueError, match=name):
            train("ddpm", tmp_path, steps=4, resume=True, **change)
    with pytest.raises(ValueError, match="other settings"):
        train("method3", tmp_path, steps=4, resume=True)


def test_load_gives_the_same_run(tmp_path):
    run = train("ddpm", tmp_path / "r", steps=3)
    again = dgf.load(tmp_path / "r", model=Net())
    assert same(run, again) and torch.equal(run.sample(4, seed=2), again.sample(4, seed=2))
    assert again.history == run.history and again.state.step == 3
    with pytest.raises(ValueError, match="your own 'denoiser'"):
        dgf.load(tmp_path / "r")
    with pytest.raises(ValueError, match="holds no run"):
        dgf.load(tmp_path)
    with pytest.raises(ValueError, match="does not fit network 'denoiser'"):
        dgf.load(tmp_path / "r", model=nn.Linear(2, 2))


def test_samples_are_numbered(tmp_path):
    run = train("ddpm", tmp_path, steps=2)
    whole = run.sample(7, seed=1, batch=3)
    assert whole.shape == (7, 1, 8, 8) and whole.abs().max() <= 1
    assert torch.allclose(whole[4:], run.sample(3, seed=1, first=4), atol=1e-5)
    assert not torch.equal(whole, run.sample(7, seed=2))
    with pytest.raises(ValueError, match="n must be at least 1"):
        run.sample(0)


def test_a_run_samples_in_other_ways(tmp_path):
    run = train("ddpm", tmp_path / "a", steps=2)
    how = dict(sampler="ddim", steps=3, eta=0.5)
    torch.manual_seed(0)  # the same network
    as_set = train("ddpm", tmp_path / "b", steps=2, sampler="ddim", sample_steps=3, eta=0.5)
    assert torch.equal(run.sample(4, **how), as_set.sample(4))
    assert not torch.equal(run.sample(4), run.sample(4, **how))
    usual, other = run.evaluate(40), run.evaluate(40, **how)
    assert other["sampling"] == how and usual["sampling"] == {} and usual["kid"] != other["kid"]
    assert run.evaluated(40) == {**usual, "sample_seconds": run.evaluated(40)["sample_seconds"]}  # not that of `other`
    for change, message in [
        (dict(sample_steps=3), "no options of sampling by method 'ddpm': sample_steps .there are: sampler, steps, eta"),
        (dict(logit_scale=2.0), "no options of sampling .* logit_scale"),
        (dict(guidance_scale=2.0), "guidance_scale must be 1 of a denoiser that is told no class, got 2.0"),
        (dict(steps=99), r"steps must be an int in 1.."),
        (dict(sampler="euler"), "sampler must be"),
    ]:
        with pytest.raises(ValueError, match=message):
            run.sample(2, **change)


def test_a_step_that_logs_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(dgf.methods.find("ddpm"), "step", lambda self, state, batch, key: {})
    rows = train("ddpm", tmp_path, steps=2, log_every=1).history
    assert [set(row) for row in rows] == [{"step", "images_seen", "seconds"}] * 2


def test_training_leaves_the_callers_generator_alone(tmp_path):
    torch.manual_seed(5)
    want = torch.rand(3)
    torch.manual_seed(5)
    model = Net()  # draws too
    torch.manual_seed(5)
    train("ddpm", tmp_path, steps=2, model=model)
    assert torch.equal(torch.rand(3), want)


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path):
    class Bad(Net):
        calls = 0

        def forward(self, x, t):
            Bad.calls += 1
            return super().forward(x, t) * (float("nan") if Bad.calls == 6 else 1.0)

    with pytest.raises(dgf.TrainingError, match=r"loss is not finite at step 6; last good checkpoint: .*step-4"):
        train("ddpm", tmp_path, steps=20, model=Bad(), checkpoint_every=4, log_every=5)
    assert checkpoint.steps(tmp_path) == [4]


def test_only_the_newest_checkpoints_are_kept_and_half_written_ones_do_not_count(tmp_path):
    train("ddpm", tmp_path, steps=9, checkpoint_every=2, keep=2)
    assert checkpoint.steps(tmp_path) == [8, 9]
    (tmp_path / "checkpoints" / ".step-10.part").mkdir()
    (tmp_path / "checkpoints" / "step-11").mkdir()  # a crash between rename and write cannot make this; still no state
    assert checkpoint.steps(tmp_path) == [8, 9]


def test_fine_tuning_starts_from_the_base_and_inherits_its_settings(tmp_path):
    base = train("ddpm", tmp_path / "base", steps=3, T=12, clip_x0=False)
    tuned = dgf.train(
        "method3",
        base=base,
        out=tmp_path / "m3",
        steps=2,
        critic_steps=2,
        critic_width=8,
        batch_size=16,
        progress=False,
    )
    assert tuned.method.config.T == 12 and tuned.method.config.clip_x0 is False
    for mine, theirs in zip(tuned.state["denoiser"].parameters(), base.state.ema["denoiser"].parameters(), strict=True):
        assert torch.equal(mine, theirs)  # the critic alone has trained so far
    with pytest.raises(ValueError, match="T is 12 in the base run"):
        dgf.train("method3", base=base, out=tmp_path / "x", T=10)
    with pytest.raises(ValueError, match="has no denoiser"):
        dgf.train("gan", base=base, out=tmp_path / "x")
    assert not (tmp_path / "x").exists()


def test_without_a_base_one_is_trained_first(tmp_path, monkeypatch):
    from diffgan_fast import nets
    from diffgan_fast.methods import ddpm

    monkeypatch.setattr(nets.UNet, "preset", classmethod(lambda cls, size, channels, **kw: Net(channels)))
    monkeypatch.setitem(ddpm.Config.PRESETS, "brief", dict(steps=2, batch_size=16))
    monkeypatch.setitem(
        dgf.methods.method35.Config.PRESETS, "brief", dict(steps=2, critic_steps=1, critic_width=8, batch_size=16)
    )
    run = dgf.train("method3.5", out=tmp_path, preset="brief", T=10, progress=False)
    assert (tmp_path / "base" / "config.json").exists() and run.state.step == 2
    assert json.loads((tmp_path / "base" / "config.json").read_text())["config"]["T"] == 10


def test_the_denoiser_runs_once_a_step_and_twice_as_coded(tmp_path):
    class Counting(Net):
        calls: list = []

        def forward(self, x, t):
            Counting.calls.append((self.training, torch.is_grad_enabled()))
            return super().forward(x, t)

    for forwards, want in (
        ("one", [(True, False), (True, True), (True, True)]),
        ("two", [(False, False), (False, False), (True, True), (False, False), (True, True)]),
    ):
        Counting.calls = []
        stop = {}

        def note(run, row, stop=stop):
            stop.setdefault(row["step"], len(Counting.calls))

        train(
            "method3",
            tmp_path / forwards,
            steps=3,
            critic_steps=1,
            critic_width=8,
            forwards=forwards,
            log_every=1,
            model=Counting(),
            callbacks=[note],
        )
        assert Counting.calls[: stop[3]] == want


def test_history_report_and_files(tmp_path):
    run = train("ddpm", tmp_path, steps=6, sample_every=2)
    strips = {"noising.png", "denoising.png"}
    assert {p.name for p in (tmp_path / "samples").iterdir()} == {"step-2.png", "step-4.png", "step-6.png"} | strips
    assert (tmp_path / "report.html").read_text().startswith("<!")
    assert [row["step"] for row in run.history] == [2, 4, 6] and all(row["loss"] > 0 for row in run.history)
    levels = json.loads((tmp_path / "levels.json").read_text())
    assert len(levels["t"]) == len(levels["mse"]) == 10


def test_export_writes_plain_weights_and_overwrites_nothing(tmp_path):
    from safetensors.torch import load_file

    run = train("ddpm", tmp_path / "r", steps=2)
    path = run.export(tmp_path / "weights.safetensors")
    net = Net()
    net.load_state_dict(load_file(path))
    with pytest.raises(ValueError, match="exists already"):
        run.export(path)


def test_evaluate_names_its_extractor(tmp_path):
    run = train("ddpm", tmp_path, steps=1)
    result = run.evaluate(50)
    assert (
        result["extractor"]["name"] == "domain"
        and result["comparable"] is False
        and result["fid"] > result["fid_floor"]
    )
    assert json.loads((tmp_path / "evaluation.json").read_text())["n"] == 50


BAD = [
    (dict(stepz=3), "unknown option 'stepz'; did you mean 'steps'"),
    (dict(steps=-1), "steps must be at least 0"),
    (dict(steps=1.5), "steps must be int"),
    (dict(lr=float("nan")), "lr must be at least 0"),
    (dict(lr_schedule="step"), "lr_schedule must be one of"),
    (dict(preset="nope"), "preset must be one of: paper, student"),
    (dict(ema=2.0), "ema must be 0..1"),
    (dict(data_range="unit"), "clip_x0"),
    (dict(T=4, sample_steps=5), r"sample_steps must be in 1\.\.4, got 5"),  # and not when all is trained
]


@pytest.mark.parametrize("change, message", BAD)
def test_bad_options_are_named_and_leave_nothing_behind(change, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        train("ddpm", tmp_path / "r", **{"steps": 1, **change})
    assert not (tmp_path / "r").exists()


def test_bad_methods_are_named(tmp_path):
    with pytest.raises(ValueError, match="method must be one of ddpm"):
        dgf.train("gan3", out=tmp_path)


def test_a_schedule_that_misses_the_prior_is_reported(tmp_path):
    with pytest.warns(UserWarning, match="sqrt\\(abar_T\\) = 0.9"):
        train("ddpm", tmp_path, steps=1, schedule="linear")


def test_compare_makes_a_table_and_reuses_what_is_complete(tmp_path):
    options = {"ddpm": dict(steps=2), "method3": dict(steps=2, critic_steps=1, critic_width=8)}
    common = dict(batch_size=16, T=6, n=40, log_every=1, sample_every=0, progress=False, options=options)
    rows = dgf.compare(["ddpm", "method3"], "digits", tmp_path, **common)
    assert [row["method"] for row in rows] == ["ddpm", "method3"] and all(row["fid"] > 0 for row in rows)
    assert "ddpm, method3 on digits" in (tmp_path / "report.html").read_text()
    assert dgf.load(tmp_path / "method3").method.config.T == 6
    again = dgf.compare(["ddpm", "method3"], "digits", tmp_path, **common)
    assert again == rows
    options["ddpm"]["steps"] = 3
    with pytest.raises(ValueError, match="base"):  # its old base is gone
        dgf.compare(["ddpm", "method3"], "digits", tmp_path, **common)


def test_compare_shares_one_base_whatever_the_order(tmp_path):
    options = {name: dict(steps=1, critic_steps=1, critic_width=8) for name in ("method3", "method3.5")}
    rows = dgf.compare(["method3.5", "method3"], "digits", tmp_path, batch_size=16, T=6, n=40, sample_every=0,
                       progress=False, steps=1, options=options)  # fmt: skip
    assert [row["method"] for row in rows] == ["method3.5", "method3"]
    bases = [json.loads((tmp_path / name / "config.json").read_text())["base"] for name in options]
    assert bases[0] == bases[1] and (tmp_path / "base" / "config.json").exists()


def test_ctrl_c_inside_a_step_takes_effect_after_it(tmp_path):
    """A step cut in two could not be resumed: the signal waits until the step is whole."""
    start = Net().state_dict()

    class Interrupted(Net):
        calls = 0

        def forward(self, x, t):
            Interrupted.calls += 1
            if Interrupted.calls == 7:
                os.kill(os.getpid(), signal.SIGINT)
            return super().forward(x, t)

    def net(kind):
        model = kind()
        model.load_state_dict(start)
        return model

    options = dict(steps=8, critic_steps=2, critic_width=8)
    whole = train("method3", tmp_path / "whole", model=net(Net), **options)
    with pytest.raises(KeyboardInterrupt):
        train("method3", tmp_path / "cut", model=net(Interrupted), **options)
    assert checkpoint.steps(tmp_path / "cut") == [7]
    cut = train("method3", tmp_path / "cut", model=net(Net), resume=True, **options)
    assert same(whole, cut)


def test_a_resumed_run_keeps_its_base(tmp_path):
    options = dict(steps=2, critic_steps=1, critic_width=8, batch_size=16, progress=False)
    base, other = (train("ddpm", tmp_path / name, steps=steps) for name, steps in (("a", 2), ("b", 3)))
    dgf.train("method3", base=base, out=tmp_path / "m", **options)
    with pytest.raises(ValueError, match="other settings .base"):
        dgf.train("method3", base=other, out=tmp_path / "m", resume=True, **{**options, "steps": 4})
    longer = dgf.train("method3", base=base, out=tmp_path / "m", resume=True, **{**options, "steps": 4})
    assert longer.state.step == 4


def test_a_base_can_be_named_by_its_path_with_ones_own_network(tmp_path):
    base = train("ddpm", tmp_path / "base", steps=2)
    tuned = train(
        "method3", tmp_path / "m", base=tmp_path / "base", model=Net(), steps=1, critic_steps=1, critic_width=8
    )
    for mine, theirs in zip(tuned.state["denoiser"].parameters(), base.state.ema["denoiser"].parameters(), strict=True):
        assert torch.equal(mine, theirs)


def test_an_iterator_is_read_once(tmp_path):
    batches = (torch.rand(8, 1, 8, 8) * 2 - 1 for _ in range(3))
    run = train("ddpm", tmp_path, data=batches, steps=2)
    assert len(run.reference()) == 24


def test_runs_are_not_shortened_nor_stretched_under_a_schedule(tmp_path):
    train("ddpm", tmp_path / "a", steps=4)
    with pytest.raises(ValueError, match="steps must be at least 4"):
        train("ddpm", tmp_path / "a", steps=2, resume=True)
    train("ddpm", tmp_path / "b", steps=4, lr_schedule="cosine")
    with pytest.raises(ValueError, match="steps"):
        train("ddpm", tmp_path / "b", steps=8, lr_schedule="cosine", resume=True)


def test_a_weight_that_is_not_finite_is_never_saved(tmp_path):
    class Poisoned(Net):
        def forward(self, x, t):
            out = super().forward(x, t)
            out.register_hook(lambda g: g * float("nan"))
            return out

    with pytest.raises(dgf.TrainingError, match="a weight of 'denoiser' is not finite at step 1; .*none was written"):
        train("ddpm", tmp_path, model=Poisoned(), steps=1)


def test_a_torn_last_row_does_not_matter(tmp_path):
    train("ddpm", tmp_path, steps=4)
    with open(tmp_path / "metrics.jsonl", "a") as f:
        f.write('{"step": 5, "lo')
    assert [row["step"] for row in dgf.load(tmp_path, model=Net()).history] == [2, 4]
    assert [row["step"] for row in train("ddpm", tmp_path, steps=6, resume=True).history] == [2, 4, 6]


def test_bad_devices_are_named(tmp_path):
    for device in ("tpu9", "cuda:99"):
        with pytest.raises(ValueError, match="device"):
            train("ddpm", tmp_path / "x", device=device)


@pytest.mark.gpu
def test_a_run_on_a_gpu_is_measured_there(tmp_path, monkeypatch):
    seen = []

    def noted(samples, data, **options):
        seen.append((data.values.device.type, options["held_out"].values.device.type))
        return real(samples, data, **options)

    real = dgf.metrics.evaluate
    monkeypatch.setattr("diffgan_fast.run.measures.evaluate", noted)
    run = dgf.train("ddpm", "digits", tmp_path / "x", T=4, width=8, steps=1, device="cuda", progress=False)
    run.evaluate(20, metrics=["kid"])
    assert seen == [("cuda", "cuda")]
