"""What a reader copies from the documentation runs, and does what the text around it says."""

import re
from pathlib import Path

DOCS = Path(__file__).parents[1] / "docs"


def test_the_chain_example_raises_its_reward(capsys):
    blocks = re.findall(r"^```python\n(.*?)^```$", (DOCS / "chain.md").read_text(), re.M | re.S)
    names: dict = {"__name__": "example"}
    for block in blocks:
        exec(compile(block, "chain.md", "exec"), names)
    first, last = names["rewards"][0], names["rewards"][-1]
    assert first < -2 and last > -0.5
    assert f"{first:.2f} before, {last:.2f} after" in capsys.readouterr().out


def test_the_noise_in_ones_own_gan(capsys):
    (block,) = re.findall(r"^```python\n(.*?)^```$", (DOCS / "diffusion_gan.md").read_text(), re.M | re.S)
    names: dict = {"__name__": "example"}
    exec(compile(block, "diffusion_gan.md", "exec"), names)
    errors, diffusion = names["errors"], names["diffusion"]
    assert errors[0] > 0.8 and sum(errors[-50:]) / 50 < 0.5 * errors[0]
    assert float(diffusion.p) > 0 and int(diffusion.T) > 5
    assert f"T = {int(diffusion.T)}" in capsys.readouterr().out
