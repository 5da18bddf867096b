"""Every fine-tuning method on every kind of denoiser: it runs, leaves alone what it must, samples, saves and loads."""

import copy
import json
from dataclasses import dataclass

import pytest
import torch

import diffgan_fast as dgf
from diffgan_fast import nets
from diffgan_fast.engine import option
from diffgan_fast.methods import gan
from diffgan_fast.run import build, fingerprint
from tests.methods.by_hand import images

COMMON = dict(batch_size=3, log_every=1, sample_every=0, checkpoint_every=0, progress=False)
METHODS = {  # and which networks they train
    "method1": (dict(critic_width=4, grad_steps=2), {"denoiser"}),
    "method2": (dict(critic_width=4, recompute=2), {"denoiser", "critic"}),
    "method3": (dict(critic_width=4, critic_steps=1), {"denoiser", "critic"}),
    "method3.5": (dict(critic_width=4, critic_steps=0), {"denoiser", "critic"}),
    "method4": (dict(critic_width=4), {"denoiser", "critic"}),
    "discriminator-guidance": (dict(critic_width=4, fakes=5), {"critic"}),
}


@pytest.fixture(autouse=True)
def _small_pictures(monkeypatch):
    monkeypatch.setattr("diffgan_fast.api.GRID", 4)


def test_no_fine_tuning_method_is_forgotten():
    assert METHODS.keys() == {name for name in dgf.methods() if dgf.methods.find(name).fine_tunes}


def options(name, data, critic=None, **more):
    given = {} if critic is None or name not in ("method1", "method2") else {"critic": critic}
    start = {"critic_start": "scratch"} if name in ("method1", "method2") and not given else {}
    if given:
        more["critic_width"] = critic.method.config.critic_width
    return {"data": data, "steps": 2, **METHODS[name][0], **COMMON, **start, **given, **more}


def check(name, out, start, **arguments):
    """Trains, and sees to what every run must do. `start`: the networks that it must start from, others are new."""
    run = dgf.train(name, out=out, **arguments)
    given = {part: copy.deepcopy(net).requires_grad_() for part, net in start.items()}
    begun = build(run.method, given, 0, torch.device("cpu"))
    before, after = ({part: fingerprint(net) for part, net in state.nets.items()} for state in (begun, run.state))
    assert {part for part in after if after[part] != before[part]} == METHODS[name][1]
    assert run.state.step == 2 and [row["step"] for row in run.history] == [1, 2]
    channels, size, _ = run.method.shape
    x = run.sample(3, seed=5)
    assert x.shape == (3, channels, size, size) and x.isfinite().all() and x.abs().max() <= 1
    again = dgf.load(out, **({"model": copy.deepcopy(start["denoiser"])} if "model" in arguments else {}))
    assert {part: fingerprint(net) for part, net in again.state.nets.items()} == after
    assert torch.equal(again.sample(3, seed=5), x)
    assert (out / "report.html").exists() and (out / "samples" / "step-2.png").exists()
    assert not (out / "base").exists() and not (out / "critic").exists()
    return run


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """A U-Net on the digits and a `gan`, hardly trained."""
    folder = tmp_path_factory.mktemp("small")
    base = dgf.train("ddpm", "digits", folder / "base", steps=2, T=4, width=8, **COMMON)
    critic = dgf.train("gan", "digits", folder / "gan", steps=2, width=4, critic_width=6, **COMMON)
    return base, critic


@pytest.mark.parametrize("name", METHODS)
def test_on_a_small_u_net(name, small, tmp_path):
    base, critic = small
    kept = fingerprint(base.state.sampling_net("denoiser")), fingerprint(critic.state["critic"])
    start = {"denoiser": base.state.sampling_net("denoiser")}
    if name in ("method1", "method2"):
        start["critic"] = critic.state["critic"]
    check(name, tmp_path, start, base=base, **options(name, "digits", critic))
    assert kept == (fingerprint(base.state.sampling_net("denoiser")), fingerprint(critic.state["critic"]))


