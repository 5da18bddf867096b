"""What the studies have in common."""

import inspect

import pytest

from diffgan_fast import cli, reproduce
from diffgan_fast.data import registry
from diffgan_fast.reproduce.study import pictures


@pytest.fixture
def place(tmp_path, monkeypatch):
    """place(folder, *splits): puts files of MNIST there. No folder of this machine is searched, nothing is fetched."""

    def fetch(*args, **named):
        pytest.fail("a download")

    monkeypatch.setattr("pooch.retrieve", fetch)
    monkeypatch.delenv("DIFFGAN_FAST_DATA", raising=False)
    monkeypatch.setenv("DIFFGAN_FAST_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(registry, "_DEBIAN", tmp_path / "debian")

    def put(folder, *splits):
        (tmp_path / folder).mkdir(parents=True, exist_ok=True)
        for split in splits:
            for name in registry._SOURCES["mnist"].md5[split]:
                (tmp_path / folder / name).touch()
        return str(tmp_path / folder)

    return put


@pytest.mark.parametrize("folder, variable", [
    ("own/mnist", "own"), ("own", "own"), ("debian/mnist", ""), ("cache/data/mnist", ""),
])  # fmt: skip
def test_mnist_is_taken_where_both_splits_lie(place, monkeypatch, folder, variable):
    if variable:
        monkeypatch.setenv("DIFFGAN_FAST_DATA", place(variable))
    assert pictures(None) == "digits"
    place(folder, "train")
    assert pictures(None) == "digits"
    place(folder, "test")
    assert pictures(None) == "mnist" and pictures("cifar10") == "cifar10"


def test_files_of_fashion_mnist_are_none_of_mnist(place, monkeypatch):
    monkeypatch.setenv("DIFFGAN_FAST_DATA", place("fashion-mnist", "train", "test"))
    assert pictures(None) == "digits"


@pytest.mark.parametrize("study", ["ddgan", "diffusion-gan"])
def test_the_command_says_what_it_took(place, monkeypatch, capsys, study):
    for command in (reproduce.reproduce_ddgan, reproduce.reproduce_diffusion_gan):
        assert inspect.signature(command).parameters["data"].default is None

    def run(out, *, data, **given):
        raise ValueError(f"trains on {data}")

    monkeypatch.setattr(reproduce, f"reproduce_{study.replace('-', '_')}", run)
    for said, flags in (
        ("data: digits (no files of MNIST here)", []),
        ("data: mnist (its files are on this machine; --data digits is quicker)", []),
        ("", ["--data", "digits"]),
    ):
        if "mnist" in said:
            place("debian/mnist", "train", "test")
        with pytest.raises(SystemExit):
            cli.main(["reproduce", study, *flags])
        found = capsys.readouterr()
        assert found.out.strip() == said and f"trains on {'mnist' if 'mnist' in said else 'digits'}" in found.err


def test_five_seeds_of_the_gaussians():
    assert inspect.signature(reproduce.reproduce_gaussians).parameters["seeds"].default == 5


def test_a_width_is_that_of_generators_and_critics(monkeypatch):
    given = {}

    def run(out, **options):
        given.update(options)
        raise ValueError("stop")

    monkeypatch.setattr(reproduce, "reproduce_diffusion_gan", run)
    for flags, widths in (["--width", "8"], {8}), ([], {None}):
        given.clear()
        with pytest.raises(SystemExit):
            cli.main(["reproduce", "diffusion-gan", "--data", "digits", *flags])
        assert {given.get(name) for name in ("width", "critic_width")} == widths
