"""Pictures of points in the plane: samples over real points, densities, and both for many runs side by side."""

import os
from collections.abc import Mapping
from io import BytesIO
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.cm import ScalarMappable
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from torch import Tensor

from .. import files
from .plots import COLOURS, INK

Kind = Literal["scatter", "density"]

SINGLE, PANEL, DPI = 3.2, 1.7, 150  # inches of a picture and of a panel, dots an inch
SHOWN = 2000  # points drawn at most in a scatter plot
CELLS = 64  # of a density map, a side
SCALE = LogNorm(1e-3, 1.0, clip=True)  # of densities, relative to the densest cell of the real points
MARGIN = 0.12  # around the real points, as a share of their larger extent


def _array(points: Tensor, name: str) -> np.ndarray:
    if points.ndim != 2 or points.shape[1] != 2 or not len(points):
        raise ValueError(f"{name} must be points [N, 2] with N >= 1, not {list(points.shape)}")
    if not torch.isfinite(points).all():
        raise ValueError(f"{name} must be finite; they hold NaN or infinity")
    return points.detach().cpu().double().numpy()


class _View:
    """The square around the real points of a data set, or around others, in which all its panels are drawn alike."""

    def __init__(self, real: np.ndarray, within: np.ndarray | None = None):
        self.real = real
        around = real if within is None else within
        low, high = around.min(0), around.max(0)
        half = (high - low).max() * (0.5 + MARGIN) or 1.0
        self.x, self.y = ((float(middle - half), float(middle + half)) for middle in (low + high) / 2)
        self.densest = self._shares(real).max()

    def _shares(self, points: np.ndarray) -> np.ndarray:
        return np.histogram2d(points[:, 0], points[:, 1], CELLS, (self.x, self.y))[0].T / len(points)

    def _outside(self, points: np.ndarray) -> float:
        low, high = zip(self.x, self.y, strict=True)
        return float(((points < low) | (points > high)).any(1).mean())

    def draw(self, axes: Axes, samples: np.ndarray | None, kind: Kind) -> None:
        """One panel: the samples, or with None the real points themselves."""
        points = self.real if samples is None else samples
        if kind == "scatter":
            axes.scatter(self.real[:SHOWN, 0], self.real[:SHOWN, 1], 3, INK, alpha=0.4, linewidths=0)
            if samples is not None:
                axes.scatter(samples[:SHOWN, 0], samples[:SHOWN, 1], 3, COLOURS[0], alpha=0.7, linewidths=0)
        else:
            shares = self._shares(points) / self.densest
            axes.imshow(shares, norm=SCALE, origin="lower", extent=(*self.x, *self.y), interpolation="nearest")
        if (outside := self._outside(points)) >= 5e-4:  # what is printed as 0.1 % or more
            axes.set_title(f"{outside:.1%} outside", loc="right", fontsize=6, pad=2, color=INK)
        axes.set(xlim=self.x, ylim=self.y, aspect="equal", xticks=[], yticks=[])
        axes.spines[:].set(color=INK, linewidth=0.6)


def _figure(width: float, height: float) -> Figure:
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _png(figure: Figure) -> bytes:
    buffer = BytesIO()
    figure.savefig(buffer, format="png", transparent=True, dpi=DPI)
    return buffer.getvalue()


def scatter(samples: Tensor, path: str | os.PathLike, real: Tensor | None = None) -> Path:
    """Write a scatter plot of samples over real points to a PNG file, which appears whole or not at all.

    The axes are equal. Their limits follow from the real points alone, so that the pictures of a run can be compared;
    the share of samples beyond them is printed.

    Args:
        samples: float ``[N, 2]``; the first 2,000 are drawn.
        path: the file; missing folders are made.
        real: float ``[M, 2]``, drawn beneath in grey, the first 2,000 of them. None shows the samples alone, in limits
            of their own.

    Returns:
        the path.

    Raises:
        ValueError: points of another shape, or not finite.
    """
    points = _array(samples, "samples")
    figure = _figure(SINGLE, SINGLE)
    _View(points if real is None else _array(real, "real")).draw(figure.add_subplot(), points, "scatter")
    return files.write(path, _png(figure))


def panels(
    rows: Mapping[str, Mapping[str, Tensor]],
    real: Mapping[str, Tensor],
    kind: Kind = "scatter",
    *,
    within: Tensor | None = None,
) -> bytes:
    """A grid of panels: a row for each model, a column for each data set, and the real points as the first row.

    All panels of a column have the same limits and the same colours, which follow from its real points; with `within`
    all panels have the same limits.

    Args:
        rows: name of a model -> name of a data set -> its samples ``[N, 2]``; what is missing leaves its place empty.
        real: name of a data set -> real points ``[M, 2]``: the columns, in this order.
        kind: "scatter", samples over grey real points, the first 2,000 of each; or "density", the share of all points
            in each of 64 x 64 cells, relative to the real points' densest cell, on a log scale of three decades.
        within: points ``[M, 2]`` that all panels show room for.

    Returns:
        the bytes of a PNG file with a transparent ground.

    Raises:
        ValueError: points of another shape, or not finite; an unknown kind; no data set.
    """
    if kind not in ("scatter", "density"):
        raise ValueError(f"kind must be scatter or density, not {kind!r}")
    if not real:
        raise ValueError("real must hold at least one data set")
    room = None if within is None else _array(within, "within")
    views = {name: _View(_array(points, f"real[{name!r}]"), room) for name, points in real.items()}
    figure = _figure(PANEL * len(views) + 0.3, PANEL * (len(rows) + 1) + 0.2)
    grid = figure.subplots(len(rows) + 1, len(views), squeeze=False)
    for line, (model, by_data) in zip(grid, [("real data", None), *rows.items()], strict=True):
        line[0].set_ylabel(model, fontsize=9, color=INK)
        for axes, (name, view) in zip(line, views.items(), strict=True):
            if by_data is None:
                axes.set_title(name, fontsize=10, color=INK)
                view.draw(axes, None, kind)
            elif name in by_data:
                view.draw(axes, _array(by_data[name], f"rows[{model!r}][{name!r}]"), kind)
            else:
                axes.set(xticks=[], yticks=[])
                axes.spines[:].set_visible(False)
    if kind == "density":
        bar = figure.colorbar(ScalarMappable(SCALE), ax=grid, location="bottom", shrink=0.6, aspect=40, pad=0.01)
        bar.set_label("density, relative to the densest cell of the real data", color=INK, fontsize=8)
        bar.ax.tick_params(which="both", colors=INK, labelsize=7, length=2)
    return _png(figure)
