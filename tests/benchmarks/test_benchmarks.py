"""The benchmarks run on tiny sizes, and a provider that computes something else is caught."""

import csv
import dataclasses
import importlib
import json
import os
import subprocess
import sys

import numpy as np
import pytest
import torch

import diffgan_fast as dgf
from benchmarks import cases, gpu, machine, oracle, report
from benchmarks.__main__ import main
from benchmarks.harness import measure
from diffgan_fast import backends
from diffgan_fast.ops import conv, norm

pytestmark = pytest.mark.skipif(backends.unavailable("cpu") is not None, reason="no native library for the CPU")
QUICK = cases.Options(quick=True, compile=False)
OPS = {"random": 2, "noise": 3, "step": 4, "loss": 2}  # benchmark: its cases
FLOAT_COLUMNS = ("ms", "p20_ms", "p80_ms", "ns_per_element", "gb_per_s", "over_eager", "of_copy")


def tiny_case(**changes):
    """A case of doubling x, with an eager provider that is right."""
    size = cases.Size((6, 5), torch.float32, torch.device("cpu"))
    case = cases.Case(
        "double",
        size,
        lambda: (size.randn(),),
        lambda data, t, z: (2 * data[0],),
        [cases.Provider("eager", lambda x, t: 2 * x), cases.copy(size)],
        bytes=8,
        ops=1,
    )
    return dataclasses.replace(case, **changes)


@pytest.mark.parametrize("name", OPS)
def test_op_benchmark(name):
    rows = report.with_ratios(importlib.import_module(f"benchmarks.{name}").run(QUICK))
    assert len({row["case"] for row in rows}) == OPS[name]
    assert {"dgf-cpu", "dgf-reference", "eager", "copy"} <= {row["provider"] for row in rows}
    assert not report.red(rows), report.table(rows)
    for row in rows:
        assert all(row[c] > 0 for c in FLOAT_COLUMNS)
        assert row["p20_ms"] <= row["ms"] <= row["p80_ms"]
        assert set(row) <= set(report.COLUMNS)


@pytest.mark.gpu
@pytest.mark.parametrize("name", OPS)
def test_op_benchmark_on_a_gpu(name):
    rows = importlib.import_module(f"benchmarks.{name}").run(dataclasses.replace(QUICK, device="cuda"))
    assert {"dgf-triton", "eager", "copy"} <= {row["provider"] for row in rows}
    assert not report.red(rows), report.table(rows)
    assert all(row["host_ms"] > 0 for row in rows)


def test_diffusers_is_a_peer():
    pytest.importorskip("diffusers")
    rows = [row for name in ("noise", "step") for row in importlib.import_module(f"benchmarks.{name}").run(QUICK)]
    assert len([row for row in rows if row["provider"] == "diffusers"]) == 5


@pytest.mark.skipif(not conv._WINOGRAD, reason="the kernels need AVX2")
def test_conv_benchmark():
    from benchmarks import conv as benchmark

    rows = report.with_ratios(benchmark.run(QUICK))
    assert [row["provider"] for row in rows] == ["eager", "dgf"] * 3 and not report.red(rows)
    assert all(row["floor_ms"] > 0 for row in rows)


@pytest.mark.skipif(not norm._EXISTS, reason="the CPU library is not there")
def test_norm_benchmark():
    from benchmarks import norm as benchmark

    rows = report.with_ratios(benchmark.run(QUICK))
    assert {row["provider"]: row["status"] for row in rows} == {"eager": "ok", "dgf": "ok"}
    assert len(rows) == 4 and all(row["floor_ms"] > 0 for row in rows)


def test_training_benchmark():
    from benchmarks import training

    rows = report.with_ratios(training.run(QUICK))
    assert [row["provider"] for row in rows] == [arm.name for arm in training.ARMS]
    assert not report.red(rows), report.table(rows)
    assert all(row["images_per_s"] > 0 and row["over_as_coded"] > 0 for row in rows)


