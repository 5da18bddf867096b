"""The studies in small: few steps, few noise levels, few samples."""

import json
import math
import re

import pytest
import torch
from scipy import integrate

import diffgan_fast as dgf
from diffgan_fast import cli, report, reproduce
from diffgan_fast.reproduce import diffusion_gan, gaussians, images, images_page, points, toy
from diffgan_fast.run import Run

pytestmark = pytest.mark.filterwarnings("ignore:the schedule leaves")
TINY = dict(steps=3, T=4, batch_size=8, width=16, critic_width=16, log_every=1, subset=300, n=60, progress=False)
CONFIGS = ("gradient-penalty", "reaches-prior")


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    out = tmp_path_factory.mktemp("study")
    return out, reproduce.reproduce_2d(out, data=("moons", "dino"), configs=CONFIGS, seeds=2, **TINY)


def test_every_cell_is_measured_with_every_seed(study):
    out, results = study
    assert list(results) == [(c, d) for d in ("moons", "dino") for c in CONFIGS]
    for (config, data), seeds in results.items():
        assert len(seeds) == 2 and seeds[0]["kl"] != seeds[1]["kl"] and seeds[0]["kl_floor"] == seeds[1]["kl_floor"]
        assert all(set(seed) == {"seconds", "eval_loss", "sample_seconds", "kl", "kl_floor"} for seed in seeds)
        assert (out / "as-coded" / data / config / "seed-1" / "report.html").exists()


def test_the_page_sets_the_source_beside_the_runs(study):
    html = (study[0] / "as-coded" / "report.html").read_text()
    headings = re.findall("<h2>(.*?)</h2>", html)
    assert headings == [
        *(points.CONFIGS[c] for c in CONFIGS), "Samples (Figure 2)", "Densities", "Training loss (Figure 1)",
    ]  # fmt: skip
    cells = re.findall("<td[^>]*>(.*?)</td>", html)
    assert "263.8" in cells and "0.102" in cells and "1.036" in cells  # Table 2
    assert cells.count("perfect sampler") == 1 and "0.092 ± 0.018" in cells
    assert len(re.findall('src="data:image/png', html)) == 2 and len(re.findall('src="data:image/svg', html)) == 2


def test_complete_runs_are_reused(study, monkeypatch):
    out, results = study
    monkeypatch.setattr(Run, "evaluate", None)
    monkeypatch.setattr("diffgan_fast.engine.loop.Loop._step", None)
    seen = reproduce.reproduce_2d(out, data=("dino",), configs=CONFIGS[:1], seeds=1, **TINY)
    assert seen == {(CONFIGS[0], "dino"): results[CONFIGS[0], "dino"][:1]}


def test_values_of_the_source():
    assert list(points.PUBLISHED) == list(points.CONFIGS)[:-2]
    for by_data in points.PUBLISHED.values():
        assert tuple(by_data) == points.DATA and all(len(row) == len(points.MEASURED) for row in by_data.values())
    linear = [points.PUBLISHED[c] for c in ("baseline", "adversarial", "gradient-penalty", "fine-tuned")]
    for data, (mean, two_sd) in points.SPREAD.items():
        assert sum(abs(by_data[data][3] - mean) <= two_sd for by_data in linear) >= 3


def test_a_table_of_means_and_standard_deviations():
    row = dict(seconds=1.0, eval_loss=0.5, sample_seconds=0.1, kl_floor=-0.0256)
    rows, columns = reproduce.kl_table({("baseline", "moons"): [{**row, "kl": 0.09}, {**row, "kl": 0.11}]})
    lines = report.table(rows, columns).splitlines()
    assert lines[2].split() == ["baseline", "0.100", "±", "0.014"] and lines[-1].split() == [
        "perfect",
        "sampler",
        "-0.026",
    ]


def test_what_does_not_fit_is_named(tmp_path):
    for arguments, message in (
        (dict(data=("moons", "ring")), "data must be of circle, dino, line, moons; got ring"),
        (dict(configs=()), "configs must be of baseline, .*; got none"),
        (dict(variant="best"), "variant must be of as-coded, paper; got best"),
        (dict(seeds=0), "seeds must be at least 1, got 0"),
    ):
        with pytest.raises(ValueError, match=message):
            reproduce.reproduce_2d(tmp_path, **arguments)