def diffusers_net():
    from diffusers import UNet2DModel

    torch.manual_seed(11)
    return nets.from_diffusers(
        UNet2DModel(
            sample_size=8,
            in_channels=3,
            out_channels=3,
            layers_per_block=1,
            block_out_channels=(8, 8),
            norm_num_groups=4,
            attention_head_dim=4,
            down_block_types=("DownBlock2D", "AttnDownBlock2D"),
            up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        )
    )


@pytest.mark.parametrize("name", METHODS)
def test_on_a_diffusers_network(name, tmp_path):
    pytest.importorskip("diffusers")
    model = diffusers_net()
    run = check(name, tmp_path, {"denoiser": diffusers_net()}, model=model, T=4, **options(name, images(12, (3, 8, 8))))
    assert run.state["denoiser"] is model and type(model.unet).__name__ == "UNet2DModel"


@pytest.fixture(scope="module")
def coloured(tmp_path_factory):
    """A thin U-Net for 3-channel images of 32 px."""
    folder, data = tmp_path_factory.mktemp("coloured"), images(12, (3, 32, 32))
    return dgf.train("ddpm", data, folder, steps=1, T=3, width=4, **COMMON), data


@pytest.mark.parametrize("name", METHODS)
def test_on_32_pixels_in_colour(name, coloured, tmp_path):
    base, data = coloured
    start = {"denoiser": base.state.sampling_net("denoiser")}
    run = check(name, tmp_path, start, base=base, **options(name, data))
    assert run.method.shape == (3, 32, 32) and isinstance(run.state["denoiser"], nets.UNet)


def test_on_real_cifar10(real_data, tmp_path):
    """A conditional base and method 3.5 on it."""
    data = dgf.data.load("cifar10", root=real_data, subset=40)
    base = dgf.train("ddpm", data, tmp_path / "base", steps=2, T=3, width=4, conditional=True, **COMMON)
    assert base.method.num_classes == 10 and base.sample(2, labels=7).shape == (2, 3, 32, 32)
    start = {"denoiser": base.state.sampling_net("denoiser")}
    run = check("method3.5", tmp_path / "tuned", start, base=base, **options("method3.5", data))
    assert run.method.config.conditional and run.sample(2, labels=[7, 0]).shape == (2, 3, 32, 32)


def test_several_methods_share_one_critic_and_one_base(tmp_path, monkeypatch):
    @dataclass(kw_only=True)
    class Brief(gan.GANConfig):
        steps: int = option(2, "training steps", low=0)
        width: int = option(4, "channels of the generator before its last layer", low=1)

    monkeypatch.setattr(gan.GAN, "Config", Brief)
    names = ["method2", "discriminator-guidance", "method1", "method4"]
    own = {name: METHODS[name][0] for name in names}
    common = dict(width=8, T=4, steps=2, n=40, options=own, **COMMON)
    rows = dgf.compare(names, "digits", tmp_path, **common)
    assert [row["method"] for row in rows] == names and all(0 < row["fid"] < 1e4 for row in rows)
    stored = {name: json.loads((tmp_path / name / "config.json").read_text()) for name in names}
    base, critic = (dgf.load(tmp_path / part) for part in ("base", "critic-4"))
    assert base.state.step == 2 and critic.method.name == "gan" and critic.method.config.critic_width == 4
    origin = {"step": 2, "weights": fingerprint(base.state.sampling_net("denoiser"))}
    judge = {"step": 2, "weights": fingerprint(critic.state["critic"])}
    assert all(stored[name]["base"] == origin for name in names)
    assert {name for name in names if stored[name]["critic"] == judge} == {"method1", "method2"}
    assert all(stored[name]["critic"] is None for name in names if name not in ("method1", "method2"))
    assert fingerprint(dgf.load(tmp_path / "method1").state["critic"]) == judge["weights"]
    assert sorted(p.parent.name for p in tmp_path.rglob("config.json")) == sorted([*names, "base", "critic-4"])
    page = (tmp_path / "report.html").read_text()
    assert all(name in page for name in names)
    monkeypatch.setattr(gan.GAN, "step", None)  # nothing is trained again
    assert dgf.compare(names, "digits", tmp_path, **common) == rows
