"""Tables of numbers: aligned text for terminals, and HTML."""

import math
from collections.abc import Callable, Mapping, Sequence
from html import escape
from numbers import Integral, Real
from typing import TypeGuard

MISSING = "–"

# A column's header, or (header, format spec of its numbers such as ".2f").
Columns = Mapping[str, str | tuple[str, str]]


def number(value: float) -> str:
    """A number for reading: integers with thousands separators, others to four significant digits."""
    size = abs(value)
    if isinstance(value, Integral) or (size >= 999.95 and math.isfinite(size)):  # 999.95 rounds to 1,000
        return f"{value:,.0f}"
    if 0 < size < 1e-4:
        return f"{value:.2e}"
    return f"{value:#.4g}" if value and math.isfinite(size) else f"{value:g}"


def is_number(value) -> TypeGuard[float]:
    """True for ints and floats, NumPy's too; not for bools."""
    return isinstance(value, Real) and not isinstance(value, bool)


def _text(value, spec: str | None) -> str:
    if value is None:
        return MISSING
    if isinstance(value, bool):
        return "yes" if value else "no"
    if not is_number(value):
        return str(value)
    return format(value, spec) if spec else number(value)


def _plan(rows: Sequence[Mapping], columns: Columns) -> list[tuple[str, str, list, list[str], bool]]:
    """For each column: key, header, values, their texts, and whether it is one of numbers."""
    plan = []
    for key, column in columns.items():
        header, spec = (column, None) if isinstance(column, str) else column
        values = [row.get(key) for row in rows]
        present = [v for v in values if v is not None]
        numeric = bool(present) and all(map(is_number, present))
        plan.append((key, header, values, [_text(v, spec) for v in values], numeric))
    return plan


def table(rows: Sequence[Mapping], columns: Columns) -> str:
    """A table as plain text, for terminals: a header, a rule and a line for each row.

    Args:
        rows: dicts of numbers, strings, bools or None; what is missing or None is printed as "–".
        columns: key -> header, or (header, format spec such as ".2f"), in the order of printing. Without a spec
            integers get thousands separators, other numbers four significant digits.

    Returns:
        the lines, without a final newline; columns of numbers are aligned to the right, others to the left.
    """
    cells = []
    for _, header, _, texts, numeric in _plan(rows, columns):
        width = max(map(len, (header, *texts)))
        align = str.rjust if numeric else str.ljust
        cells.append([align(header, width), "─" * width, *(align(text, width) for text in texts)])
    return "\n".join("  ".join(line).rstrip() for line in zip(*cells, strict=True))


def html_table(rows: Sequence[Mapping], columns: Columns, best: Mapping[str, Callable] | None = None) -> str:
    """The same table as HTML, all text escaped.

    Args:
        rows: as for :func:`table`.
        columns: as for :func:`table`.
        best: key -> min or max: the value (or values) that it picks among the numbers of that column is bold. Rows
            with a true "reference" (real images, published scores) do not compete.

    Returns:
        a ``<table>`` in a ``<div>`` that scrolls sideways on narrow screens.
    """
    heads, cells = [], []
    competes = [not row.get("reference") for row in rows]
    for key, header, values, texts, numeric in _plan(rows, columns):
        kind = ' class="number"' if numeric else ""
        heads.append(f"<th{kind}>{escape(header)}</th>")
        comparable = [v for v, c in zip(values, competes, strict=True) if c and is_number(v) and not math.isnan(v)]
        winner = best[key](comparable) if best and key in best and len(comparable) > 1 else None
        marked = [
            f"<b>{escape(text)}</b>" if c and winner is not None and v == winner else escape(text)
            for v, text, c in zip(values, texts, competes, strict=True)
        ]
        cells.append([f"<td{kind}>{content}</td>" for content in marked])
    body = "\n".join(f"<tr>{''.join(row)}</tr>" for row in zip(*cells, strict=True))
    head = f"<thead><tr>{''.join(heads)}</tr></thead>"
    return f'<div class="scroll"><table>\n{head}\n<tbody>\n{body}\n</tbody></table></div>'
