"""The demo: from nothing to a comparison of three methods on real digits, in minutes on a laptop."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from diffgan_fast.api import compare

# What a small U-Net learns most from in two minutes on two cores: the cosine schedule and v, a narrow network and many
# steps. Twenty steps of the stochastic DDIM sampler do as well as two hundred of DDPM.
BASE: dict[str, Any] = dict(
    steps=1700, batch_size=64, lr=4e-3, lr_schedule="cosine", warmup=50, ema=0.995, width=16,
    T=200, schedule="cosine", prediction="v", sampler="ddim", sample_steps=20, eta=1.0,
)  # fmt: skip
TUNED: dict[str, Any] = dict(steps=300, critic_steps=100, batch_size=64, ema=0.99)


def run_demo(out: str | Path, *, seed: int = 0, device: str = "auto", **common: Any) -> list[dict[str, Any]]:
    """Trains a DDPM on the embedded digits and fine-tunes it with methods 3 and 3.5. Returns the rows of `compare`."""
    options = {"ddpm": BASE, "method3": TUNED, "method3.5": TUNED}
    return compare(list(options), "digits", out, seed=seed, device=device, options=options, **common)
