"""Points in the plane: the four data sets of the source document's 2-D study, as its code makes them, a true ring, and
25 Gaussians.

Source: "GAN-Enhanced Diffusion: Boosting Sample Quality and Diversity"; the formulas are those of tiny-diffusion
(https://github.com/tanelp/tiny-diffusion), which its code took over. Each maker draws float64 ``[n, 2]`` from a seed,
in the source's order of draws; the dino's 142 centres are in ``dino.csv`` (see ``DINO_SOURCE.md``).
"""

from pathlib import Path

import numpy as np
import torch

from .base import FloatData, Modes

GRID_STD = 0.05
DRAWS = {"train": (100_000, 42), "test": (10_000, 43)}  # split -> points, seed; the source has no test split
GRID = np.array([(x, y) for x in (-4.0, -2.0, 0.0, 2.0, 4.0) for y in (-4.0, -2.0, 0.0, 2.0, 4.0)])
DINO = Path(__file__).with_name("dino.csv")


def _circle(n: int, seed: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    x, y = (np.round(rng.uniform(-0.5, 0.5, n) / 2, 1) * 2 for _ in range(2))  # five values each
    norm = np.sqrt(x**2 + y**2) + 1e-10  # 0 / 1e-10: the middle of the 5 x 5 grid stays at the origin
    angle, radius = 2 * np.pi * rng.uniform(0, 1, n), rng.uniform(0, 0.03, n)
    return 3 * np.stack((x / norm + radius * np.cos(angle), y / norm + radius * np.sin(angle)), 1)


def _dino(n: int, seed: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    centres = np.loadtxt(DINO, delimiter=",", skiprows=1)
    x, y = centres[rng.integers(0, len(centres), n)].T
    x, y = x + 0.15 * rng.normal(size=n), y + 0.15 * rng.normal(size=n)
    return 4 * np.stack((x / 54 - 1, y / 48 - 1), 1)


def _gaussians25(n: int, seed: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return GRID[rng.integers(0, len(GRID), n)] + rng.normal(0, GRID_STD, (n, 2))


def _line(n: int, seed: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return 4 * np.stack((rng.uniform(-0.5, 0.5, n), rng.uniform(-1, 1, n)), 1)


def _moons(n: int, seed: int) -> np.ndarray:
    """What scikit-learn's ``make_moons(n, noise=0.03, random_state=seed)`` gives, scaled."""
    rng = np.random.RandomState(seed)
    outer, inner = np.linspace(0, np.pi, n // 2), np.linspace(0, np.pi, n - n // 2)
    x = np.concatenate((np.cos(outer), 1 - np.cos(inner)))
    y = np.concatenate((np.sin(outer), 1 - np.sin(inner) - 0.5))
    order = np.arange(n)
    rng.shuffle(order)
    points = np.stack((x, y), 1)[order] + rng.normal(scale=0.03, size=(n, 2))
    return (points + 0.3) * (2, 3) - 1


def _ring(n: int, seed: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    angle, radius = rng.uniform(0, 2 * np.pi, n), rng.normal(3, 0.05, n)
    return np.stack((radius * np.cos(angle), radius * np.sin(angle)), 1)


_MAKERS = {"circle": _circle, "dino": _dino, "gaussians25": _gaussians25, "line": _line, "moons": _moons, "ring": _ring}
POINTS = {  # name -> one line of help
    "circle": "2-D points: 16 blobs at radius 3 and one at the origin, not a circle (see ring)",
    "dino": "2-D points: 142 tiny blobs that draw the Datasaurus",
    "gaussians25": "2-D points: 25 Gaussians of standard deviation 0.05 on a 5 x 5 grid of spacing 2 (Diffusion-GAN)",
    "line": "2-D points: uniform in a rectangle of 4 x 8, not a line",
    "moons": "2-D points: two interleaved half circles with a little noise",
    "ring": "2-D points: a true ring, angle uniform, radius 3 with standard deviation 0.05",
}


def make_points(name: str, split: str) -> FloatData:
    """One of the data sets in :data:`POINTS`: float32 ``[N, 2]``, the source's 100,000 points or 10,000 held out.

    Args:
        name: a key of :data:`POINTS`.
        split: "train" (seed 42, as in the source) or "test" (fresh points of the same law, seed 43).
    """
    modes = Modes(torch.from_numpy(GRID), GRID_STD) if name == "gaussians25" else None
    return FloatData(draw_points(name, *DRAWS[split]), name=name, modes=modes)


def draw_points(name: str, n: int, seed: int) -> torch.Tensor:
    """float32 ``[n, 2]`` of the law of one of the data sets in :data:`POINTS`; each seed has its own points."""
    return torch.from_numpy(_MAKERS[name](n, seed).astype(np.float32))
