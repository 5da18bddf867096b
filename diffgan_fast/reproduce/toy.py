"""The toy example of "Diffusion-GAN" again: Figure 2 and Appendix D, each curve beside what noised samples say.

Real data are (0, z), generated ones (theta, z), z uniform: the JS divergence is ln 2 unless theta = 0, and gives no
gradient. With noise of level t only the first coordinate matters, N(0, b) against N(a theta, b), a = sqrt(abar_t) and
b = (1 - abar_t) sigma^2: the divergence is smooth in theta, and the optimal critic is known in closed form.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn.functional import softplus

from diffgan_fast import files, random, report
from diffgan_fast.ops import add_noise
from diffgan_fast.report.html import block, page, paragraph, picture
from diffgan_fast.schedule import Schedule

T = 1000
TIMES = (0, 50, 200, 400, 800)
THETA = 2.0  # of the generator whose densities and optimal critic are shown
RANGE, STEPS = 8.0, 81  # of theta in the plot of the divergence
NODES = 100  # of the quadrature

# A row for each t > 0 and theta: "t", "theta", "js" by quadrature, "sampled" from noised samples, "error", its standard
# error, and "critic", the mean distance over samples of a fitted critic's output from the optimal one's
Rows = list[dict[str, float]]


def js_divergence(delta: float) -> float:
    """JS(N(0, 1), N(delta, 1)) in nats, by Gauss-Hermite quadrature: 0 at delta = 0, towards ln 2 far away."""
    nodes, weights = np.polynomial.hermite_e.hermegauss(NODES)
    # E log(1 + exp(delta y - delta²/2)); both halves of the divergence are equal, by symmetry
    return math.log(2) - float(weights @ np.logaddexp(0, delta * nodes - delta**2 / 2)) / math.sqrt(2 * math.pi)


def optimal_logit(y: torch.Tensor, a: float, b: float, theta: float) -> torch.Tensor:
    """The logit of D*(y) = p(y) / (p(y) + p_g(y)) at first coordinates y (Goodfellow et al. 2014, Proposition 1)."""
    return (a**2 * theta**2 - 2 * a * theta * y) / (2 * b)


def reproduce_toy(
    out: str | Path = "runs/reproduce-toy",
    *,
    sigma: float = 1.0,
    times: Sequence[int] = TIMES,
    n: int = 100_000,
    seed: int = 0,
) -> Rows:
    """Noises the toy's data at several levels, measures divergence and optimal critic, and sets them beside theory.

    Figures and a table go to out/report.html.

    Args:
        out: directory.
        sigma: scale of the noise; the paper does not say which it used here.
        times: noise levels t of 1000 linear steps, 0..1000.
        n: samples of each kind, at least 2.
        seed: of all samples.

    Raises: ValueError for an argument out of its range.
    """
    if not sigma > 0 or n < 2 or not all(0 <= t <= T for t in times) or not times:
        raise ValueError(
            f"sigma must be above 0, n at least 2, times in 0..{T}; got {sigma}, {n}, {', '.join(map(str, times))}"
        )
    schedule = Schedule.linear(T)
    key = random.fold_in(random.key(seed), "toy")
    noised = {t: [_noised(theta, t, schedule, sigma, n, key) for theta in (0.0, THETA)] for t in times}
    rows = []
    for t in (t for t in times if t):
        a, b = _moments(schedule, t, sigma)
        for theta in (THETA / 2, THETA, 2 * THETA):
            real, fake = noised[t][0], _noised(theta, t, schedule, sigma, n, key)
            rows.append({"t": t, "theta": theta, **_measured(real[:, 0], fake[:, 0], a, b, theta)})
    files.write(Path(out) / "report.html", _page(rows, noised, schedule, sigma, n).encode())
    return rows


def _moments(schedule: Schedule, t: int, sigma: float) -> tuple[float, float]:
    """a_t and b_t."""
    abar = float(schedule.alphas_cumprod[t])
    return math.sqrt(abar), (1 - abar) * sigma**2


def _noised(theta: float, t: int, schedule: Schedule, sigma: float, n: int, key: int) -> torch.Tensor:
    """n noised samples of (theta, z), float64 [n, 2]."""
    name = f"theta {theta}"
    z = random.uniform(n, random.fold_in(key, name, "z"), dtype=torch.float64)
    x = torch.stack((torch.full_like(z, theta), z), 1)
    return add_noise(x, t, schedule, random.fold_in(key, name, "noise", t), sigma=sigma)


def _measured(real: torch.Tensor, fake: torch.Tensor, a: float, b: float, theta: float) -> dict[str, float]:
    """What samples of first coordinates say of divergence and critic."""
    # 2 JS = 2 ln 2 + E log D* + E_g log(1 - D*)
    each = math.log(2) - softplus(-optimal_logit(real, a, b, theta))
    other = math.log(2) - softplus(optimal_logit(fake, a, b, theta))
    error = 0.5 * math.sqrt(float(each.var() + other.var()) / len(real))
    y = torch.cat((real, fake))
    slope, offset = _fitted(real, fake)
    distance = (torch.sigmoid(slope * y + offset) - torch.sigmoid(optimal_logit(y, a, b, theta))).abs().mean()
    return {
        "js": js_divergence(a * theta / math.sqrt(b)),
        "sampled": 0.5 * float(each.mean() + other.mean()),
        "error": error,
        "critic": float(distance),
    }


def _fitted(real: torch.Tensor, fake: torch.Tensor, rounds: int = 30) -> tuple[float, float]:
    """The linear critic of least loss on samples, slope and offset, by Newton's method.

    A little decay of the weights keeps it finite where the samples do not overlap.
    """
    y = torch.cat((real, fake))
    inputs = torch.stack((y, torch.ones_like(y)), 1)
    label = torch.cat((torch.ones_like(real), torch.zeros_like(fake)))
    w = inputs.new_zeros(2)
    decay = 1e-6 * torch.eye(2, dtype=w.dtype)
    for _ in range(rounds):
        p = torch.sigmoid(inputs @ w)
        gradient = inputs.T @ (p - label) / len(y) + decay @ w
        curvature = (inputs * (p * (1 - p))[:, None]).T @ inputs / len(y) + decay
        w = w - torch.linalg.solve(curvature, gradient)
    return float(w[0]), float(w[1])


def _page(rows: Rows, noised: dict[int, list[torch.Tensor]], schedule: Schedule, sigma: float, n: int) -> str:
    columns: dict[str, Any] = {
        "t": "t", "theta": ("θ", "g"), "js": ("JS, quadrature", ".5f"), "sampled": ("JS, samples", ".5f"),
        "error": ("standard error", ".5f"), "critic": ("mean |D − D*|", ".4f"),
    }  # fmt: skip
    about = (
        f"Data (0, z) and (θ, z), z uniform in [0, 1], with noise of level t of {T} linear steps and σ = {sigma:g}. "
        f"Divergence in nats; ln 2 = {math.log(2):.5f} is that of data that do not overlap. {n:,} samples of each kind."
    )
    notes = (
        "JS, samples: the mean of log 2D* and log 2(1 − D*) over noised samples. It agrees with the quadrature within "
        "its standard error if noiser and closed form do.",
        "D: the linear critic fitted to the samples, beside the optimal one in closed form.",
        "The paper's text (§3.4) has the divergence without noise the wrong way round: it is 0 at θ = 0 and ln 2 "
        "elsewhere.",
    )
    times = list(noised)
    real = {f"t = {t}": noised[t][0] for t in times}
    rows_shown = {f"θ = {THETA:g}": {f"t = {t}": noised[t][1] for t in times}}
    shown = report.panels(rows_shown, real, within=torch.cat([points for pair in noised.values() for points in pair]))
    plots = [
        picture(report.functions(_divergences(schedule, times, sigma), "θ", _names(times), "JS divergence"), alt="JS"),
        picture(report.functions(_critics(schedule, times, sigma), "y₁", _names(times), "Optimal critic"), alt="D*"),
    ]
    table = report.html_table(rows, columns) + "".join(paragraph(note, "note") for note in notes)
    sections = [
        ("", paragraph(about)),
        ("Noised data (Figure 2, above)", picture(shown, f"Generated (blue, θ = {THETA:g}) over real (grey) data")),
        ("Divergence and optimal critic (Figure 2, below)", block("plots", plots)),
        ("Against noised samples", table),
    ]
    return page("Diffusion-GAN: the toy example", sections)


def _names(times: Sequence[int]) -> dict[str, str]:
    return {str(t): f"t = {t}" for t in times}


def _divergences(schedule: Schedule, times: Sequence[int], sigma: float) -> list[dict[str, float]]:
    """JS against theta, a row a theta."""
    rows = []
    for theta in np.linspace(-RANGE, RANGE, STEPS):
        row = {"θ": float(theta)}
        for t in times:
            a, b = _moments(schedule, t, sigma)
            row[str(t)] = js_divergence(a * float(theta) / math.sqrt(b)) if t else math.log(2) * (abs(theta) > 1e-9)
        rows.append(row)
    return rows


def _critics(schedule: Schedule, times: Sequence[int], sigma: float) -> list[dict[str, float]]:
    """D* of the generator at THETA against the first coordinate. Without noise it is defined at 0 and THETA alone."""
    rows = []
    for y in torch.linspace(-1.5 * THETA, 2.5 * THETA, 4 * 20 + 1, dtype=torch.float64):
        row = {"y₁": float(y)}
        for t in times:
            if t:
                row[str(t)] = float(torch.sigmoid(optimal_logit(y, *_moments(schedule, t, sigma), THETA)))
            elif min(abs(float(y)), abs(float(y) - THETA)) < 1e-9:
                row[str(t)] = float(abs(y) < 1e-9)
        rows.append(row)
    return rows
