"""The demo: from nothing to a comparison of three methods on real digits, in minutes on a laptop."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from diffgan_fast.api import compare

BASE = dict(
    steps=1500, batch_size=128, lr=2e-3, lr_schedule="cosine", T=200, ema=0.995, sampler="ddim", sample_steps=40
)
TUNED = dict(steps=300, critic_steps=100, batch_size=128, ema=0.99)


def run_demo(out: str | Path, *, seed: int = 0, device: str = "auto", **base: Any) -> list[dict[str, Any]]:
    """Trains a DDPM on the embedded digits and fine-tunes it with methods 3 and 3.5. Returns the rows of `compare`."""
    options = {"ddpm": {**BASE, **base}, "method3": TUNED, "method3.5": TUNED}
    return compare(list(options), "digits", out, seed=seed, device=device, options=options)
