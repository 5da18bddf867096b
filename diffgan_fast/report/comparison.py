"""The page that sets several methods side by side."""

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from .. import files
from .html import block, page, paragraph, picture
from .scores import compared, score_notes
from .table import Columns, html_table


def write_comparison(
    rows: Sequence[Mapping],
    out: str | os.PathLike,
    *,
    title: str,
    columns: Columns | None = None,
    best: Mapping[str, Callable] | None = None,
    figures: Mapping[str, bytes | str | os.PathLike] | None = None,
    plots: Mapping[str, bytes] | None = None,
    notes: list[str] | None = None,
) -> Path:
    """Write a page with a table of methods, their samples side by side, and notes.

    Args:
        rows: a dict for each method, as for :func:`html_table`. With columns None and scores of
            ``metrics.evaluate`` in them, they are shown as by :func:`compared`, notes included.
        out: the HTML file; it appears whole or not at all.
        title: plain text.
        columns, best: as for :func:`html_table`; columns None otherwise shows all keys, in order of appearance.
        figures: caption -> PNG or SVG, as bytes or as the path of a file: one a method, shown side by side.
        plots: caption (may be empty) -> SVG or PNG bytes, for example of :func:`curves`: shown large.
        notes: plain sentences under the table, for example those of :func:`score_notes`.

    Returns:
        the path.

    Raises:
        ValueError: a figure is neither PNG nor SVG.
    """
    if columns is None and rows and "labels" in rows[0]:
        notes = [*score_notes(rows[0]), *(notes or ())]
        rows, columns, best = compared(rows)
    columns = columns or {key: str(key) for row in rows for key in row if key != "reference"}
    table = html_table(rows, columns, best) + "".join(paragraph(note, "note") for note in notes or ())
    sections = [("", table)]
    if figures:
        contents = {
            caption: figure if isinstance(figure, bytes) else Path(figure).read_bytes()
            for caption, figure in figures.items()
        }
        sections.append(("Samples", block("beside samples", [picture(c, name) for name, c in contents.items()])))
    if plots:
        sections.append(("Figures", block("plots", [picture(c, name) for name, c in plots.items()])))
    return files.write(out, page(title, sections).encode())
