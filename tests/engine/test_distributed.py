"""Runs of several processes against the same run of one. Few launches: each imports torch in every process."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import diffgan_fast as dgf
from diffgan_fast.engine import checkpoint, distributed
from tests.engine import several

ROOT = Path(__file__).parents[2]
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
PATIENCE = 400  # seconds; a launch takes half a minute where nothing else runs


def launch(what, folder, size):
    """`several` in so many processes that find each other through a file, and what each of them told."""
    folder.mkdir()
    workers = [
        subprocess.Popen(
            [sys.executable, "-m", "tests.engine.several", what, str(folder)],
            env={**ENVIRONMENT, "TEST_RANK": str(rank), "TEST_SIZE": str(size)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            cwd=ROOT,
        )
        for rank in range(size)
    ]
    try:
        told = [worker.communicate(timeout=PATIENCE)[0] for worker in workers]
    finally:
        for worker in workers:
            worker.kill()
    assert [worker.returncode for worker in workers] == [0] * size, "\n".join(told)
    return [json.loads((folder / f"found-{rank}.json").read_text()) for rank in range(size)]


def torchrun(*arguments):
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--master_addr=127.0.0.1"]
    command += ["--master_port=0", "--standalone", *map(str, arguments)]
    return subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, timeout=PATIENCE, cwd=ROOT)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """The runs of one process, of two and of four, and what the processes told."""
    root = tmp_path_factory.mktemp("several")
    with torch.random.fork_rng():
        several.train_all(root / "1")
    return {1: root / "1", 2: root / "2", 4: root / "4"}, {n: launch(w, root / str(n), n) for n, w in MODES.items()}


MODES = {2: "all", 4: "few"}


def difference(one, other):
    """The largest difference of what two runs learned, and of the losses that they logged."""
    (a, b), path = (checkpoint.steps(folder)[-1] for folder in (one, other)), "checkpoints/step-{}/model.safetensors"
    assert a == b
    mine, theirs = (load_file(folder / path.format(a)) for folder in (one, other))
    assert mine.keys() == theirs.keys()
    weights = max(float((mine[k].double() - theirs[k].double()).abs().max()) for k in mine)
    rows = [checkpoint.read_rows(folder / "metrics.jsonl") for folder in (one, other)]
    assert [row.keys() for row in rows[0]] == [row.keys() for row in rows[1]] and rows[0]
    losses = [abs(x[k] - y[k]) for x, y in zip(*rows, strict=True) for k in x if k not in ("seconds", "evaluation")]
    return weights, max(losses)


@pytest.mark.parametrize("run", [*several.RUNS, "own", "method3/base"])
def test_two_processes_learn_what_one_does(run, folders):
    weights, losses = difference(folders[0][1] / run, folders[0][2] / run)
    assert weights < 1e-5 and losses < 1e-5
    assert (folders[0][2] / run / "report.html").exists()


@pytest.mark.parametrize("run", ["ddpm", "gan", "own", "discriminator-guidance"])
def test_four_processes_learn_what_one_does(run, folders):
    weights, losses = difference(folders[0][1] / run, folders[0][4] / run)
    assert weights < 1e-5 and losses < 1e-5


@pytest.mark.parametrize("size", [2, 4])
def test_a_run_in_float16_is_shared(size, folders):
    """Up to float16's rounding, which differs with the size of a part; all leave out the same steps."""
    weights, losses = difference(folders[0][1] / "half", folders[0][size] / "half")
    assert weights < 2e-3 and losses < 1e-3
    scalers = [
        json.loads((folders[0][n] / "half/checkpoints/step-6/state.json").read_text())["scalers"] for n in (1, size)
    ]
    assert scalers[0] == scalers[1] and scalers[0]["denoiser"]["scale"] > 0


@pytest.mark.parametrize("size", [2, 4])
def test_scores_in_training_are_those_of_one_process(size, folders):
    """Of 10 samples, of which four processes have unequal parts."""
    rows = (checkpoint.read_rows(folders[0][n] / "ddpm" / "metrics.jsonl")[-1] for n in (1, size))
    mine, theirs = (row["evaluation"] for row in rows)
    assert all(mine.pop(key) == theirs.pop(key) for key in ("labels", "extractor"))
    assert mine == pytest.approx(theirs, rel=1e-3)
    assert checkpoint.best(folders[0][size] / "ddpm")["step"] == 20


