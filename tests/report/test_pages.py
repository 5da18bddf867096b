import base64
import json
import re
from io import BytesIO

import pytest
import torch
from PIL import Image

from diffgan_fast.report import (
    compared,
    curves,
    grid,
    page,
    picture,
    recognisable_digits,
    save_grid,
    score_notes,
    score_rows,
    strip,
    write_comparison,
    write_run,
)

EVALUATION = {
    "n": 2000, "floor_n": 360, "fid": 12.5, "fid_floor": 3.25,
    "kid": 0.02, "kid_floor": 0.001, "is": 8.0, "is_real": 9.0,
    "mean_top_probability": 0.95, "smallest_class_share": 0.05, "comparable": False,
    "extractor": {"name": "domain", "hash": "0123456789abcdef", "comparable": False},
    "labels": {"fid": "FID (domain)", "kid": "KID (domain)", "is": "IS (domain)"},
    "spread": {"fid": 0.25, "kid": 0.001, "is": 0.5}, "warnings": ["FID is biased."],
}  # fmt: skip
CONFIG = {
    "method": "method3.5", "data": "digits", "seed": 7, "given": [], "shape": [1, 8, 8],
    "config": {"steps": 4000, "lr": 1e-5, "ema": None, "flip": True, "network": "<script>alert(1)</script>"},
    "schedule": {"T": 300, "prior_mismatch": 0.2191}, "versions": {"torch": "2.13"},
}  # fmt: skip
IMAGES = torch.linspace(-1, 1, 4 * 64).view(4, 1, 8, 8)


def write(folder, name, value):
    (folder / name).write_text(value if isinstance(value, str) else json.dumps(value))


def headings(text):
    return re.findall("<h2>(.*?)</h2>", text)


def history(n=40):
    rows = [{"step": s, "images_seen": s * 128, "seconds": s * 0.5, "critic_loss": 1 / s, "loss": 2.0 / s, "lr": 1e-3,
             "real_logit": s / 9, "mse": 1 / s, "grad_norm": 1 + s % 3} for s in range(1, n + 1)]  # fmt: skip
    rows += [{"step": s, "evaluation": EVALUATION | {"fid": 100 / s}} for s in (10, 20)]
    return "".join(json.dumps(row) + "\n" for row in rows)


@pytest.fixture
def run_dir(tmp_path):
    write(tmp_path, "config.json", CONFIG)
    write(tmp_path, "metrics.jsonl", history() + '{"step": 41, "lo')
    write(tmp_path, "evaluation.json", EVALUATION)
    write(tmp_path, "levels.json", {"t": [30, 60], "mse": [0.3, 0.1], "log_var_eps": [-0.5, -0.1]})
    for step in range(100, 1100, 100):
        save_grid(IMAGES * step / 1000, tmp_path / "samples" / f"step-{step}.png")
    strip([(0, IMAGES), (300, -IMAGES)], tmp_path / "samples" / "noising.png")
    return tmp_path


def test_a_whole_run(run_dir, parse):
    path = write_run(run_dir)
    assert path == run_dir / "report.html" and write_run(str(run_dir)) == path
    html = path.read_text()
    seen = parse(html)
    assert seen.text[0] == seen.text[1] == "method3.5 on digits"
    sections = ["Samples", "From noise to image", "Training", "Evaluation", "Scores over the run", "By noise level"]
    assert headings(html) == [*sections, "Settings"]
    text = "\n".join(seen.text)
    for part in ("40\nsteps", "5,120\nimages seen", "20.0 s\ntraining time", "256\nimages / s", "12.50\nFID (domain)",
                 "√ᾱ_T = 0.219", "FID (domain)\n12.50\n0.2500\n3.250", "FID is biased.", "± is the standard deviation",
                 "IS (domain)\n8.000\n0.5000\n9.000", "2,000 samples", "360 real",
                 "domain (weights 0123456789abcdef)", "never with published", "Recognisable digits: missed", "seed\n7",
                 "lr\n1e-05", "ema\n–", "flip\nyes", "given\n–", "shape\n1, 8, 8", "<script>alert(1)</script>",
                 "torch\n2.13"):  # fmt: skip
        assert part in text
    assert "script" not in seen.tags
    svgs = [source for source in seen.sources if source.startswith("data:image/svg")]
    assert len(svgs) == 4 + 3 + 2  # losses, logits, mse, grad_norm (lr is constant); three scores; two by noise level


def test_the_last_grid_comes_first_and_earlier_ones_are_spread_over_the_run(run_dir, parse):
    html = write_run(run_dir).read_text()
    captions = re.findall("<figcaption>(.*?)</figcaption>", html)
    assert captions == ["step 1,000", "step 100", "step 300", "step 600", "step 900", "Noising"]
    content = base64.b64decode(parse(html).sources[0].split(",")[1])
    assert content == (run_dir / "samples" / "step-1000.png").read_bytes()


