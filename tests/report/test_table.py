import math

import numpy as np
import pytest

from diffgan_fast.report import html_table, table
from diffgan_fast.report.table import number

ROWS = [
    {"method": "ddpm", "fid": 12.3456, "kid": 0.0123, "steps": 4000, "ok": True},
    {"method": "method3.5 <b>", "fid": 9.8, "steps": 12_000, "ok": False},
    {"method": None, "fid": math.nan, "kid": -0.00002, "steps": 7, "ok": None},
]
COLUMNS = {"method": "method", "fid": "FID", "kid": ("KID", ".4f"), "steps": "steps", "ok": "done"}


def test_golden():
    want = """\
method           FID      KID   steps  done
─────────────  ─────  ───────  ──────  ────
ddpm           12.35   0.0123   4,000  yes
method3.5 <b>  9.800        –  12,000  no
–                nan  -0.0000       7  –"""
    assert table(ROWS, COLUMNS) == want


def test_no_rows_leave_the_header():
    assert table([], {"a": "A", "b": "long"}) == "A  long\n─  ────"


@pytest.mark.parametrize(
    "value, want",
    [
        (0, "0"), (0.0, "0"), (1234567, "1,234,567"), (np.int64(1000), "1,000"), (1234.5678, "1,235"), (1.0, "1.000"),
        (-0.123456, "-0.1235"), (0.000123, "0.0001230"), (1.5e-7, "1.50e-07"), (np.float32(0.5), "0.5000"),
        (math.inf, "inf"), (999.96, "1,000"), (999.94, "999.9"),
    ],
)  # fmt: skip
def test_numbers(value, want):
    assert number(value) == want


def test_html_is_escaped_aligned_and_marks_the_best(parse):
    html = html_table(ROWS, COLUMNS, best={"fid": min, "steps": max})
    page = parse(html)
    assert page.text[:5] == ["method", "FID", "KID", "steps", "done"] and "method3.5 <b>" in page.text
    assert page.bold == ["9.800", "12,000"]
    assert '<td class="number">12.35</td>' in html and "<td>ddpm</td>" in html
    assert page.tags.count("tr") == 4 and page.tags.count("td") == 15


def test_references_and_single_values_do_not_win(parse):
    rows = [{"m": "a", "fid": 3.0}, {"m": "b", "fid": 2.0}, {"m": "b'", "fid": 2.0}]
    real = {"m": "real", "fid": 0.5, "kid": 1.0, "reference": True}
    columns, best = {"m": "method", "fid": "FID", "kid": "KID"}, {"fid": min, "kid": min}
    assert parse(html_table([*rows, real], columns, best)).bold == ["2.000", "2.000"]
    assert parse(html_table([rows[0], real], columns, best)).bold == []
