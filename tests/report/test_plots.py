import re
from io import BytesIO
from xml.etree import ElementTree

import matplotlib
import numpy as np
import pytest
from PIL import Image

from diffgan_fast.report import curves, functions, levels, tradeoff
from diffgan_fast.report.plots import _series, _smoothed

HISTORY = [{"step": s, "loss": 2.0 ** (-s / 50), "logit": s / 100 - 1, "same": 3} for s in range(0, 400, 4)]


def lines(svg):
    """How many lines with colours of data an SVG holds: raw and smoothed ones."""
    groups = ElementTree.fromstring(svg).iter("{http://www.w3.org/2000/svg}g")
    axes = next(g for g in groups if g.get("id") == "axes_1")
    return sum(g.get("id", "").startswith("line2d") for g in axes)


def test_svg_and_png_are_valid_and_the_same_each_time():
    svg = curves(HISTORY, ["loss", "logit"], "Losses & <logits>")
    assert ElementTree.fromstring(svg).tag.endswith("svg") and svg == curves(
        HISTORY, ["loss", "logit"], "Losses & <logits>"
    )
    picture = Image.open(BytesIO(curves(HISTORY, {"loss": "the loss"}, format="png"))).convert("RGB")
    assert picture.size == (864, 464) and picture.getpixel((0, 0)) == (255, 255, 255)
    assert len(picture.getcolors(100_000)) > 10


def test_smoothing_draws_a_second_line():
    assert lines(curves(HISTORY, ["loss", "logit"])) - lines(curves(HISTORY, ["loss", "logit"], smooth=0)) == 2


def test_global_settings_stay_as_they_are():
    before = dict(matplotlib.rcParams)
    curves(HISTORY, ["loss"])
    assert dict(matplotlib.rcParams) == before


def test_the_axis_is_logarithmic_only_for_wide_positive_ranges(monkeypatch):
    scales = []
    original = matplotlib.axes.Axes.set_yscale
    monkeypatch.setattr(matplotlib.axes.Axes, "set_yscale", lambda a, v, **k: (scales.append(v), original(a, v, **k)))
    curves(HISTORY, ["loss"])
    assert scales == ["log"]
    curves(HISTORY, ["logit", "loss"])
    curves(HISTORY, ["same"])
    assert scales == ["log"]


def test_missing_and_non_finite_values_are_passed_over_and_later_rows_win():
    rows = [{"step": 4, "a": 1}, {"step": 2, "a": 5}, {"step": 3}, {"step": 6, "a": None}, {"a": 9}]
    rows += [{"step": 5, "a": float("nan")}, {"step": 7, "a": float("inf")}, {"step": 4, "a": 7.0}]
    xs, ys = _series(rows, "step", "a")
    assert xs.tolist() == [2, 4] and ys.tolist() == [5, 7]


def test_smoothing_is_an_average_of_neighbours():
    values = np.random.RandomState(0).standard_normal(200)
    weights = np.exp(-0.5 * ((np.arange(200)[:, None] - np.arange(200)) / 4) ** 2)
    weights[np.abs(np.arange(200)[:, None] - np.arange(200)) > 12] = 0
    assert np.allclose(_smoothed(values, 0.02), weights @ values / weights.sum(1))
    assert (
        np.allclose(_smoothed(np.full(31, 3.0), 0.9), 3) and _smoothed(values[:9], 0.02).tolist() == values[:9].tolist()
    )


def test_levels_draws_one_line_a_quantity():
    rows = [{"t": t, "mse": 1 / t, "var": -t} for t in range(1, 30)]
    one, both = levels(rows, ["mse"]), levels(rows, {"mse": "error", "var": "variance"}, "By t", y_label="size")
    assert lines(both) >= lines(one) + 1


def test_nothing_to_draw_and_unknown_formats_are_errors():
    for rows in ([], [{"step": 1}], [{"step": 1, "loss": float("nan")}], [{"loss": 1.0}]):
        with pytest.raises(ValueError, match="loss"):
            curves(rows, ["loss"])
    with pytest.raises(ValueError, match="svg or png"):
        curves(HISTORY, ["loss"], format="pdf")


def test_a_tradeoff_names_every_method():
    points = {"ddgan-4": [(0.2, 3.0), (0.25, 3.5)], "ddpm-1000": [(80.0, 3.2)]}
    drawn = tradeoff(points, "seconds", "FID", "FID against seconds").decode()
    assert "<svg" in drawn and drawn == tradeoff(points, "seconds", "FID", "FID against seconds").decode()
    assert tradeoff(points, "seconds", "FID", format="png").startswith(b"\x89PNG")
    for bad in ({}, {"a": []}, {"a": [(0.0, 1.0)]}):
        with pytest.raises(ValueError, match="points must hold"):
            tradeoff(bad, "seconds", "FID")


def test_functions_have_linear_axes_and_the_variables_name():
    rows = [{"θ": x / 10, "js": 10.0 ** (x / 10)} for x in range(-30, 31)]
    drawn = functions(rows, "θ", {"js": "divergence"}, "Divergence")
    steps = [{"step": row["θ"], "js": row["js"]} for row in rows]
    assert drawn != curves(steps, {"js": "divergence"}, "Divergence", smooth=0)  # which is logarithmic here
    moved = functions([{"θ": row["θ"], "js": row["js"] - 500} for row in rows], "θ", {"js": "divergence"}, "Divergence")
    heights = [
        re.findall(r"[ML] \S+ (\S+)", re.findall(r'd="([^"]*)" clip-path', x.decode())[-1]) for x in (drawn, moved)
    ]
    assert len(heights[0]) == 61 and heights[0] == heights[1]  # a shifted function is the same curve on a linear axis
    with pytest.raises(ValueError, match="no row holds a finite value of none at some 'θ'"):
        functions(rows, "θ", ["none"])
