from benchmarks import readme


def test_the_readmes_figures_are_the_saved_results():
    assert readme.main(["--check"]) == 0
