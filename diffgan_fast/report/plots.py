"""Line plots as SVG or PNG: scalars over the steps of a run, and quantities over the noise level t."""

import math
from collections.abc import Mapping, Sequence
from io import BytesIO
from typing import Literal

import matplotlib
import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator

Format = Literal["svg", "png"]

INK = "#7b8087"  # text and axes: legible on white and on a dark page
COLOURS = ("#3b82c4", "#e0803a", "#3fa37a", "#c25b8f", "#8d78d1", "#a58a2c", "#6b8e9e", "#c9584c")


def _series(rows, x: str, key: str) -> tuple[np.ndarray, np.ndarray]:
    """The finite values of `key` in order of x; where x repeats (a resumed run) the later row counts."""
    found = {row[x]: row[key] for row in rows if x in row and row.get(key) is not None}
    points = sorted((float(at), float(value)) for at, value in found.items() if math.isfinite(value))
    xs, ys = np.array(points).reshape(-1, 2).T
    return xs, ys


def _smoothed(values: np.ndarray, share: float) -> np.ndarray:
    """Gaussian average over the neighbours, renormalised at the ends; sigma = share · number of values."""
    sigma = share * len(values)
    if sigma < 0.5:
        return values
    reach = min(math.ceil(3 * sigma), (len(values) - 1) // 2)
    kernel = np.exp(-0.5 * (np.arange(-reach, reach + 1) / sigma) ** 2)
    return np.convolve(values, kernel, "same") / np.convolve(np.ones_like(values), kernel, "same")


def _figure(title: str, x_label: str, y_label: str):
    figure = Figure(figsize=(5.4, 2.9), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.set_title(title, loc="left", fontsize=11, color=INK)
    axes.set_xlabel(x_label, color=INK, fontsize=9)
    axes.set_ylabel(y_label, color=INK, fontsize=9)
    axes.tick_params(which="both", colors=INK, labelsize=8, length=3)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(INK)
    axes.grid(color=INK, alpha=0.18, linewidth=0.6)
    axes.set_axisbelow(True)
    axes.margins(x=0.01)
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True, steps=[1, 2, 2.5, 5, 10]))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    return figure, axes


def _scale(axes, drawn: list[np.ndarray]) -> None:
    """A log axis where every value is positive and they span more than a factor of 20."""
    values = np.concatenate(drawn)
    if values.min() > 0 and values.max() / values.min() > 20:
        axes.set_yscale("log")


def _bytes(figure: Figure, format: Format) -> bytes:
    """The file's bytes, the same for the same figure; SVG has a transparent ground, PNG a white one."""
    if format not in ("svg", "png"):
        raise ValueError(f"format must be svg or png, not {format!r}")
    buffer = BytesIO()
    with matplotlib.rc_context({"svg.hashsalt": "diffgan_fast"}):
        if format == "svg":
            figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
        else:
            figure.savefig(buffer, format="png", facecolor="white", dpi=160)
    return buffer.getvalue()


def _plot(rows, keys, x: str, title: str, y_label: str | None, smooth: float, format: Format, log=True) -> bytes:
    names = dict(keys) if isinstance(keys, Mapping) else {key: key for key in keys}
    lines = {name: (xs, ys) for key, name in names.items() for xs, ys in [_series(rows, x, key)] if len(xs)}
    if not lines:
        raise ValueError(f"no row holds a finite value of {', '.join(names)} at some {x!r}")
    only = next(iter(lines)) if len(lines) == 1 else "value"
    figure, axes = _figure(title, x, only if y_label is None else y_label)
    for (name, (xs, ys)), colour in zip(lines.items(), (COLOURS * len(lines)), strict=False):
        smoothed = _smoothed(ys, smooth)
        if smoothed is not ys:
            axes.plot(xs, ys, color=colour, alpha=0.25, linewidth=0.8)
        axes.plot(xs, smoothed, color=colour, linewidth=1.6, label=name, marker="o" if len(xs) < 12 else None, ms=3.5)
    if log:
        _scale(axes, [ys for _, ys in lines.values()])
    if len(lines) > 1:
        axes.legend(frameon=False, fontsize=8, labelcolor=INK)
    return _bytes(figure, format)


