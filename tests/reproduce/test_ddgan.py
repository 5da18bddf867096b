"""The trade-off of Denoising Diffusion GAN in small: few steps, few images, few samples."""

import json
import re

import pytest

import diffgan_fast as dgf
from diffgan_fast import cli, reproduce
from diffgan_fast.reproduce import ddgan, ddgan_page

pytestmark = pytest.mark.filterwarnings("ignore::diffgan_fast.metrics.SmallSampleWarning")
ARMS = ("ddpm-300", "ddgan-2", "ddgan-no-latent", "gan")
TRADEOFF = dict(configs=ARMS, seeds=2, n=30, images=130, points="moons", point_steps=2, width=8, subset=100)


@pytest.fixture(scope="module")
def tradeoff(tmp_path_factory):
    out = tmp_path_factory.mktemp("tradeoff")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ddgan, "CONFIGS", ddgan.CONFIGS | {"ddpm-300": few(8), "ddim-50": few(8, ddgan.DDIM)})
        patch.setitem(ddgan.DDIM, "sample_steps", 4)
        patch.setattr(ddgan, "TIMED", 3)
        patch.setattr(ddgan_page, "DRAWN", 60)
        patch.setattr("diffgan_fast.reproduce.study.is_here", lambda name: False)
        study = dict(TRADEOFF, configs=[*ARMS[:1], "ddim-50", *ARMS[1:]], progress=False)
        yield out, study, reproduce.reproduce_ddgan(out, **study)


def few(T, sampled=None):
    """A diffusion model of few steps."""
    return ddgan.Arm("ddpm", dict(T=T), f"DDPM, T = {T}", sampled or {}, "ddpm-300")


def test_every_model_is_measured_at_its_own_cost(tradeoff):
    out, study, results = tradeoff
    assert list(results) == study["configs"] and {len(seeds) for seeds in results.values()} == {2}
    nfe = {name: {outcome["nfe"] for outcome in outcomes} for name, outcomes in results.items()}
    assert nfe == {"ddpm-300": {8}, "ddim-50": {4}, "ddgan-2": {2}, "ddgan-no-latent": {4}, "gan": {1}}
    for outcomes in results.values():
        assert all(outcome["images"] == 128 and outcome["sample_seconds"] > 0 for outcome in outcomes)
    assert results["ddim-50"][0]["path"] == results["ddpm-300"][0]["path"]
    assert results["ddim-50"][0]["fid"] != results["ddpm-300"][0]["fid"]
    stored = {name: json.loads((seeds[1]["path"] / "config.json").read_text()) for name, seeds in results.items()}
    assert all(config["seed"] == 1 and config["config"]["steps"] == 2 for config in stored.values())
    assert not stored["ddgan-no-latent"]["config"]["latent"] and stored["ddgan-2"]["config"]["T"] == 2


def test_calls_that_a_graph_replays_count(tradeoff, monkeypatch):
    class Replays:
        def __init__(self, *args):
            pass

        def step(self, t, key):
            return True

    _, _, results = tradeoff
    monkeypatch.setattr("diffgan_fast.sampling._worthwhile", lambda x, T: True)
    monkeypatch.setattr("diffgan_fast.sampling._Captured", Replays)
    assert ddgan.network_calls(dgf.load(results["ddpm-300"][0]["path"])) == 8


def test_the_u_net_is_as_costly_as_the_generator(tradeoff):
    out, study, results = tradeoff
    for shape, width in (((1, 8, 8), 16), ((1, 28, 28), None)):
        _, generator, unet = ddgan.matched(shape, width)
        assert abs(unet / generator - 1) < 0.1
    found, generator, unet = ddgan.matched((1, 8, 8), 8)
    assert [results[name][0]["macs"] for name in ("ddpm-300", "ddim-50", "ddgan-2")] == [unet, unet, generator]
    config = json.loads((results["ddpm-300"][0]["path"] / "config.json").read_text())["config"]
    assert config["width"] == found