@pytest.mark.parametrize("size", [2, 4])
def test_the_samples_that_a_guiding_critic_learns_from_are_those_of_one_process(size, folders):
    """Five: neither number of processes divides them."""
    path = "discriminator-guidance/fakes.safetensors"
    mine, theirs = (load_file(folders[0][n] / path)["samples"] for n in (1, size))
    torch.testing.assert_close(theirs, mine, rtol=0, atol=1e-4)


@pytest.mark.parametrize(("size", "name", "n"), [(2, "ddpm", 5), (2, "gan-enhanced", 5), (4, "ddpm", 6)])
def test_samples_and_scores_of_all_processes_are_those_of_one(size, name, n, folders):
    """The same weights, sampled and measured in this process alone."""
    told = [found[name] for found in folders[1][size]]
    run = dgf.load(folders[0][size] / name)
    for found in told:
        torch.testing.assert_close(torch.tensor(found["some"]), run.sample(n, seed=3, first=2), rtol=0, atol=1e-5)
        torch.testing.assert_close(torch.tensor(found["one"]), run.sample(1, seed=3), rtol=0, atol=1e-5)
        assert found["scores"] == told[0]["scores"]
    assert [found["drawn"] for found in told] == {(2, 5): [3, 2], (4, 6): [2, 1, 2, 1]}[size, n]
    assert "evaluation.json" in told[0]["written"] and all(found["written"] == [] for found in told[1:])
    mine, theirs = run.evaluate(n + 15), told[0]["scores"]
    numbers = [k for k, v in mine.items() if isinstance(v, float) and k != "sample_seconds"]
    assert len(numbers) >= 3 and {k: theirs[k] for k in numbers} == pytest.approx(
        {k: mine[k] for k in numbers}, rel=1e-3
    )
    assert mine["spread"] == pytest.approx(theirs["spread"], rel=1e-2)
    assert all(mine[k] == theirs[k] for k in ("n", "reference_n", "floor_n", "labels", "warnings", "sampling", "step"))


def test_processes_that_are_not_called_alike_or_fail_say_so_and_go_on(folders):
    for told in folders[1][2]:
        assert told["unlike"] == "ValueError: the processes of a run must be called alike; they differ in seed"
        assert told["one fails"] == told["one fails while it measures"] == "OSError: a fault of process 1"
        assert told["not finite"] == "NotFinite: samples must be finite; they hold NaN or infinity"
    assert folders[1][2][1]["alone"] == "no error"


def test_a_comparison_is_the_same_in_every_process(folders):
    rows = [told["rows"] for told in folders[1][2]]
    assert rows[0] == rows[1] and rows[0][0]["n"] == 20 and (folders[0][2] / "compare" / "report.html").exists()


def test_sharing_needs_the_other_processes(tmp_path, monkeypatch):
    """Torchrun has started several, which nothing has brought together: each would draw all samples."""
    run = several.train("ddpm", tmp_path / "run", width=8, T=2, steps=1)
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="together must be False until dgf.train or init_process_group"):
        run.sample(2, together=True)
    assert len(run.sample(2)) == 2


@pytest.mark.parametrize("size", [1, 2, 3, 8])
@pytest.mark.parametrize("n", [1, 2, 7, 16])
def test_parts_make_up_all_samples_and_are_about_equal(n, size, monkeypatch):
    monkeypatch.setattr(distributed, "size", lambda: size)
    parts = []
    for rank in range(size):
        monkeypatch.setattr(distributed, "rank", lambda rank=rank: rank)
        parts.append(range(n)[distributed.part(n)])
    assert [i for part in parts for i in part] == list(range(n)) and parts[0]
    assert max(map(len, parts)) - min(map(len, parts)) <= 1


@pytest.mark.parametrize("name", several.LAYERS)
def test_batch_norm_is_that_of_the_whole_batch(name, folders):
    """Values, gradients and running statistics in float64, against torch's layer on all samples."""
    want = several.through(several.LAYERS[name](), slice(None))
    parts = [load_file(folders[0][2] / f"layers-{rank}.safetensors") for rank in (0, 1)]
    for key, value in want.items():
        a, b = (part[f"{name}.{key}"] for part in parts)
        if key[0] == "x":  # losses are means: a process's part counts half
            torch.testing.assert_close(torch.cat((a, b)) / 2, value, rtol=1e-9, atol=1e-12)
        elif key[0] == "y":
            torch.testing.assert_close(torch.cat((a, b)), value, rtol=1e-9, atol=1e-12)
        elif key[0] == "p":
            torch.testing.assert_close((a + b) / 2, value, rtol=1e-9, atol=1e-12)
        else:
            torch.testing.assert_close(a, value, rtol=1e-9, atol=1e-12)
            assert torch.equal(a, b)