def tradeoff(
    points: Mapping[str, Sequence[tuple[float, float]]],
    x_label: str,
    y_label: str,
    title: str = "",
    format: Format = "svg",
) -> bytes:
    """Two costs of several methods: each a dot at the mean of its runs, named, with the runs as faint dots around it.

    Args:
        points: name -> (x, y) of each run; all x above 0.
        x_label, y_label, title: printed; x is on a log axis.
        format: "svg" (transparent) or "png" (white).

    Returns:
        the file's bytes. The y axis is logarithmic if all values are positive and span a factor above 20.

    Raises:
        ValueError: there is nothing to draw, an x is not above 0, or an unknown format.
    """
    runs = {name: np.array(values, dtype=float).reshape(-1, 2) for name, values in points.items()}
    if not runs or any(not len(xy) or not (xy[:, 0] > 0).all() for xy in runs.values()):
        raise ValueError("points must hold at least one (x, y) for each name, with x above 0")
    figure, axes = _figure(title, x_label, y_label)
    axes.set_xscale("log")
    axes.xaxis.set_major_locator(LogLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.margins(x=0.2, y=0.1)
    for (name, xy), colour in zip(runs.items(), COLOURS * len(runs), strict=False):
        axes.plot(xy[:, 0], xy[:, 1], "o", color=colour, alpha=0.3, ms=3, markeredgewidth=0)
        middle = tuple(xy.mean(0))
        axes.plot(*middle, "o", color=colour, ms=6)
        axes.annotate(name, middle, (5, 4), textcoords="offset points", fontsize=7.5, color=INK)
    _scale(axes, [xy[:, 1] for xy in runs.values()])
    return _bytes(figure, format)


def curves(
    history, keys, title: str = "", *, y_label: str | None = None, smooth: float = 0.02, format: Format = "svg"
) -> bytes:
    """Scalars of a run over its steps: each a faint raw line under a smoothed one.

    Args:
        history: dicts, one a logged step, with "step" and scalars; rows without a key, or where it is None or
            not finite, are passed over.
        keys: the scalars to draw: names, or a dict name -> label.
        title: printed above; may be empty.
        y_label: None is the label of the only line, or "value".
        smooth: width (sigma) of the Gaussian average, as a share of the rows, 0..1; 0 draws the raw lines only.
        format: "svg" (transparent) or "png" (white).

    Returns:
        the file's bytes. The y axis is logarithmic if all values are positive and span a factor above 20.

    Raises:
        ValueError: there is nothing to draw, or an unknown format.
    """
    return _plot(history, keys, "step", title, y_label, smooth, format)


def levels(rows, keys, title: str = "", *, y_label: str | None = None, format: Format = "svg") -> bytes:
    """Quantities over the noise level, for example the error of the predicted noise by t: several named lines.

    Args:
        rows: dicts with "t" and scalars.
        keys, title, y_label, format: as for :func:`curves`.

    Returns:
        the file's bytes.

    Raises:
        ValueError: there is nothing to draw, or an unknown format.
    """
    return _plot(rows, keys, "t", title, y_label, 0.0, format)


def functions(rows, x: str, keys, title: str = "", *, y_label: str | None = None, format: Format = "svg") -> bytes:
    """Named functions of one variable on linear axes.

    Args:
        rows: dicts with the variable and scalars.
        x: the variable's key, which is the axis' label too.
        keys, title, y_label, format: as for :func:`curves`.

    Returns:
        the file's bytes.

    Raises:
        ValueError: there is nothing to draw, or an unknown format.
    """
    return _plot(rows, keys, x, title, y_label, 0.0, format, log=False)