def test_the_page_shows_the_trade_off(tradeoff):
    out, study, results = tradeoff
    html = (out / "digits" / "report.html").read_text()
    assert re.findall("<h2>(.*?)</h2>", html) == [
        "Quality against time", "Configurations", "As published, on CIFAR-10", "Samples", "One denoising step",
    ]  # fmt: skip
    cells = re.findall("<td[^>]*>(.*?)</td>", html)
    assert "real data" in cells and "9.63" in cells and "80.5" in cells and cells.count("ddgan-2") == 2
    assert html.count('src="data:image/svg') == 4 and "MACs a call" in html
    assert "t = 4" in cells and "t = 1" in cells


def test_a_measured_trade_off_is_not_measured_again(tradeoff, monkeypatch):
    out, study, results = tradeoff
    monkeypatch.setattr("diffgan_fast.reproduce.study.is_here", lambda name: False)
    monkeypatch.setattr("diffgan_fast.engine.loop.Loop._step", None)
    monkeypatch.setattr(ddgan, "_measured", None)
    assert reproduce.reproduce_ddgan(out, **study) == results


def test_the_speed_is_said_with_what_it_is_worth():
    labels = {"fid": "FID (domain)"}
    many, few = (
        dict(sample_seconds=2.0, fid=1.0, nfe=300, macs=100, labels=labels),
        dict(sample_seconds=0.1, fid=5.0, nfe=4, macs=110, labels=labels),
    )
    results = {"ddpm-300": [many, many | dict(sample_seconds=4.0, fid=3.0)], "ddgan-4": [few, few]}
    (said,) = ddgan_page.speedups(results)
    assert said == (
        "ddgan-4 samples 30.0 times as fast as ddpm-300 (68.2 by counted passes); FID (domain) 5.000 against 2.000."
    )
    results["ddpm-300"][0] = many | dict(macs=80)
    assert ddgan_page.speedups(results)[0].endswith("against 2.000. A call of ddpm-300 has 0.73 times the operations.")


@pytest.mark.parametrize(
    "arguments, message",
    [
        (dict(data="moons"), "data must be of .*; got moons"),
        (dict(configs=["ddgan-3"]), "configs must be of ddpm-1000, .*; got ddgan-3"),
        (dict(points="digits"), "points must be of .*; got digits"),
        (dict(images=63), "images must be at least 64"),
        (dict(seeds=0), "seeds must be at least 1"),
    ],
)
def test_a_trade_off_that_does_not_fit_is_named(tmp_path, arguments, message):
    with pytest.raises(ValueError, match=message):
        reproduce.reproduce_ddgan(tmp_path, **arguments)


def test_the_command_passes_its_flags_on(monkeypatch, capsys, tmp_path):
    row = dict(
        sample_seconds=0.5,
        seconds=9.0,
        nfe=2,
        macs=4_800_000,
        labels={"fid": "FID (domain)"},
        **{k: 0.5 for k in ddgan.SCORES},
    )
    row |= {floor: 0.25 for floor in ddgan_page.FLOORS.values()}

    def study(out, **given):
        assert given == dict(
            data="mnist", configs=["ddgan-2"], seeds=1, n=40, images=640, points="moons", width=16, subset=99,
            device="cpu",
        )  # fmt: skip
        return {"ddgan-2": [row]}

    monkeypatch.setattr(reproduce, "reproduce_ddgan", study)
    flags = "--data mnist --config ddgan-2 --seeds 1 --n 40 --images 640 --points moons --width 16 --subset 99".split()
    flags += ["--device", "cpu"]
    with pytest.raises(SystemExit) as stop:
        cli.main(["reproduce", "ddgan", "--out", str(tmp_path), *flags])
    text = capsys.readouterr().out
    assert (
        not stop.value.code
        and "ddgan-2" in text
        and "4.8 M" in text
        and "real data" in text
        and "mnist/report.html" in text
    )