def test_steps_benchmark(tmp_path, capsys):
    from benchmarks import steps

    rows = report.with_ratios(steps.run(QUICK))
    assert not report.red(rows), report.table(rows)
    found = {(row["case"], row["provider"]) for row in rows}
    assert found >= {(family, arm) for family in steps.QUICK for arm in ("reference", "ours")}
    for package, (module, _) in steps.PEERS.items():
        installed = importlib.util.find_spec(module) is not None
        assert (("ddpm", package) in found) == installed
        assert installed or f"{package} is skipped" in capsys.readouterr().out
    for row in rows:
        assert all(row[c] > 0 for c in ("ms", "images_per_s", "floor_ms", "peak_mib", "over_reference")), row
        if row["provider"].startswith("ours"):
            assert 0 < row["of_kernels"] < 1 and row["of_kernels"] == sum(row["kernels"].values())
    assert set().union(*rows) <= {*report.COLUMNS, "kernels"}  # the latter in the JSON file alone
    assert report.plot(rows, tmp_path / "steps.png").stat().st_size > 1000


@pytest.mark.parametrize("family", ["ddpm", "method2"])
def test_steps_of_another_formula_are_red(family, monkeypatch):
    """The engine on other betas than the reference has."""
    from benchmarks import steps

    case = steps.Case(family, (1, 8, 8), 4, 3 if family == "method2" else steps.T, torch.device("cpu"))
    x = torch.rand(4, 1, 8, 8) * 2 - 1
    assert steps.verify(case, x) == "ok"
    right = dgf.Schedule.linear
    monkeypatch.setattr("diffgan_fast.methods.diffusion.Schedule.linear", lambda T, *_: right(T, 1e-4, 0.2))
    monkeypatch.setattr(steps.Case, "tables", lambda self, dtype=torch.float32: tables(self, dtype, right))
    assert steps.verify(case, x).startswith("RED")


def tables(case, dtype, linear):
    abar = linear(case.steps).alphas_cumprod
    return abar.to(dtype), (1 - abar / abar.roll(1)).to(dtype)


def test_chain_benchmark():
    from benchmarks import chain

    rows = chain.run(QUICK)
    assert not report.red(rows), report.table(rows)
    memory = [row for row in rows if row["case"].startswith("memory, ")]
    assert len(memory) == 2 and all(row["peak_mib"] > row["expected_mib"] > 0 for row in memory)
    assert [row["case"] for row in rows if "a step" in row["case"]] == ["memory a step, T = 6 to 8"]
    time = [row for row in rows if row["case"].startswith("training step")]
    assert [row["provider"] for row in time] == ["none", "step", "step"]
    assert all(row["images_per_s"] > 0 for row in time) and time[0]["over_none"] == 1 and time[1]["over_none"] > 0
    assert all(set(row) <= set(report.COLUMNS) for row in rows)


@pytest.mark.parametrize("recompute, kept", [("step", 300), (17, 18 + 17)])
def test_expected_memory_of_the_chain(recompute, kept):
    """Per batch 4.7 MiB a sample and 3 KiB a state, and 1,737,153 parameters' gradients."""
    from benchmarks import chain

    want = 4.7 * 128 + kept * 784 * 4 * 128 / 2**20 + 1_737_153 * 4 / 2**20
    assert abs(chain.expected(300, 128, recompute) - want) < 1e-6


def test_metrics_benchmark():
    from benchmarks import metrics

    rows = report.with_ratios(metrics.run(QUICK))
    assert {row["provider"] for row in rows} >= {metrics.OURS, "sqrtm", "eigvals", "subset"}
    assert not report.red(rows), report.table(rows)
    assert all(row["over_libraries"] > 0 and row["peak_mib"] >= 0 for row in rows if row["case"] != "precision-recall")
    assert set().union(*rows) <= set(report.COLUMNS)


def test_ddgan_benchmark():
    from benchmarks import ddgan

    rows = report.with_ratios(ddgan.run(QUICK))
    assert [row["provider"] for row in rows] == ["reference", "ours", "ddpm", "ddgan"]
    assert not report.red(rows), report.table(rows)
    reference, ours, ddpm, few = rows
    assert all(row["images_per_s"] > 0 for row in rows) and ours["over_reference"] > 0 and few["over_ddpm"] > 0
    # with R1 in every second iteration: 6 G + 8 D of the reference, and 4 G + 8 D of ours, plus what R1 adds to both
    assert ours["predicted"] == pytest.approx(reference["macs"] / ours["macs"]) and 1.2 < ours["predicted"] < 1.35
    assert abs(ddpm["macs"] / few["macs"] - 1) <= 0.1
    assert few["predicted"] == pytest.approx(6 * ddpm["macs"] / (4 * few["macs"]))
    assert set().union(*rows) <= set(report.COLUMNS)