def test_the_command_passes_its_flags_on(monkeypatch, capsys, tmp_path):
    def study(out, **given):
        assert given == dict(
            variant="paper", seeds=1, device="cpu", steps=9, data=["moons", "line"], configs=["quadratic"]
        )
        return {("quadratic", "moons"): [dict(kl=0.2, kl_floor=-0.03)]}

    monkeypatch.setattr(reproduce, "reproduce_2d", study)
    flags = "--data moons --data line --config quadratic --variant paper --seeds 1 --steps 9 --device cpu".split()
    with pytest.raises(SystemExit) as stop:
        cli.main(["reproduce", "2d", "--out", str(tmp_path), *flags])
    text = capsys.readouterr().out
    assert not stop.value.code and "quadratic" in text and "0.200" in text and "report.html" in text


SMALL = dict(width=8, T=4, steps=3, log_every=1, batch_size=8, subset=300, progress=False)
TUNED = ("method2", "method2-batch-10", "method3.5", "discriminator-guidance")


@pytest.fixture(scope="module")
def table1(tmp_path_factory):
    out = tmp_path_factory.mktemp("table1")
    base = dgf.train("ddpm", out=out / "own-base", **SMALL)
    critic = dgf.train("gan", out=out / "own-critic", steps=2, width=8, critic_width=8, subset=300, progress=False)
    study = dict(base=base, critic=critic.path, configs=TUNED, n=40, images=700, fakes=10, subset=300, progress=False)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(images, "CAP", 1)  # no longer controls: see test_the_control_has_as_many_seconds
        yield out, study, reproduce.reproduce_table1(out, seeds=2, **study)


def test_all_configurations_see_the_same_images_from_one_base(table1):
    out, study, results = table1
    assert list(results) == ["before", "control", *TUNED] and {len(seeds) for seeds in results.values()} == {2}
    seen = {name: (seeds[0]["steps"], seeds[0]["images"]) for name, seeds in results.items()}
    assert seen == {
        "before": (0, 0),
        "control": (5, 640),  # whole batches of 128
        "method2": (5, 640),
        "method2-batch-10": (64, 640),
        "method3.5": (5, 640),
        "discriminator-guidance": (5, 640),
    }
    for seeds in results.values():
        for seed, outcome in enumerate(seeds):
            stored = json.loads((outcome["path"] / "config.json").read_text())
            assert stored["seed"] == seed and stored["base"]["step"] == 3 and stored["config"]["ema"] == 0
            assert json.loads((outcome["path"] / "evaluation.json").read_text())["seed"] == seed + 1
    configs = {name: json.loads((results[name][0]["path"] / "config.json").read_text()) for name in results}
    assert configs["method3.5"]["config"]["critic_steps"] == 1 and configs["method2"]["critic"]["step"] == 2
    for name in ("method2", "method2-batch-10", "method3.5"):  # the control differs by the critic alone
        assert configs[name]["config"]["lr"] == configs["control"]["config"]["lr"] == 1e-5
    assert configs["control"]["config"]["adam_beta1"] == configs["method2"]["config"]["adam_beta1"] == 0.5


def test_before_is_the_base_itself(table1):
    _, study, results = table1
    for seed, outcome in enumerate(results["before"]):
        samples, reference = study["base"].sample(40, seed=seed + 1), study["base"].reference()
        score = dgf.metrics.evaluate(samples, reference, metrics=["kid"], held_out=study["base"].reference("test"))
        assert score["kid"] == outcome["kid"]


def test_the_control_has_as_many_seconds(tmp_path, monkeypatch):
    monkeypatch.setattr(images, "CAP", 10)
    monkeypatch.setattr(images._Study, "control", lambda self, steps, seed: {"steps": steps, "seed": seed})
    study = images._Study(tmp_path, "digits", None, None, 640, 40, {})
    for seconds, steps, capped in ((0.2, 5, False), (3.1, 16, False), (10, 50, False), (20, 50, True)):
        found = study.equal_seconds({"seconds": seconds}, {"seconds": 1.0, "steps": 5}, 3)
        assert found == {"equal_seconds": {"steps": steps, "seed": 3}, "capped": capped}


