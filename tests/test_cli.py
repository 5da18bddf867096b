import io
import json
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

import diffgan_fast as dgf
from diffgan_fast import cli

FAST = ["--steps", "2", "--batch-size", "4", "--T", "4", "--log-every", "1", "--sample-every", "0"]


def run(capsys, *arguments, code=0):
    with pytest.raises(SystemExit) as stop:
        cli.main(list(arguments))
    assert (stop.value.code or 0) == code
    return capsys.readouterr()


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    out = tmp_path_factory.mktemp("cli") / "run"
    with pytest.raises(SystemExit):
        cli.main(["train", "ddpm", "--out", str(out), *FAST])
    return out


def test_every_option_of_a_method_is_a_flag(capsys):
    import dataclasses

    for name in dgf.methods():
        text = run(capsys, "train", name, "--help").out
        for field in dataclasses.fields(dgf.methods.find(name).Config):
            assert f"--{field.name.replace('_', '-')}" in text, field.name
        assert f"[default: {dgf.methods.find(name).Config().ema}]" in " ".join(text.split())


def test_help_names_every_method(capsys):
    text = run(capsys, "train", "--help").out
    assert all(name in text for name in dgf.methods())


def test_a_run_from_training_to_report(trained, capsys, tmp_path):
    assert (trained / "report.html").exists() and dgf.load(trained).state.step == 2
    run(capsys, "sample", str(trained), "--n", "5", "--seed", "3")
    assert (trained / "samples" / "seed-3.png").exists()
    run(capsys, "sample", str(trained), "--n", "5", "--steps", "2", "--out", str(tmp_path / "s.npz"))
    samples = np.load(tmp_path / "s.npz")["samples"]
    assert samples.shape == (5, 8, 8, 1) and samples.dtype == np.uint8
    text = run(capsys, "evaluate", str(trained), "--n", "40").out
    assert "FID (domain)" in text and "real data" in text and "never with published ones" in text
    assert "report.html" in run(capsys, "report", str(trained)).out


def test_out_of_memory_in_sampling_is_one_line_of_advice(trained, capsys, monkeypatch):
    kind = dgf.methods.find("ddpm")
    draw = kind.sample

    def limited(self, state, n, key, **options):
        if n > 3:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return draw(self, state, n, key, **options)

    monkeypatch.setattr(kind, "sample", limited)
    for command in ("sample", "evaluate"):
        found = run(capsys, command, str(trained), "--n", "40", code=2)
        advice = "diffgan-fast: out of memory with 500 samples at a time: give a smaller batch"
        assert found.err.splitlines()[-1] == advice
        run(capsys, command, str(trained), "--n", "40", "--batch", "3")
    assert "batch must be at least 1, got 0" in run(capsys, "sample", str(trained), "--batch", "0", code=2).err


def test_samples_made_by_anything_else_are_measured(capsys, tmp_path):
    data = dgf.data.load("digits", split="test", subset=60)
    np.savez(tmp_path / "s.npz", samples=data.images.permute(0, 2, 3, 1).numpy(), labels=data.labels.numpy())
    np.savez(tmp_path / "one.npz", data.images.numpy())
    np.savez(tmp_path / "two.npz", a=np.zeros(2), b=np.zeros(2))
    (tmp_path / "images").mkdir()
    for i, image in enumerate(data.images):
        Image.fromarray(image[0].numpy()).save(tmp_path / "images" / f"{i:02}.png")
    found = []
    for name in ("s.npz", "one.npz", "images"):
        text = run(capsys, "evaluate", str(tmp_path / name), "--against", "digits", "--json").out
        found.append(json.loads(text))
        assert found[-1] == found[0] and found[-1]["n"] == 60
    expected = dgf.metrics.evaluate(
        data.batch(slice(None)), dgf.data.load("digits"), held_out=dgf.data.load("digits", split="test")
    )
    assert found[0] == expected
    text = run(capsys, "evaluate", str(tmp_path / "s.npz"), "--against", "digits", "--n", "40", "--metrics", "fid,kid")
    assert "FID (domain)" in text.out and "IS" not in text.out and "FID is biased" in text.out and not text.err
    assert "against must name" in run(capsys, "evaluate", str(tmp_path / "s.npz"), code=2).err
    assert "it holds a, b" in run(capsys, "evaluate", str(tmp_path / "two.npz"), "--against", "digits", code=2).err
    wrong = run(capsys, "evaluate", str(tmp_path / "s.npz"), "--against", "digits", "--extractor", "x", code=2)
    assert "one of domain, inception, vgg16, effl0, not 'x'" in wrong.err


def test_folders_of_mixed_sizes_are_resized(capsys, tmp_path, monkeypatch):
    monkeypatch.setattr("diffgan_fast.metrics.features.IMAGES_SEEN", 200)  # of the classifier
    data = dgf.data.load("digits", split="test", subset=60)
    for i, image in enumerate(data.images):
        where = tmp_path / "mixed" / str(int(data.labels[i]))
        where.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image[0].numpy()).resize((8 + i,) * 2).save(where / f"{i}.png")
    np.savez(tmp_path / "s.npz", data.images.numpy())
    measure = ["evaluate", str(tmp_path / "mixed"), "--metrics", "kid", "--json", "--against"]
    assert "pass size= (--size)" in run(capsys, *measure, "digits", code=2).err
    for against in ("digits", str(tmp_path / "mixed")):
        assert json.loads(run(capsys, *measure, against, "--size", "8").out)["n"] == 60
    npz = ["evaluate", str(tmp_path / "s.npz"), "--size", "8", "--against", "digits"]
    assert "size must not be given" in run(capsys, *npz, code=2).err
    trained = ["train", "ddpm", "--data", str(tmp_path / "mixed"), "--out", str(tmp_path / "run"), "--size", "8", *FAST]
    run(capsys, *trained)
    assert dgf.load(tmp_path / "run").reference().shape == (1, 8, 8)


