"""Evaluation while a run trains, and its best checkpoint."""

import json

import pytest
import torch
from PIL import Image
from torch import nn

import diffgan_fast as dgf
from diffgan_fast import report

pytestmark = pytest.mark.filterwarnings("ignore::diffgan_fast.metrics.SmallSampleWarning")


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(1, 1, 3, padding=1)

    def forward(self, x, t):
        return self.conv(x)


def train(out, steps=6, **options):
    torch.manual_seed(0)
    defaults = dict(steps=steps, batch_size=16, T=4, lr=0.02, log_every=5, sample_every=0, evaluate_n=40, ema=0.0)
    return dgf.train("ddpm", "digits", out, model=Net(), progress=False, **{**defaults, **options})


def scored(run):
    return {row["step"]: row["evaluation"] for row in run.history if "evaluation" in row}


def test_the_best_checkpoint_is_that_of_the_best_score(tmp_path):
    run = train(tmp_path, evaluate_every=2)
    found = scored(run)
    assert list(found) == [2, 4, 6] and [row["step"] for row in run.history] == [2, 4, 5, 6]
    test, train_data = dgf.data.load("digits", split="test"), dgf.data.load("digits")
    domain = dgf.metrics.DomainClassifier.for_data(train_data)
    want = dgf.metrics.evaluate(run.sample(40, seed=2), test, extractor=domain)  # against what it is not scored on
    assert {name: found[6][name] for name in want["labels"]} == pytest.approx({n: want[n] for n in want["labels"]})
    least = min(found, key=lambda step: found[step]["kid"])
    best = dgf.load(tmp_path, best=True, model=Net())
    assert best.best and best.state.step == least and dgf.load(tmp_path, model=Net()).state.step == 6
    stopped = train(tmp_path / "stopped", least, evaluate_every=0)
    ours, theirs = (run.state["denoiser"].state_dict() for run in (best, stopped))
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    torch.testing.assert_close(best.sample(3), stopped.sample(3))


def folder(path, parts):
    """Digits as files of 20 pixels and their half, so that they must be resized."""
    for part, split in parts.items():
        data = dgf.data.load("digits", split=split, subset=30)
        for i, (image, label) in enumerate(zip(data.images, data.labels, strict=True)):
            where = path / part / str(int(label) % 2)
            where.mkdir(parents=True, exist_ok=True)
            Image.fromarray(image[0].numpy()).resize((20 - i % 2 * 10,) * 2).save(where / f"{i}.png")
    return path


def test_folders_with_a_test_part_are_chosen_on_it(tmp_path, monkeypatch):
    """As what real data score is of it; and images of any size are taken to one, also when the run is found again."""
    monkeypatch.setattr("diffgan_fast.metrics.features.IMAGES_SEEN", 200)  # of the classifier
    source = folder(tmp_path / "images", {"train": "train", "test": "test"})
    seen, measure = [], dgf.metrics.evaluate

    def spy(samples, data, **options):
        seen.append((data.fingerprint, options))
        return measure(samples, data, **options)

    monkeypatch.setattr(dgf.metrics, "evaluate", spy)
    options = dict(model=Net(), steps=2, T=4, sample_every=0, evaluate_every=1, evaluate_n=20, progress=False)
    with pytest.raises(ValueError, match="differ in size.*pass size="):
        dgf.train("ddpm", source, tmp_path / "run", **options)
    dgf.train("ddpm", source, tmp_path / "run", size=8, **options)
    train_data, test = (dgf.data.load(source, split=split, size=8) for split in ("train", "test"))
    assert {fingerprint for fingerprint, _ in seen} == {test.fingerprint} != {train_data.fingerprint}
    found = dgf.load(tmp_path / "run", best=True, model=Net()).evaluate(20, metrics=["kid"])
    assert seen[-1][0] == train_data.fingerprint and seen[-1][1]["held_out"].fingerprint == test.fingerprint
    assert found["floor_n"] == 20 and not any("flatters" in text for text in found["warnings"])


def test_data_without_a_test_part_choose_by_themselves_and_say_so(tmp_path, monkeypatch):
    monkeypatch.setattr("diffgan_fast.metrics.features.IMAGES_SEEN", 200)
    source = folder(tmp_path / "images", {".": "train"})
    options = dict(model=Net(), steps=1, T=4, sample_every=0, evaluate_every=1, evaluate_n=20, progress=False)
    dgf.train("ddpm", source, tmp_path / "run", size=8, **options)
    last, best = (dgf.load(tmp_path / "run", best=best, model=Net()).evaluate(20) for best in (False, True))
    assert not any("flatters" in text for text in last["warnings"])
    assert any("chosen on the data that it is scored on" in text for text in best["warnings"])


def test_a_test_part_of_another_shape_is_named_before_training(tmp_path):
    source = folder(tmp_path / "images", {"train": "train"})
    (source / "test").mkdir()
    for name in "ab":
        Image.new("RGB", (8, 8)).save(source / "test" / f"{name}.png")
    with pytest.raises(ValueError, match=r"test split of data 'images' must hold samples \[1, 8, 8\].*not \[3, 8, 8\]"):
        dgf.train("ddpm", source, tmp_path / "run", size=8, model=Net(), T=4, evaluate_every=1, progress=False)
    assert not (tmp_path / "run").exists()


