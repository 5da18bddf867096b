import base64
import json
from io import BytesIO

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

import diffgan_fast as dgf
from diffgan_fast.report import panels, scatter, write_run
from diffgan_fast.report.points import _View

SQUARE = torch.tensor([[-1.0, -1], [1, -1], [-1, 1], [1, 1]])


def picture(content):
    return np.asarray(Image.open(BytesIO(content) if isinstance(content, bytes) else content).convert("RGBA"), int)


def blue(pixels):
    """Where samples are drawn: rows (from the top) and columns."""
    return np.argwhere((pixels[..., 2] - pixels[..., 0] > 60) & (pixels[..., 3] > 100)) / pixels.shape[:2]


def test_samples_lie_where_they_belong_in_limits_of_the_real_points(tmp_path):
    seen = []
    for x, y in ((1.0, 1.0), (-1.0, 1.0), (1.0, -1.0), (0.0, 0.0)):
        path = scatter(torch.tensor([[x, y]]).repeat(50, 1), tmp_path / "new" / "s.png", SQUARE)
        pixels = picture(path)
        assert pixels.shape == (480, 480, 4) and pixels[0, 0, 3] == 0  # transparent
        row, column = blue(pixels).mean(0)
        seen.append((column * 2 - 1, 1 - row * 2))
    scale = 0.5 / 0.62  # the margins
    np.testing.assert_allclose(seen, [(scale, scale), (-scale, scale), (scale, -scale), (0, 0)], atol=0.03)
    assert [file.name for file in (tmp_path / "new").iterdir()] == ["s.png"]


def test_limits_are_square_fixed_and_count_what_lies_beyond():
    view = _View(np.array([[0.0, 10.0], [4.0, 11.0]]))
    np.testing.assert_allclose((view.x, view.y), [[2 - 2.48, 2 + 2.48], [10.5 - 2.48, 10.5 + 2.48]])
    assert view._outside(np.array([[2.0, 10.5], [2, 13.1], [-1, 10.5], [2, 10]])) == 0.5
    shares = view._shares(np.array([[-0.4, 8.03], [-0.4, 8.03], [9.0, 9.0], [4.4, 12.9]]))
    assert shares[0, 1] == 0.5 and shares[62, 62] == 0.25 and shares.sum() == 0.75  # [row of y, column of x]
    assert _View(np.zeros((3, 2))).x == (-1, 1)
    wide = _View(np.zeros((3, 2)), within=np.array([[-1.0, 0.0], [3.0, 2.0]]))
    np.testing.assert_allclose((wide.x, wide.y), [[1 - 2.48, 1 + 2.48], [1 - 2.48, 1 + 2.48]])


@pytest.mark.parametrize("kind", ["scatter", "density"])
def test_panels_have_a_row_a_model_and_a_column_a_data_set(kind):
    real = {name: torch.randn(500, 2) for name in ("a", "b", "c")}
    rows = {"one": {name: torch.randn(500, 2) for name in real}, "two": {"b": 9 * torch.randn(500, 2)}}
    content = panels(rows, real, kind)
    assert content == panels(rows, real, kind)
    pixels = picture(content)
    height, width = pixels.shape[:2]
    assert (width, height) == (int(150 * 5.4), int(150 * 5.3)) and len(np.unique(pixels.reshape(-1, 4), axis=0)) > 20
    empty = pixels[int(0.75 * height) : int(0.85 * height), int(0.1 * width) : int(0.3 * width)]
    assert (empty[..., 3] == 0).all()  # model two has no samples of a


def test_what_does_not_fit_is_named(tmp_path):
    for call, message in (
        (lambda: scatter(torch.zeros(3, 3), tmp_path / "s.png"), r"samples must be points \[N, 2\] .* not \[3, 3\]"),
        (lambda: scatter(SQUARE, tmp_path / "s.png", SQUARE[:0]), r"real must be points .* not \[0, 2\]"),
        (lambda: scatter(SQUARE * torch.nan, tmp_path / "s.png"), "samples must be finite"),
        (lambda: panels({}, {}), "real must hold at least one data set"),
        (lambda: panels({}, {"a": SQUARE}, "line"), "kind must be scatter or density, not 'line'"),
        (lambda: panels({}, {"a": SQUARE}, within=SQUARE[:0]), "within must be points"),
        (lambda: panels({"m": {"a": SQUARE[0]}}, {"a": SQUARE}), r"rows\['m'\]\['a'\] must be points"),
    ):
        with pytest.raises(ValueError, match=message):
            call()
    assert not list(tmp_path.iterdir())


class Denoiser(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = nn.Linear(2, 2)

    def forward(self, x, t):
        return self.net(x)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    out = tmp_path_factory.mktemp("points") / "run"
    options = dict(steps=4, batch_size=8, T=3, log_every=1, sample_every=2, clip_x0=False, progress=False)
    return dgf.train("ddpm", "moons", out, subset=300, model=Denoiser(), **options)


def test_a_run_on_points_saves_scatter_plots_and_shows_them(run, parse):
    assert sorted(p.name for p in (run.path / "samples").iterdir()) == ["step-2.png", "step-4.png"]
    seen = parse((run.path / "report.html").read_text())
    text = "\n".join(seen.text)
    assert "32\npoints seen" in text and "points / s" in text and "images" not in text and "Samples" in text
    shown = [base64.b64decode(source.split(",")[1]) for source in seen.sources]
    assert shown[0] == (run.path / "samples" / "step-4.png").read_bytes()
    assert shown[1] == (run.path / "samples" / "step-2.png").read_bytes()


def test_a_run_on_points_is_scored_by_kl_against_all_of_them(run, parse):
    result = run.evaluate(200)
    assert (result["n"], result["reference_n"], result["floor_n"]) == (200, 100_000, 200) and "fid" not in result
    assert 0.1 < result["eval_loss"] < 10 and result["sample_seconds"] > 0
    assert json.loads((run.path / "evaluation.json").read_text()) == result
    seen = parse(write_run(run.path).read_text())
    text = "\n".join(seen.text)
    assert "KL (bits)" in text and "200 samples against 100,000 real ones" in text and "may be negative" in text
    assert "weights" not in text and "step\n4" not in text


def test_own_points_need_no_second_split(tmp_path):
    points = torch.randn(400, 2)
    options = dict(steps=1, batch_size=8, T=3, clip_x0=False, progress=False, model=Denoiser())
    result = dgf.train("ddpm", points, tmp_path / "run", **options).evaluate(50)
    assert (result["reference_n"], result["floor_n"]) == (400, 50) and (tmp_path / "run/samples/step-1.png").exists()