def test_what_cannot_be_is_said_by_every_process(folders):
    for told in folders[1][2]:
        assert "ValueError: batch_size must be a multiple of the number of processes, 2; got 7" == told["odd"]
        assert "ValueError: batch_size must be an int" in told["auto"]
        assert "ValueError: the processes of a run must be called alike; they differ in seed" == told["seed"]
        assert "holds a run already" in told["holds"]
        assert "ValueError: layer 'body.1' must be one of torch's plain batch norms" in told["layer"]
        assert "once_differentiable" in told["second order"]
    for told in folders[1][4]:
        assert "a multiple of 4 samples, the group that network 'critic' compares; got 8" in told["groups"]


def test_a_loss_that_is_not_finite_in_one_process_stops_all(folders):
    last = folders[0][2] / "nan" / "checkpoints" / "step-4"
    for told in folders[1][2]:
        assert told["nan"] == f"TrainingError: loss is not finite at step 6; last good checkpoint: {last}"


def test_the_main_process_can_work_alone(folders):
    told = folders[1][2][0]
    assert told["samples"] == [3, 1, 8, 8] and told["plan"] == 1 and told["kid"] > 0
    assert told["in train mode"] == [2, 1, 8, 8] and told["layers"] == ["Conv2d", "BatchNorm2d", "SiLU", "Conv2d"]


def test_two_processes_stop_at_one_step_and_one_process_goes_on(folders, tmp_path):
    """Process 1 alone was interrupted, at step 4."""
    assert all(told["interrupt"].startswith("KeyboardInterrupt") for told in folders[1][2])
    cut = folders[0][2] / "cut"
    assert checkpoint.steps(cut) in ([5], [6])
    several.train("ddpm", cut, model=several.net(), T=4, log_every=5, resume=True)
    path = "checkpoints/step-20/model.safetensors"
    mine, theirs = load_file(folders[0][1] / "own" / path), load_file(cut / path)
    for name, value in mine.items():
        torch.testing.assert_close(theirs[name], value, rtol=0, atol=1e-5)


def test_a_killed_process_ends_the_run_and_torchrun_goes_on_from_its_checkpoint(tmp_path):
    """Process 1 is killed after step 8; torchrun starts both again; the command line goes on, and then one process."""
    out = tmp_path / "run"
    ended = torchrun("--max-restarts=1", "-m", "tests.engine.several", "die", out)
    last = out / "checkpoints" / "step-5"
    assert f"another process of this run has ended at step 9; last good checkpoint: {last}" in ended.stderr, (
        ended.stderr
    )
    assert ended.returncode == 0 and checkpoint.steps(out) == [12], ended.stderr
    settings = ["--steps", 16, "--batch-size", 8, "--width", 8, "--T", 4, "--sample-every", 0, "--checkpoint-every", 0]
    on = torchrun("-m", "diffgan_fast", "train", "ddpm", "--out", out, "--resume", *settings)
    assert on.returncode == 0, on.stderr
    assert on.stdout.count("16 steps in") == 1 and checkpoint.steps(out) == [12, 16]
    drawn = torchrun("-m", "--", "diffgan_fast", "sample", out, "--n", 3, "--out", tmp_path / "some.npz")
    assert drawn.returncode == 0 and drawn.stdout.count("some.npz") == 1, drawn.stderr
    want = dgf.data.to_uint8(dgf.load(out).sample(3)).permute(0, 2, 3, 1).int()
    assert (torch.from_numpy(np.load(tmp_path / "some.npz")["samples"]).int() - want).abs().max() <= 1
    run = several.train("ddpm", out, width=8, T=4, steps=20, resume=True)
    whole = several.train("ddpm", tmp_path / "whole", width=8, T=4)
    assert [row["step"] for row in run.history] == [*range(1, 13), 16, 20]
    for mine, theirs in zip(run.state["denoiser"].parameters(), whole.state["denoiser"].parameters(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-5)
    assert torch.allclose(run.sample(2), dgf.load(tmp_path / "whole").sample(2), atol=1e-4)