def test_the_page_sets_table_1_beside_the_study(table1):
    out, study, results = table1
    html = (out / "digits" / "report.html").read_text()
    assert re.findall("<h2>(.*?)</h2>", html) == [
        "Differences of KID, paired by seed", "Conclusions", "Configurations", "Table 1 as published", "Samples",
        "Data", "Base", "From noise to image",
    ]  # fmt: skip
    cells = re.findall("<td[^>]*>(.*?)</td>", html)
    assert cells.count("84.74") == 2 and "45.86" in cells and "1.99 ± 0.13" in cells
    assert {f"{results[name][0]['kid_floor']:.4f}" for name in results} <= set(cells)
    captions = re.findall("<figcaption>(.*?)</figcaption>", html)
    assert captions == [
        "before (Figure 7)", "control", "method2 (Figure 20)", "method2-batch-10", "method3.5 (Figure 8)",
        "discriminator-guidance", "64 images of digits (Figure 13)", "Noising", "Denoising",
    ]  # fmt: skip
    assert len(re.findall('src="data:image/png', html)) == 9 and len(re.findall('src="data:image/svg', html)) == 4
    assert "Method 2 at batch 128, by KID:" in html and "30% lie beyond" in html


def test_complete_runs_are_not_trained_again(table1, monkeypatch):
    out, study, results = table1
    monkeypatch.setattr(Run, "evaluate", None)
    monkeypatch.setattr("diffgan_fast.engine.loop.Loop._step", None)
    seen = reproduce.reproduce_table1(out, seeds=1, **{**study, "configs": ("method3.5",)})
    assert seen == {name: results[name][:1] for name in ("before", "control", "method3.5")}
    assert "One seed has no spread" in (out / "digits" / "report.html").read_text()