def test_what_is_missing_is_left_out(tmp_path, parse):
    write(tmp_path, "config.json", {"method": "gan", "data": "digits", "schedule": {}, "versions": {}, "config": {}})
    html = write_run(tmp_path).read_text()
    assert headings(html) == ["Settings"] and not parse(html).sources and 'class="warning"' not in html
    save_grid(IMAGES, tmp_path / "samples" / "step-5.png")
    write(tmp_path, "metrics.jsonl", '{"step": 5, "images_seen": 640, "seconds": 0.0, "loss": 1.0}\n')
    html = write_run(tmp_path).read_text()
    assert headings(html) == ["Samples", "Settings"] and len(parse(html).sources) == 1
    write(tmp_path, "evaluation.json", {"n": 50, "kl": 0.5, "labels": {"kl": "KL"}})
    html = write_run(tmp_path).read_text()
    assert headings(html) == ["Samples", "Evaluation", "Settings"] and "published" not in html


@pytest.mark.parametrize("mismatch, warned", [(0.0501, True), (0.05, False)])
def test_the_prior_warning(tmp_path, mismatch, warned):
    write(tmp_path, "config.json", CONFIG | {"schedule": {"prior_mismatch": mismatch}})
    assert ('<p class="warning">' in write_run(tmp_path).read_text()) == warned


def test_a_directory_that_is_no_run_is_named(tmp_path):
    for folder in (tmp_path, tmp_path / "absent"):
        with pytest.raises(ValueError, match=re.escape(f"{folder} is no run directory")):
            write_run(folder)
    assert not list(tmp_path.iterdir())


def test_scores():
    rows = score_rows(EVALUATION)
    assert rows[0] == {"metric": "FID (domain)", "value": 12.5, "spread": 0.25, "floor": 3.25}
    names = [row["metric"] for row in rows]
    assert names == ["FID (domain)", "KID (domain)", "IS (domain)", "mean top probability", "smallest class share"]
    assert score_notes({}) == [] and len(score_notes(EVALUATION)) == 5
    assert not any("published" in note for note in score_notes(EVALUATION | {"comparable": True}))


def test_the_bar_for_recognisable_digits():
    good = EVALUATION | {"fid": 9.75}
    assert "met" in recognisable_digits(good) and "FID (domain) 3.0 times its floor" in recognisable_digits(good)
    for below in ({"fid": 9.76}, {"mean_top_probability": 0.89}, {"smallest_class_share": 0.029}):
        assert "missed" in recognisable_digits(good | below)
    assert recognisable_digits({"fid": 1.0}) is None


def test_comparison_of_evaluated_runs(tmp_path, parse):
    rows = [{"method": m, **EVALUATION, "fid": f, "is": i, "seconds": 3.0, "path": "/x"}
            for m, f, i in [("ddpm", 9.0, 8.5), ("a & b", 8.0, 8.0)]]  # fmt: skip
    grids = {"ddpm": save_grid(IMAGES, tmp_path / "d.png"), "a & b": save_grid(-IMAGES, tmp_path / "m.png")}
    path = write_comparison(rows, tmp_path / "out" / "c.html", title="On <digits>", figures=grids, notes=["One seed."])
    html = path.read_text()
    seen = parse(html)
    assert seen.text[0] == "On <digits>" and headings(html) == ["Samples"] and "One seed." in seen.text
    header = seen.text[seen.text.index("method") :][:5]
    assert header == ["method", "FID (domain)", "KID (domain)", "IS (domain)", "training (s)"]
    assert seen.bold == ["0.02000", "8.500", "8.000", "0.02000"]
    assert "real data\n3.250\n0.001000\n9.000\n–" in "\n".join(seen.text) and "never with published" in html
    assert [base64.b64decode(s.split(",")[1]) for s in seen.sources] == [p.read_bytes() for p in grids.values()]
    table_rows, columns, _ = compared(rows)
    assert len(rows) == 2 and table_rows[-1]["reference"] and list(columns) == ["method", "fid", "kid", "is", "seconds"]


def test_comparison_of_anything_else(tmp_path, parse):
    rows = [{"data": "moons", "kl": 0.1}, {"data": "dino", "nfe": 4, "reference": True}]
    plot = curves([{"step": 1, "kl": 1.0}, {"step": 2, "kl": 0.5}], ["kl"])
    path = write_comparison(rows, tmp_path / "c.html", title="2-D", plots={"KL": plot})
    seen = parse(path.read_text())
    assert seen.text[2:5] == ["data", "kl", "nfe"] and len(seen.sources) == 1


def test_page_and_picture(parse):
    buffer = BytesIO()
    grid(IMAGES).save(buffer, "PNG")
    figure = picture(buffer.getvalue(), 'a "quoted" <caption>', alt="b")
    html = page("R&D", [("", figure), ("A < B", "<p>text</p>")])
    seen = parse(html)
    assert seen.text == ["R&D", "R&D", 'a "quoted" <caption>', "A < B", "text"]
    assert Image.open(BytesIO(base64.b64decode(seen.sources[0].split(",")[1]))).size == grid(IMAGES).size
    assert "prefers-color-scheme: dark" in html and 'name="viewport"' in html
    with pytest.raises(ValueError, match="PNG or SVG"):
        picture(b"\xff\xd8\xff jpeg")