def test_ddgan_arms_are_eager(monkeypatch):
    """No step of the engine is captured on CUDA, and sampling never asks whether its steps are to be."""
    from benchmarks import ddgan

    ours = ddgan.Ours(dgf.nets.DDGANGenerator(1, 8, T=4), dgf.nets.DDGANCritic(1, 8, T=4), (1, 8, 8))
    assert not ours.method.config.cuda_graphs
    unet, schedule = dgf.nets.UNet.preset(8, 1, width=8).eval(), dgf.Schedule.linear_scaled(6)
    want = dgf.sample(unet, (2, 1, 8, 8), schedule, 5, channels_last=True)
    assert torch.equal(ddgan.walk(unet, (2, 1, 8, 8), schedule, 5, torch.device("cpu")), want)
    monkeypatch.setattr("diffgan_fast.sampling._worthwhile", None)
    assert len(ddgan.sampling_rows(QUICK, 8, 1, 2)) == 2


def test_ddgan_counts_the_passes():
    """Without R1 an iteration of the reference is 6 passes of the generator and 8 of the critic, of ours 4 and 8."""
    from benchmarks import ddgan

    x, t, z = torch.zeros(4, 1, 8, 8), torch.ones(4, dtype=torch.int64), torch.zeros(4, 100)
    generator, critic = dgf.nets.DDGANGenerator(1, 8, T=4), dgf.nets.DDGANCritic(1, 8, T=4)
    G, D = dgf.nets.macs(generator, x, t, z) / 4, dgf.nets.macs(critic, x, t=t, x_t=x) / 4
    arms = ddgan.Reference(generator, critic), ddgan.Ours(generator, critic, (1, 8, 8))
    for arm, passes in zip(arms, (6, 4), strict=True):
        arm.step(x)  # the first iteration is one with R1
        assert ddgan.macs_of(arm, x, 1) == pytest.approx(passes * G + 8 * D, rel=0.03)


def test_ddgan_tells_a_wrong_arm(monkeypatch):
    from benchmarks import ddgan

    torch.manual_seed(1)
    generator, critic = dgf.nets.DDGANGenerator(1, 8, T=4), dgf.nets.DDGANCritic(1, 8, T=4)
    x0 = torch.rand(4, 1, 8, 8) * 2 - 1
    assert ddgan.verify(generator, critic, x0) == {"reference": "ok", "ours": "ok"}
    monkeypatch.setattr(ddgan.Reference, "posterior", lambda self, x0, x_tp1, t, part, draw: x0)
    assert ddgan.verify(generator, critic, x0)["ours"].startswith("RED")


@pytest.mark.parametrize("shape", [(4, 1, 28, 28), (2, 3, 32, 32)])
def test_ddgan_is_right_at_the_sizes_that_are_timed(shape):
    """However sure the untrained critic is: at 32 pixels its one step may leave the generator a loss of 0."""
    from benchmarks import ddgan

    torch.manual_seed(0)
    generator, critic = (net(*shape[1:3], T=4) for net in (dgf.nets.DDGANGenerator, dgf.nets.DDGANCritic))
    x0 = torch.rand(shape) * 2 - 1
    assert ddgan.verify(generator, critic, x0) == {"reference": "ok", "ours": "ok"}


def test_instance_noise_benchmark():
    from benchmarks import instance_noise

    rows = report.with_ratios(instance_noise.run(QUICK))
    assert not report.red(rows), report.table(rows)
    assert [row["provider"] for row in rows] == 2 * ["reference", "ours", "copy"] + ["step", "noiser"]
    assert all(row["over_reference"] > 0 for row in rows[:-2]) and rows[-2]["of_step"] == 1 and rows[-1]["of_step"] > 0
    assert set().union(*rows) <= set(report.COLUMNS)


def test_a_wrong_noiser_is_red():
    from benchmarks import instance_noise

    x, slots = torch.randn(64, 3, 8, 8), np.arange(64) % 2 * 7
    right = instance_noise.Reference(slots, x.device)
    assert instance_noise.verify(right, x) == "ok"
    right.noise = 1.2 * right.noise
    assert instance_noise.verify(right, x).startswith("RED: mean")
    right.noise[0] = 0.1
    assert instance_noise.verify(right, x) == "RED: clean samples changed"