def test_a_run_is_measured_against_other_data(trained, capsys, tmp_path):
    stored = {path: path.read_bytes() for path in trained.iterdir() if path.is_file()}
    text = run(capsys, "evaluate", str(trained), "--against", "digits", "--n", "30", "--metrics", "kid", "--json").out
    assert json.loads(text)["n"] == 30 and set(json.loads(text)["labels"]) == {"kid"}
    assert stored == {path: path.read_bytes() for path in trained.iterdir() if path.is_file()}


def test_progress_of_sampling_is_shown_on_a_terminal(trained, monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    monkeypatch.setattr("sys.stderr", Terminal())
    for against in ([], ["--against", "digits"]):
        with pytest.raises(SystemExit):
            cli.main(["evaluate", str(trained), "--n", "30", "--metrics", "kid", *against])
        assert "samples: 100%" in sys.stderr.getvalue() and "domain features: 100%" in sys.stderr.getvalue()


def test_points_are_stored_as_they_are_or_drawn(capsys, tmp_path, monkeypatch):
    points = torch.randn(5, 2)
    stand_in = SimpleNamespace(
        sample=lambda n, seed, labels, together: points, named=True, reference=lambda: dgf.data.load("moons")
    )
    monkeypatch.setattr(dgf, "load", lambda path, device, best: stand_in)
    run(capsys, "sample", str(tmp_path), "--out", str(tmp_path / "s.npz"))
    samples = np.load(tmp_path / "s.npz")["samples"]
    assert samples.dtype == np.float32 and (samples == points.numpy()).all()
    run(capsys, "sample", str(tmp_path), "--seed", "3")
    assert (tmp_path / "samples" / "seed-3.png").read_bytes().startswith(b"\x89PNG")


def test_resume_makes_a_run_longer(trained, capsys):
    longer = ["--steps", "3", *FAST[2:]]
    assert "pass resume=True" in run(capsys, "train", "ddpm", "--out", str(trained), *longer, code=2).err
    run(capsys, "train", "ddpm", "--out", str(trained), "--resume", *longer)
    assert dgf.load(trained).state.step == 3


def test_errors_of_use_are_one_line(capsys, tmp_path):
    for arguments, message in (
        (["train", "ddpm", "--out", str(tmp_path / "x"), "--lr", "-1"], "lr must be at least 0"),
        (["train", "ddpm", "--out", str(tmp_path / "x"), "--preset", "no"], "preset must be one of"),
        (["sample", str(tmp_path)], "holds no run"),
        (["sample", str(tmp_path), "--out", "x.gif"], "out must end in .png or .npz"),
    ):
        err = run(capsys, *arguments, code=2).err
        assert message in err and "Traceback" not in err


def test_info_lists_every_back_end(capsys):
    text = run(capsys, "info").out
    assert all(name in text for name in ("reference", "cpu", "cuda", "triton", "host"))
    facts = json.loads(run(capsys, "info", "--json").out)
    assert facts["backends"]["reference"]["available"] is True
    for row in facts["backends"].values():
        assert row["available"] or row["reason"]


def test_evaluate_takes_what_others_store(capsys, tmp_path):
    grey = dgf.data.to_uint8(dgf.data.load("digits", subset=30).batch(slice(None)))
    np.savez(tmp_path / "grey.npz", samples=grey.permute(0, 2, 3, 1).numpy())
    np.savez(
        tmp_path / "labelled.npz", arr_0=grey.expand(-1, 3, -1, -1).permute(0, 2, 3, 1).numpy(), arr_1=np.arange(30)
    )
    (tmp_path / "damaged.npz").write_bytes(b"PK no archive")
    options = ("--against", "digits", "--metrics", "fid, kid", "--json")
    found = [
        json.loads(run(capsys, "evaluate", str(tmp_path / f"{name}.npz"), *options).out)
        for name in ("grey", "labelled")
    ]
    assert found[0] == found[1] and set(found[0]["labels"]) == {"fid", "kid"}
    assert (
        "damaged.npz is no .npz of samples"
        in run(capsys, "evaluate", str(tmp_path / "damaged.npz"), *options, code=2).err
    )
    assert (
        "n must be at least 2, got 0"
        in run(capsys, "evaluate", str(tmp_path / "grey.npz"), *options, "--n", "0", code=2).err
    )
    assert "absent does not exist: name a run" in run(capsys, "evaluate", "absent", *options, code=2).err
    np.savez(tmp_path / "unit.npz", samples=(grey / 255).float().numpy())
    unit = run(capsys, "evaluate", str(tmp_path / "unit.npz"), "--against", "digits", "--metrics", "kid")
    assert "images in [0, 1] must be scaled to [-1, 1] first" in unit.out and not unit.err
    table = run(capsys, "evaluate", str(tmp_path / "grey.npz"), "--against", "digits", "--metrics", "kid").out
    assert "±" in table and "real data" in table


def test_precision_and_compile_are_flags(capsys, tmp_path):
    how = ["--precision", "bf16", "--compile", "false"]
    run(capsys, "train", "ddpm", "--out", str(tmp_path / "r"), "--width", "8", *how, *FAST)
    config = json.loads((tmp_path / "r" / "config.json").read_text())["config"]
    assert config["precision"] == "bf16" and config["compile"] is False
    wrong = run(capsys, "train", "ddpm", "--out", str(tmp_path / "s"), "--compile", "maybe", *FAST, code=2).err
    assert "compile must be 'auto' or bool, got 'maybe'" in wrong