def test_it_may_be_chosen_by_another_metric(tmp_path):
    run = train(tmp_path, evaluate_every=1, best_by="is", lr=0.2)
    found = scored(run)
    assert dgf.load(tmp_path, best=True, model=Net()).state.step == max(found, key=lambda step: found[step]["is"])


def test_points_are_chosen_by_kl(tmp_path):
    run = dgf.train(
        "ddpm", "moons", tmp_path, subset=300, steps=2, T=4, evaluate_every=1, evaluate_n=50, progress=False
    )
    found = scored(run)
    assert list(found) == [1, 2] and set(found[1]) == {"n", "reference_n", "kl", "labels"}
    assert dgf.load(tmp_path, best=True).state.step == min(found, key=lambda step: found[step]["kl"])


def test_evaluations_are_no_training(tmp_path, monkeypatch):
    """They leave weights, losses and the seconds of training as they are."""
    plain, judged = train(tmp_path / "plain"), train(tmp_path / "judged", evaluate_every=3)
    ours, theirs = (run.state["denoiser"].state_dict() for run in (plain, judged))
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    clock = iter(range(10**6))
    monkeypatch.setattr("diffgan_fast.engine.loop.time.perf_counter", lambda: next(clock))
    busy = lambda *args, **kwargs: [next(clock) for _ in range(1000)] and {}  # noqa: E731
    monkeypatch.setattr("diffgan_fast.selection.Selection.__call__", busy)
    assert train(tmp_path / "slow", evaluate_every=1).seconds < 100


def test_a_stopped_run_keeps_its_best(tmp_path):
    whole = train(tmp_path / "whole", evaluate_every=1)

    def stop(run, row):
        if row["step"] == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(tmp_path / "cut", evaluate_every=1, callbacks=[stop], checkpoint_every=3)
    cut = train(tmp_path / "cut", evaluate_every=1, checkpoint_every=3, resume=True)
    assert scored(whole) == scored(cut)
    facts = [json.loads((run.path / "checkpoints" / "best" / "state.json").read_text()) for run in (whole, cut)]
    assert facts[0] == facts[1] and facts[0]["metric"] == "kid"


def test_last_and_best_stand_in_the_report(tmp_path):
    run = train(tmp_path, evaluate_every=2)
    best = dgf.load(tmp_path, best=True, model=Net())
    last, found = run.evaluate(40), best.evaluate(40)
    assert json.loads((tmp_path / "evaluation.json").read_text()) == last
    assert json.loads((tmp_path / "evaluation-best.json").read_text()) == found == best.evaluated(40)
    page = report.write_run(tmp_path).read_text()
    assert "Best checkpoint" in page and f"Step {best.state.step:,}" in page and "Scores over the run" in page


def test_scores_against_another_reference_are_not_taken_for_the_usual_ones(tmp_path):
    run = train(tmp_path, steps=1)
    other = run.evaluate(30, max_reference=100)
    assert run.evaluated(30) != other and run.evaluated(30)["reference_n"] == 1437
    kept = run.evaluated(30)
    assert run.evaluated(30) == kept == json.loads((tmp_path / "evaluation.json").read_text())
    run.evaluate(30, max_reference=None)  # which is the same where there are no more
    assert run.evaluated(30)["kid"] == kept["kid"]


def test_what_cannot_be_is_named(tmp_path):
    out = tmp_path / "x"
    with pytest.raises(ValueError, match="best_by must be one of fid, .*, got 'kl'"):
        train(out, evaluate_every=1, best_by="kl")
    with pytest.raises(
        ValueError, match="best_by='modes' needs evaluate_n=500 or more for data 'gaussians25', got 499"
    ):
        dgf.train("gan", "gaussians25", out, steps=1, evaluate_every=1, evaluate_n=499, best_by="modes", progress=False)
    with pytest.raises(ValueError, match="no labels"):
        dgf.train("ddpm", torch.rand(20, 1, 8, 8), out, model=Net(), T=4, evaluate_every=1)
    with pytest.raises(ValueError, match="one of domain, inception, vgg16, effl0, not 'pixels'"):
        train(out, evaluate_every=1, evaluate_on="pixels")
    few = dgf.data.ImageData(torch.zeros(9, 1, 8, 8, dtype=torch.uint8), torch.arange(9) % 3)
    with pytest.raises(ValueError, match="k must be 1..4|density_k|more than k|classes"):  # before it trains
        dgf.train("ddpm", few.subset(4), out, model=Net(), T=4, evaluate_every=1, progress=False)
    with pytest.raises(ValueError, match="evaluate_n must be at least 10"):
        train(out, evaluate_n=3)
    assert not out.exists()
    train(out, 1)
    with pytest.raises(ValueError, match="no checkpoint of the best step: it was trained without evaluate_every"):
        dgf.load(out, best=True, model=Net())
    with pytest.raises(dgf.TrainingError, match="samples at step 1 are not finite"):

        class Broken(Net):
            def forward(self, x, t):
                out = super().forward(x, t)
                return out if self.training else out * torch.nan

        dgf.train(
            "ddpm", "digits", tmp_path / "y", model=Broken(), steps=1, T=4, evaluate_every=1, ema=0.0, progress=False
        )