def test_compile_modes():
    """Both modes are measured; fallback_random draws what eager draws, the default does not."""
    size = cases.Size((300,), torch.float32, torch.device("cpu"))
    providers = cases.peers(lambda wrap: wrap(lambda x, t: x + torch.randn_like(x)), size, cases.Options(quick=True))
    outputs = {}
    for provider in providers:
        torch.manual_seed(1)
        outputs[provider.name] = provider.run(torch.ones(300), None)
    assert list(outputs) == ["eager", "compile", "compile-fallback"]
    assert torch.equal(outputs["compile-fallback"], outputs["eager"])
    assert not torch.equal(outputs["compile"], outputs["eager"])
    torch._dynamo.reset()


@pytest.mark.parametrize(
    "wrong",
    [
        lambda x, t: 2 * x + 0.01,
        lambda x, t: (2 * x)[:-1],
        lambda x, t: torch.where(torch.arange(5) == 4, torch.nan, 2 * x),
        lambda x, t: 2 * x + 0.1 * torch.randn_like(x),
    ],
)
def test_wrong_provider_is_red(wrong):
    providers = [cases.Provider("eager", lambda x, t: 2 * x), cases.Provider("dgf-wrong", wrong)]
    rows = report.with_ratios(measure("test", tiny_case(providers=providers), QUICK))
    right, bad = rows
    assert right["status"] == "ok" and right["over_eager"] == 1
    assert bad["status"].startswith("RED") and "ms" not in bad and "over_eager" not in bad
    assert report.red(rows) == [bad]


@pytest.mark.parametrize("key_offset, scale, bad", [(0, 1.0, False), (1, 1.0, True), (0, 1.001, True)])
def test_wrong_noise_of_a_key_is_red(key_offset, scale, bad):
    def run(t, key):
        return scale * dgf.random.normal((6, 5), key + key_offset)

    provider = cases.Provider("dgf-cpu", run, "key", "cpu")
    case = tiny_case(data=tuple, expected=lambda data, t, z: z, providers=[provider])
    assert measure("test", case, QUICK)[0]["status"].startswith("RED") == bad


@pytest.mark.parametrize(
    "draw, status",
    [(torch.randn, "ok"), (torch.rand, "RED"), (torch.zeros, "RED"), (lambda shape: 1.1 * torch.randn(shape), "RED")],
)
def test_hidden_noise_is_checked_by_its_moments(draw, status):
    size = cases.Size((4000, 5), torch.float32, torch.device("cpu"))
    provider = cases.Provider("eager", lambda t: draw((4000, 5)))
    case = tiny_case(size=size, data=tuple, expected=lambda data, t, z: z, providers=[provider])
    assert measure("test", case, QUICK)[0]["status"].startswith(status)


def test_every_call_is_fresh():
    seen = []

    def run(x, t, key):
        seen.append((key, tuple(t.tolist()), x.data_ptr()))
        return 2 * x

    measure("test", tiny_case(providers=[cases.Provider("dgf", run, "key", "cpu")]), QUICK)
    assert len({key for key, _, _ in seen}) == len({t for _, t, _ in seen}) == len(seen) > 4
    assert len({pointer for _, _, pointer in seen}) > 1


def test_oracle_knows_random123():
    """The first words of counter 0 under key 0 (Random123's known answers), and the library's normals."""
    cpu = torch.device("cpu")
    assert oracle.words(4, 0, 0, cpu).tolist() == [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]
    with dgf.backend("reference"):
        assert torch.equal(oracle.normals(7, 123, 1, cpu), dgf.random.normal(7, 123, stream=1, dtype=torch.float64))


def test_best_of_processes():
    row = dict.fromkeys(report.CASE, 1) | {"provider": "a", "status": "ok"}
    rows = [row | {"ms": 3.0}, row | {"ms": 2.0}, row | {"ms": 4.0}]
    assert report.best(rows) == [rows[1]]
    assert report.best([*rows, row | {"status": "RED: x"}, *rows])[0]["status"] == "RED: x"


def test_ratios_take_the_faster_compile():
    row = dict.fromkeys(report.CASE, 1) | {"status": "ok"}
    times = {"dgf-cpu": 1.0, "compile": 6.0, "compile-fallback": 5.0, "eager": 3.0}
    ours = report.with_ratios([row | {"provider": p, "ms": ms} for p, ms in times.items()])[0]
    assert (ours["over_compile"], ours["over_eager"]) == (5.0, 3.0)


