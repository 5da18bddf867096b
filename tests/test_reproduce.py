"""The 2-D study in small: few steps, few noise levels, few samples."""

import re

import pytest

from diffgan_fast import cli, report, reproduce
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
        *(reproduce.CONFIGS[c] for c in CONFIGS), "Samples (Figure 2)", "Densities", "Training loss (Figure 1)",
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
    assert list(reproduce.PUBLISHED) == list(reproduce.CONFIGS)[:-2]
    for by_data in reproduce.PUBLISHED.values():
        assert tuple(by_data) == reproduce.DATA and all(len(row) == len(reproduce.MEASURED) for row in by_data.values())
    linear = [reproduce.PUBLISHED[c] for c in ("baseline", "adversarial", "gradient-penalty", "fine-tuned")]
    for data, (mean, two_sd) in reproduce.SPREAD.items():
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