def test_base_and_critic_are_trained_where_none_are_given(tmp_path, monkeypatch):
    def train(method, *arguments, **options):
        return dgf.train(method, *arguments, **options, **({"steps": 2} if method == "gan" else {}))

    monkeypatch.setattr(images, "train", train)
    monkeypatch.setitem(images.BASES, 8, {**SMALL, "subset": None})
    monkeypatch.setattr(images, "CAP", 2)
    small = dict(seeds=1, n=40, images=128, subset=300, progress=False)
    results = reproduce.reproduce_table1(tmp_path, conditional=True, configs="method1", **small)
    longer = results["method1"][0]["equal_seconds"]
    assert longer["path"].parent.name == f"control-{longer['steps']}" and longer["steps"] in (1, 2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["digits", "digits-conditional"]
    base = dgf.load(tmp_path / "digits-conditional" / "base")
    assert base.method.config.conditional and base.method.config.guidance_scale == 5
    assert dgf.load(tmp_path / "digits" / "critic").state.step == 2
    html = (tmp_path / "digits-conditional" / "report.html").read_text()
    assert "before (Figure 9)" in html and ">method1</figcaption>" in html
    with pytest.raises(ValueError, match="base must be a run of a denoiser trained with conditional=False"):
        reproduce.reproduce_table1(tmp_path, base=base, **small)


def test_a_verdict_needs_two_standard_errors():
    assert images_page.verdict([-0.01]) == images_page.verdict([-0.01, 0.01]) == images_page.verdict([-0.01, 0.0]) == ""
    assert images_page.verdict([-0.010, -0.011, -0.012]) == "better"
    assert images_page.verdict([0.010, 0.011, 0.012]) == "worse"


def _outcomes(*kids, **more):
    return [dict(kid=kid, **more) for kid in kids]


def test_conclusions_follow_from_the_differences():
    slow = _outcomes(0.30, 0.32, 0.34)
    results = {
        "before": _outcomes(0.20, 0.21, 0.22),
        "control": _outcomes(0.18, 0.20, 0.19),
        "method2": _outcomes(0.10, 0.11, 0.12, capped=True),
        "method2-batch-10": _outcomes(0.20, 0.20, 0.23),
        "method3.5": _outcomes(0.30, 0.31, 0.32, capped=False),
    }
    for name in list(results)[2:]:
        for outcome, other in zip(results[name], slow, strict=True):
            outcome["equal_seconds"] = other
    said = " ".join(images_page.conclusions(results, "unconditional"))
    assert "the base. Better: control, method2. Worse: method3.5. Not to be told apart: method2-batch-10." in said
    assert "equal images. Better: method2. Worse: method3.5. Not to be told apart: method2-batch-10." in said
    assert "equal seconds. Better: method2-batch-10. Worse: none. Better, but the cap left the control less" in said
    assert "better than method 2 at batch 10 (-0.1000 ± 0.0100)" in said
    assert "from 0.0348 to 0.0236. Here it is worse than its base." in said and "18% lie beyond" in said


def test_cells_of_table_1():
    published = images_page.PUBLISHED
    assert published["unconditional"]["FID"] == ("54.91", "45.86") and published["conditional"]["FID"] == ("84.74",) * 2
    assert published["unconditional"]["KID"] == ("0.0348", "0.0236")
    assert [cell for row in published["CIFAR-10"].values() for cell in row] == [
        None, "4.52 ± 0.57", None, "103.32", None, None,
    ]  # fmt: skip


def test_what_table_1_cannot_be_of_is_named(tmp_path):
    for arguments, message in (
        (dict(data="moons"), "data must be of digits, mnist, fashion-mnist, cifar10; got moons"),
        (dict(configs=("method9",)), "configs must be of control, method1, .*; got method9"),
        (dict(seeds=0), "seeds must be at least 1, got 0"),
        (dict(images=100), "images must be at least 128, which is one step; got 100"),
        (dict(lr=1e-3, steps=3), "lr, steps: set by the study itself"),
        (dict(widht=8), "unknown options: widht"),
    ):
        with pytest.raises(ValueError, match=message):
            reproduce.reproduce_table1(tmp_path, **arguments)


def test_the_command_of_table_1_passes_its_flags_on(monkeypatch, capsys, tmp_path):
    scores = dict(fid=1.0, kid=0.02, kid_floor=0.0, fid_floor=0.1, is_real=9.0, steps=0, **{"is": 8.0})

    def study(out, **given):
        assert given == dict(
            data="mnist", configs=["method3"], seeds=2, n=50, images=256, conditional=True, base=tmp_path, critic=None,
            device="cpu",
        )  # fmt: skip
        return {"before": [scores], "control": [scores]}

    monkeypatch.setattr(reproduce, "reproduce_table1", study)
    flags = "--data mnist --config method3 --seeds 2 --n 50 --images 256 --conditional --device cpu --base".split()
    with pytest.raises(SystemExit) as stop:
        cli.main(["reproduce", "table1", "--out", str(tmp_path), *flags, str(tmp_path)])
    text = capsys.readouterr().out
    assert not stop.value.code and "+0.0000" in text and "0.0200" in text and "mnist-conditional/report.html" in text


@pytest.fixture(scope="module")
def toy_example(tmp_path_factory):
    out = tmp_path_factory.mktemp("toy")
    return out, reproduce.reproduce_toy(out, times=(0, 200, 800), n=20_000)


def test_the_toys_divergence_is_the_integral():
    for delta, js in ((0.5, 0.0303113), (1, 0.1114215), (2, 0.3368308), (4, 0.6327202)):
        assert toy.js_divergence(delta) == pytest.approx(js, abs=5e-8)
        assert toy.js_divergence(-delta) == pytest.approx(js, abs=5e-8)
    assert toy.js_divergence(0) == pytest.approx(0, abs=1e-15) and toy.js_divergence(30) == pytest.approx(math.log(2))

    def density(y, mean):
        return math.exp(-((y - mean) ** 2) / 2) / math.sqrt(2 * math.pi)

    def integrand(y):
        p, q = density(y, 0), density(y, 1.5)
        return 0.5 * p * math.log(2 * p / (p + q)) + 0.5 * q * math.log(2 * q / (p + q))

    assert toy.js_divergence(1.5) == pytest.approx(integrate.quad(integrand, -10, 11)[0], abs=1e-9)


def test_noised_samples_agree_with_theory(toy_example):
    out, rows = toy_example
    assert [(row["t"], row["theta"]) for row in rows] == [(t, x) for t in (200, 800) for x in (1.0, 2.0, 4.0)]
    for row in rows:
        abar = {200: 0.6590385, 800: 0.00153209}[row["t"]]
        assert row["js"] == pytest.approx(toy.js_divergence((abar / (1 - abar)) ** 0.5 * row["theta"]), rel=1e-5)
        assert abs(row["sampled"] - row["js"]) < 4 * row["error"] and row["critic"] < 0.02
    html = (out / "report.html").read_text()
    assert "Figure 2" in html and len(re.findall('src="data:image/svg', html)) == 2
    with pytest.raises(ValueError, match=r"times in 0..1000; got 1.0, 100000, 2000"):
        reproduce.reproduce_toy(out, times=(2000,))


def test_the_optimal_critic_is_the_ratio_of_densities():
    a, b, theta, y = 0.7, 0.4, 2.0, torch.linspace(-3, 4, 9, dtype=torch.float64)
    p, q = (torch.exp(-((y - mean) ** 2) / (2 * b)) for mean in (0, a * theta))
    torch.testing.assert_close(torch.sigmoid(toy.optimal_logit(y, a, b, theta)), p / (p + q))


@pytest.fixture(scope="module")
def gaussian_study(tmp_path_factory):
    out = tmp_path_factory.mktemp("gaussians")
    options = dict(steps=4, batch_size=16, log_every=2, subset=2000, progress=False)
    return out, options, reproduce.reproduce_gaussians(out, seeds=2, n=200, **options)


def test_all_arms_of_the_gaussians_have_equal_terms(gaussian_study):
    out, _, results = gaussian_study
    arms = ["gan", "diffusion-gan", "gan, R1", "diffusion-gan, R1"]
    assert {arm: len(seeds) for arm, seeds in results.items()} == dict.fromkeys(arms, 2)
    settings, sizes = [], []
    for arm in ("gan", "diffusion-gan", "gan-R1", "diffusion-gan-R1"):
        run = dgf.load(out / arm / "seed-1")
        settings.append(run.method.config.to_dict())
        sizes.append({name: sum(p.numel() for p in run.state[name].parameters()) for name in ("generator", "critic")})
    assert all(size == sizes[0] for size in sizes)
    for plain, penalised in (settings[0::2], settings[1::2]):
        assert {k for k in plain if plain[k] != penalised[k]} == {"r1_gamma", "r1_every"}
    for plain, noisy in (settings[:2], settings[2:]):
        assert all(plain[k] == noisy[k] for k in plain)
    for seed in results["gan"]:
        assert 0 <= seed["modes"] <= 25 and seed["high_quality_real"] == pytest.approx(0.989, abs=0.03)
    html = (out / "report.html").read_text()
    assert "Missed: " in html and "Largest noise level T" in html and "Figure 5" in html
    assert "sigma 3" in html and "r1_gamma 0.1" in html


def test_complete_gaussians_are_reused_and_arms_stay_comparable(gaussian_study, monkeypatch):
    out, options, results = gaussian_study
    monkeypatch.setattr(Run, "evaluate", None)
    monkeypatch.setattr("diffgan_fast.engine.loop.Loop._step", None)
    assert reproduce.reproduce_gaussians(out, seeds=1, n=200, **options) == {k: v[:1] for k, v in results.items()}
    with pytest.raises(ValueError, match="sigma: not of all arms"):
        reproduce.reproduce_gaussians(out, sigma=1.0)


def test_the_worst_seed_decides():
    def seed(modes, share, seconds=60.0):
        return dict(modes=modes, high_quality=share, seconds=seconds, modes_real=25, high_quality_real=0.989)

    good = [seed(25, 0.95), seed(25, 0.9)]
    assert "Met: 25 modes, 90.0%, 60.0 s" in gaussians.verdict({"gan": good, "diffusion-gan, R1": good})
    for bad in (seed(24, 0.95), seed(25, 0.89), seed(25, 0.95, 121.0)):
        assert "Missed: " in gaussians.verdict({"gan": good, "diffusion-gan, R1": [*good, bad]})
    rows, columns = reproduce.modes_table({"gan": [seed(7, 0.5), seed(9, 0.7)], "diffusion-gan": good})
    text = report.table(rows, columns)
    assert "7, 9" in text and "60.0 ± 14.1" in text and "50.0%" in text and "real data" in text


@pytest.fixture(scope="module")
def gan_study(tmp_path_factory):
    out = tmp_path_factory.mktemp("images")
    study = dict(
        data="digits",
        networks="dcgan",
        n=40,
        kimg=0.032,
        width=4,
        critic_width=4,
        batch_size=8,
        log_every=1,
        subset=300,
    )
    return out, study | {"progress": False}, reproduce.reproduce_diffusion_gan(out, seeds=2, **study, progress=False)


def test_every_gan_of_images_is_measured(gan_study):
    out, _, results = gan_study
    assert list(results) == [("dcgan", config) for config in diffusion_gan.CONFIGS]
    for (network, config), seeds in results.items():
        stored = json.loads((out / "digits" / network / config / "seed-1" / "config.json").read_text())
        assert stored["config"]["steps"] == 4 and stored["config"]["ema"] == 0.999 and stored["subset"] == 300
        assert len(seeds) == 2 and seeds[0]["fid"] != seeds[1]["fid"]
    last = {config: results["dcgan", config][0].get("T") for config in diffusion_gan.CONFIGS}
    assert last["gan"] is None and last["fixed-T"] == 500 and last["diffusion-gan"] in (5, 6)
    html = (out / "digits" / "report.html").read_text()
    assert "dcgan: training, seed 0 (Figure 4)" in html and "Table 7" in html and "never with published ones" in html
    assert reproduce.diffusion_gan_table(results)[0][-1]["network"] == "real data"


def test_complete_gans_are_reused_and_terms_are_fixed(gan_study, monkeypatch):
    out, study, results = gan_study
    monkeypatch.setattr(Run, "evaluate", None)
    monkeypatch.setattr("diffgan_fast.engine.loop.Loop._step", None)
    seen = reproduce.reproduce_diffusion_gan(out, seeds=1, **{**study, "configs": "priority"})
    assert seen == {("dcgan", "priority"): results["dcgan", "priority"][:1]}
    for arguments, message in (
        (dict(data="moons"), "data must be of digits"),
        (dict(networks="unet"), "networks must be of dcgan, sngan, stylegan2; got unet"),
        (dict(configs=()), "configs must be of gan, diffusion-gan, .*; got none"),
        (dict(steps=3, T_max=9), "T_max, steps: set by the study itself"),
    ):
        with pytest.raises(ValueError, match=message):
            reproduce.reproduce_diffusion_gan(out, **arguments)


def test_the_commands_of_diffusion_gan(monkeypatch, capsys, tmp_path):
    seen = {}

    def study(name, result):
        def run(out, **given):
            seen[name] = given
            return result

        monkeypatch.setattr(reproduce, name, run)

    outcome = dict(modes=25, high_quality=0.9, modes_real=25, high_quality_real=0.989, seconds=3.0)
    study("reproduce_gaussians", {"gan": [outcome]})
    scores = {k: 1.0 for k in ("fid", "kid", "recall", "fid_floor", "kid_floor", "recall_real", "seconds", "T")}
    study("reproduce_diffusion_gan", {("dcgan", "gan"): [scores]})
    study("reproduce_toy", [{"t": 200, "js": 0.5}])
    for arguments, expected in (
        ("gaussians --seeds 2 --steps 9 --device cpu", dict(seeds=2, steps=9, device="cpu")),
        ("gaussians", dict(seeds=5, device="auto")),
        ("toy --n 50 --sigma 0.5 --seed 4", dict(n=50, sigma=0.5, seed=4)),
        (
            "diffusion-gan --data digits --network dcgan --config gan --kimg 2 --subset 50 --device cpu",
            dict(
                data="digits", networks=["dcgan"], configs=["gan"], seeds=3, n=2000, kimg=2.0, subset=50, device="cpu"
            ),
        ),
    ):
        with pytest.raises(SystemExit) as stop:
            cli.main(["reproduce", *arguments.split(), "--out", str(tmp_path)])
        assert not stop.value.code and "report.html" in capsys.readouterr().out
        assert seen["reproduce_" + arguments.split()[0].replace("-", "_")] == expected
