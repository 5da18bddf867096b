"""Steps in bfloat16 and float16 against the same in float32, and what must stay float32."""

import json

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import diffgan_fast as dgf
from diffgan_fast.adversarial import critic_loss, generator_loss
from diffgan_fast.engine import FlatAdamW, State, precision
from tests.engine import methods

PRODUCTS = ("convolution", "convolution_backward", "mm", "addmm", "bmm")


class Products(TorchDispatchMode):
    """The types in which products of matrices and convolutions ran, each with how often."""

    def __init__(self):
        super().__init__()
        self.types = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if func._schema.name.removeprefix("aten::") in PRODUCTS:
            dtype = next(v.dtype for v in args if isinstance(v, torch.Tensor))
            self.types[dtype] = self.types.get(dtype, 0) + 1
        return out


def run(case, steps=3, **options):
    """(losses of each step, state, types of the products)."""
    method, state, batch = methods.start(case, **options)
    for scaler in state.scalers.values():  # at torch's first scale some tiny networks leave out a step or two
        if scaler.is_enabled():
            scaler.load_state_dict({**scaler.state_dict(), "scale": 256.0})
    with Products() as products:
        rows = [methods.step(method, state, batch) for _ in range(steps)]
    return rows, state, products.types


def test_no_method_is_forgotten():
    assert {name for name, _, _ in methods.CASES.values()} == set(dgf.methods())


@pytest.mark.parametrize("case", methods.CASES)
def test_steps_in_bfloat16(case):
    """The losses are those of float32 within what eight bits give; weights and their gradients are float32."""
    (plain, _, exact), (rows, state, types) = (run(case, precision=how) for how in ("fp32", "bf16"))
    assert torch.bfloat16 not in exact and types[torch.bfloat16] > 0
    # the closed form of a penalty, or its double backward, is the only product that is left
    penalised = "R1" in case or "ddgan" in case or case in ("gan-enhanced", "diffusion-gan, as coded")
    assert penalised or set(types) == {torch.bfloat16}
    for row, want in zip(rows, plain, strict=True):
        assert row.keys() == want.keys()
        for name, value in want.items():
            assert abs(row[name] - value) < 0.05 * max(abs(value), 1.0), name
    for net in (*state.nets.values(), *state.ema.values()):
        assert all(p.dtype == torch.float32 for p in net.parameters())
    assert all(g.dtype == torch.float32 for o in state.optimizers.values() for g in o.gradients)


@pytest.mark.parametrize("case", ["ddpm", "method2", "gan-enhanced", "gan, R1", "diffusion-gan, as coded"])
def test_steps_in_float16(case):
    """As in bfloat16; the losses are scaled, and what is logged and learned is not."""
    (plain, exact, _), (rows, state, types) = (run(case, 2, precision=how) for how in ("fp32", "fp16"))
    assert types[torch.float16] > 0
    for row, want in zip(rows, plain, strict=True):
        assert all(abs(row[name] - value) < 0.02 * max(abs(value), 0.5) for name, value in want.items())
    begun = methods.weights(methods.start(case)[1])
    moved, wanted = (methods.weights(s) - begun for s in (state, exact))
    # Adam moves a weight whose gradient is noise by as much as any other: the direction is what can be compared
    assert torch.cosine_similarity(moved, wanted, dim=0) > 0.8


def test_a_step_with_an_infinite_gradient_is_left_out():
    """What torch's scaler does, for the one optimiser that it happens to."""
    net = {name: torch.nn.Linear(1, 1) for name in ("generator", "critic")}
    optimizers = {name: FlatAdamW(m, 0.1) for name, m in net.items()}
    state = State(net, optimizers, (), dgf.methods.gan.GANConfig(precision="fp16"))
    before = {name: m.weight.clone() for name, m in net.items()}
    state.update("critic", (net["critic"](torch.ones(1, 1)) * 1e35).sum())  # times 2^16 it is infinite
    state.update("generator", net["generator"](torch.ones(1, 1)).sum())
    assert torch.equal(net["critic"].weight, before["critic"])
    assert torch.allclose(net["generator"].weight, before["generator"] - 0.1, atol=1e-5)
    assert [state.scalers[name].get_scale() for name in ("critic", "generator")] == [2.0**15, 2.0**16]


def test_losses_of_half_logits_are_those_of_float32():
    real, fake = torch.randn(2, 500).bfloat16()
    for kind in ("nonsaturating", "saturating", "hinge", "lsgan", "wgan"):
        assert torch.equal(critic_loss(real, fake, kind), critic_loss(real.float(), fake.float(), kind))
        assert torch.equal(generator_loss(fake, kind), generator_loss(fake.float(), kind))
    assert critic_loss(real.double(), fake.double()).dtype == torch.float64