def test_command_line_and_files(tmp_path, capfd):
    assert main(["random", "--quick", "--no-compile", "--threads", "1", "--out", str(tmp_path)]) == 0
    printed = capfd.readouterr().out
    assert dgf.__file__ in printed and "over_eager" in printed
    folder = tmp_path / machine.slug("cpu")
    saved = json.loads((folder / "random.json").read_text())
    assert {"machine", "torch", "python", "git", "dirty", "date", "threads", "allocator"} <= set(saved["meta"])
    with (folder / "random.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == len(saved["rows"])
    assert set(rows[0]) == {*report.COLUMNS, *report.STAMPS}
    assert all(float(row["ms"]) > 0 and row["machine"] == folder.name for row in rows)


def test_missing_library_ends_with_a_message(monkeypatch, capsys):
    monkeypatch.setattr(backends._native, "CPU_REASON", "no compiler was there")
    assert main(["noise", "--quick"]) == 1
    assert "no compiler was there" in capsys.readouterr().err


@pytest.mark.parametrize(
    "code, limit_s, result",
    [("print('fine')", 60, "ok"), ("raise SystemExit(3)", 60, "failed (3)"), ("while True: pass", 1, "over 1 s")],
)
def test_gpu_stage(tmp_path, code, limit_s, result):
    row = gpu.run_stage(gpu.Stage("s", [sys.executable, "-c", code], limit_s), tmp_path / "s.log", limit_s)
    assert row["result"] == result


def test_gpu_stage_without_its_program(tmp_path):
    stage = gpu.Stage("s", [str(tmp_path / "missing")], 5)
    assert gpu.run_stage(stage, tmp_path / "s.log", 5)["result"].startswith("failed")


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_gpu_command_without_a_gpu(capsys):
    assert gpu.main([]) == 2
    assert "no GPU" in capsys.readouterr().err


def test_sanitize_script():
    command = [sys.executable, "-m", "benchmarks.sanitize", "cpu"]
    done = subprocess.run(command, cwd=machine.ROOT, env=dict(os.environ), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_gpu_command_goes_on_after_a_failure(tmp_path, monkeypatch, capsys):
    def stage(name, code):
        return gpu.Stage(name, [sys.executable, "-c", code], 60)

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(machine, "slug", lambda device: "gpu-test")
    monkeypatch.setattr(machine, "describe", lambda device: {"device": device})
    monkeypatch.setattr(gpu, "stages", lambda out: [stage("bad", "1 / 0"), stage("good", "print('done')")])
    monkeypatch.setenv("OUT", str(tmp_path))
    assert gpu.main(["--out", str(tmp_path)]) == 1
    summary = json.loads((tmp_path / "gpu-test" / "gpu.json").read_text())
    assert [(s["stage"], s["result"]) for s in summary["stages"]] == [("bad", "failed (1)"), ("good", "ok")]
    assert (tmp_path / "gpu-test.tar.gz").exists()
    assert "ZeroDivisionError" in capsys.readouterr().out
    assert gpu.main(["--out", str(tmp_path), "--stages", "good"]) == 0
    assert gpu.main(["--out", str(tmp_path), "--stages", "good", "--budget", "0"]) == 1


def test_sampling_benchmark():
    from benchmarks import sampling

    rows = report.with_ratios(sampling.run(QUICK))
    assert not report.red(rows), report.table(rows)
    peers = {"diffusers", "denoising-diffusion-pytorch"}
    assert {"reference", "dgf"} <= {row["provider"] for row in rows} <= {"reference", "dgf", *peers}
    assert all(row["images_per_s"] > 0 and row["floor_ms"] > 0 and row["over_reference"] > 0 for row in rows)
    assert set().union(*rows) <= set(report.COLUMNS)


def test_sampling_of_another_formula_is_red(monkeypatch):
    from benchmarks import sampling

    net, schedule = sampling.StudentUNet(T=sampling.T).eval(), dgf.Schedule.linear(sampling.T)
    ours = sampling.Ours(net, dgf.Schedule.linear(sampling.T, 1e-4, 0.03))
    ours.schedule, wrong = schedule, ours.schedule
    assert sampling.verify(ours, net, (1, 1, 28, 28), torch.device("cpu")) == "ok"
    monkeypatch.setattr(
        dgf,
        "sample",
        lambda net, shape, schedule, *rest, sample=dgf.sample, **options: sample(net, shape, wrong, *rest, **options),
    )
    assert sampling.verify(ours, net, (1, 1, 28, 28), torch.device("cpu")).startswith("RED")
