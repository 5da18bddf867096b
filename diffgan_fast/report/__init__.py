"""Tables, plots, grids of samples, and the HTML pages made of them."""

from .comparison import write_comparison
from .html import page, picture
from .images import grid, save_grid, strip
from .plots import curves, functions, levels, tradeoff
from .points import panels, scatter
from .run import write_run
from .scores import SCORE_COLUMNS, SPREAD_NOTE, compared, recognisable_digits, score_notes, score_rows
from .table import html_table, table

__all__ = [
    "SCORE_COLUMNS",
    "SPREAD_NOTE",
    "compared",
    "curves",
    "functions",
    "grid",
    "html_table",
    "levels",
    "page",
    "panels",
    "picture",
    "recognisable_digits",
    "save_grid",
    "scatter",
    "score_notes",
    "score_rows",
    "strip",
    "table",
    "tradeoff",
    "write_comparison",
    "write_run",
]