def test_tf32_is_switched_on_for_the_step_alone():
    def settings():
        return torch.get_float32_matmul_precision(), torch.backends.cudnn.conv.fp32_precision

    before = settings()
    with pytest.raises(KeyError), precision.reduced("tf32", torch.device("cuda")):
        assert settings() == ("high", "tf32")
        raise KeyError
    assert settings() == before
    with precision.reduced("fp32", torch.device("cpu")):
        assert settings() == before and not torch.is_autocast_enabled("cpu")


OPTIONS = dict(
    batch_size=8, T=4, width=8, log_every=1, sample_every=0, checkpoint_every=0, progress=False, device="cpu"
)


def test_a_run_keeps_its_precision_and_resumes(tmp_path, monkeypatch):
    """float16, whose scale is part of the state; samples are drawn in float32."""
    monkeypatch.setattr("diffgan_fast.api.GRID", 4)
    options = dict(OPTIONS, precision="fp16")

    def rescale(run, row, stop=False):
        if row["step"] == 2:
            scaler = run.state.scalers["denoiser"]
            scaler.load_state_dict({**scaler.state_dict(), "scale": 8.0})
            if stop:
                raise KeyboardInterrupt

    whole = dgf.train("ddpm", "digits", tmp_path / "whole", steps=4, callbacks=[rescale], **options)
    with pytest.raises(KeyboardInterrupt):
        stop = lambda run, row: rescale(run, row, stop=True)  # noqa: E731
        dgf.train("ddpm", "digits", tmp_path / "cut", steps=4, callbacks=[stop], **options)
    assert json.loads((tmp_path / "cut" / "config.json").read_text())["config"]["precision"] == "fp16"
    with pytest.raises(ValueError, match="other settings .precision"):
        dgf.train("ddpm", "digits", tmp_path / "cut", steps=4, resume=True, **OPTIONS)
    cut = dgf.train("ddpm", "digits", tmp_path / "cut", steps=4, resume=True, **options)
    assert cut.state.scalers["denoiser"].get_scale() == 8.0
    assert torch.equal(methods.weights(cut.state), methods.weights(whole.state))
    with Products() as products:
        dgf.load(tmp_path / "cut").sample(2)
    assert set(products.types) == {torch.float32}


def test_a_base_is_trained_as_its_run(tmp_path, monkeypatch):
    monkeypatch.setattr("diffgan_fast.api.GRID", 4)
    monkeypatch.setitem(dgf.methods.ddpm.Config.PRESETS, "brief", dict(steps=1))
    monkeypatch.setitem(dgf.methods.method3.Config.PRESETS, "brief", dict(steps=1))
    options = dict(OPTIONS, preset="brief", critic_width=4, precision="bf16")
    del options["batch_size"]
    dgf.train("method3", "digits", tmp_path, batch_size=8, **options)
    assert json.loads((tmp_path / "base" / "config.json").read_text())["config"]["precision"] == "bf16"


def test_a_precision_that_the_device_lacks_is_named(tmp_path):
    for value, message in (
        ("tf32", "fp32, bf16 or fp16 on 'cpu'; got 'tf32'"),
        ("fp8", "one of fp32, tf32, bf16, fp16"),
    ):
        with pytest.raises(ValueError, match=message):
            dgf.train("ddpm", "digits", tmp_path / "r", precision=value, **OPTIONS)
    assert not (tmp_path / "r").exists()


@pytest.mark.parametrize("method, options", [("ddpm", dict(T=4, schedule="cosine")), ("ddgan", dict(T=2))])
def test_samples_in_bfloat16(method, options, tmp_path):
    """Networks compute in it, the samples are float32 and near those of float32 networks."""
    trained = dgf.train(method, "digits", tmp_path / "run", steps=2, batch_size=8, width=8, progress=False, **options)
    with Products() as products:
        got = trained.sample(3, seed=5, precision="bf16")
    assert set(products.types) == {torch.bfloat16} and got.dtype == torch.float32
    exact = trained.sample(3, seed=5)
    assert torch.equal(exact, trained.sample(3, seed=5, precision="fp32")) and not torch.equal(got, exact)
    assert (got - exact).abs().max() < 0.1
    for bad in ("tf32", "int8"):
        with pytest.raises(ValueError, match="precision must be"):
            trained.sample(3, precision=bad)
