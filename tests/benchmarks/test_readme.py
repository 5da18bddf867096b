import re
from pathlib import Path

from benchmarks import __main__, readme


def test_the_readmes_figures_are_the_saved_results():
    assert readme.main(["--check"]) == 0


def test_the_readme_names_every_benchmark():
    text = (Path(__file__).parents[2] / "README.md").read_text()
    named = re.search(r"`python -m benchmarks ([a-z_|]+)`", text)[1].split("|")
    assert sorted(named) == sorted(__main__.NAMES)
