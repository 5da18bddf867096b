"""What one large denoising step looks like: p(x_{t-1} | x_t) of points, as it is, as a DDGAN draws it, as a Gaussian.

The point of Denoising Diffusion GAN (Xiao et al. 2022, Figure 2) in the plane: when steps are large, x_{t-1} given x_t
has many modes. The Gaussian has the true mean and covariance: of all Gaussians it is the nearest in KL divergence, and
no diffusion model with Gaussian steps does better.
"""

from __future__ import annotations

from typing import Any

import torch

from diffgan_fast import random
from diffgan_fast.data.points import draw_points
from diffgan_fast.metrics import knn_kl
from diffgan_fast.ops import add_noise, posterior_step
from diffgan_fast.run import Run
from diffgan_fast.schedule import Schedule

POOL = 2_000_000  # points that stand for the law of x_0


def true_step(points: torch.Tensor, x_t: torch.Tensor, t: int, schedule: Schedule, n: int, key: int) -> torch.Tensor:
    """n draws [n, D] of q(x_{t-1} | x_t) for one x_t [D], where x_0 is uniform over `points` [M, D].

    By Bayes, x_0 given x_t is the point i with probability proportional to N(x_t; sqrt(abar_t) x_i, (1 - abar_t) I);
    then x_{t-1} ~ q(x_{t-1} | x_t, x_0). Exact, up to the number of points.
    """
    abar = schedule.alphas_cumprod[t]
    away = (x_t.double() - abar.sqrt() * points.double()).square().sum(1)
    shares = torch.softmax(-away / (2 * (1 - abar)), 0).cumsum(0)
    u = random.uniform(n, random.fold_in(key, "x0"), dtype=torch.float64) * shares[-1]
    x0 = points[torch.searchsorted(shares, u, right=True).clamp_max(len(points) - 1)]
    return posterior_step(x0, x_t.expand(n, -1).contiguous(), t, schedule, random.fold_in(key, "posterior"))


def gaussian_step(truth: torch.Tensor, key: int) -> torch.Tensor:
    """As many draws of the Gaussian that has the mean and covariance of `truth` [n, D]."""
    wide = truth.double()
    z = random.normal(wide.shape, key, dtype=torch.float64)
    values, vectors = torch.linalg.eigh(wide.T.cov())
    return (wide.mean(0) + z * values.clamp_min(0).sqrt() @ vectors.T).to(truth.dtype)


def compared(run: Run, n: int, seed: int = 0) -> dict[str, dict[str, Any]]:
    """One step from each noise level t = T..1, at an x_t of a held-out point of the run's data, a named set of points.

    Returns: "t = …" -> "true", "ddgan", "gaussian": draws [n, 2]; "kl": the divergence, in bits, of the true draws from
    the other two and, as "floor", from other true ones.
    """
    # far more points than draws: few go back to the same one, which at t = 1 is the draw itself and spoils a divergence
    laws = [draw_points(run.data_name, POOL, random.fold_in(random.key(seed), "law", i) >> 32) for i in range(2)]
    held_out = run.reference("test").values
    method: Any = run.method
    device = next(run.state["generator"].parameters()).device
    schedule: Schedule = method.schedule
    found: dict[str, dict[str, Any]] = {}
    for t in range(schedule.T, 0, -1):
        key = random.fold_in(random.key(seed), "denoising", t)
        x_t = add_noise(held_out[t : t + 1], t, schedule, key)[0]
        true, other = (true_step(law, x_t, t, schedule, n, random.fold_in(key, i)) for i, law in enumerate(laws))
        drawn = {
            "ddgan": method.denoise(
                run.state, x_t.to(device).expand(n, -1).contiguous(), t, random.fold_in(key, "ddgan")
            ).cpu(),
            "gaussian": gaussian_step(true, random.fold_in(key, "gaussian")),
        }
        kl = {name: knn_kl(true, x) for name, x in (drawn | {"floor": other}).items()}
        found[f"t = {t}"] = {"true": true, **drawn, "kl": kl}
    return found
