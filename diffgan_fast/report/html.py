"""One HTML page that needs no other file: inline style, images as data URIs."""

from base64 import b64encode
from html import escape

# A heading and the HTML beneath it.
Section = tuple[str, str]

_STYLE = """
:root { color-scheme: light dark; --ink: #1c2024; --soft: #667079; --line: #dfe3e6; --ground: #fff; --card: #f6f7f8;
  --warn: #8a5a00; --warn-ground: #fff6e0; }
@media (prefers-color-scheme: dark) { :root { --ink: #e4e7ea; --soft: #98a1a9; --line: #343a40; --ground: #15181b;
  --card: #1d2125; --warn: #f0c36a; --warn-ground: #2c2515; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 62rem; padding: 2rem 1.25rem 4rem; background: var(--ground); color: var(--ink);
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "DejaVu Sans", sans-serif; }
h1 { font-size: 1.7rem; line-height: 1.2; margin: 0 0 .5rem; }
h2 { font-size: 1.1rem; margin: 2.5rem 0 .75rem; padding-bottom: .3rem; border-bottom: 1px solid var(--line); }
p { margin: .5rem 0; }
img { max-width: 100%; height: auto; display: block; }
figure { margin: 0; min-width: 0; }
figure + figure { margin-top: 1.25rem; }
.plots figure, .pictures figure, .beside figure { margin: 0; }
figcaption { color: var(--soft); font-size: .85rem; margin-top: .3rem; }
.note { color: var(--soft); font-size: .9rem; margin: .25rem 0; }
.scroll + .note { margin-top: .9rem; }
.warning { color: var(--warn); background: var(--warn-ground); border-left: 3px solid; padding: .6rem .9rem; }
.tiles { display: grid; grid-template-columns: repeat(auto-fill, minmax(7.5rem, 1fr)); gap: .6rem; margin: 1.25rem 0; }
.tile { background: var(--card); border-radius: 6px; padding: .55rem .9rem; }
.tile b { display: block; font-size: 1.15rem; font-variant-numeric: tabular-nums; }
.tile span { color: var(--soft); font-size: .8rem; }
.plots { display: grid; gap: 1.25rem; grid-template-columns: repeat(auto-fit, minmax(min(100%, 26rem), 1fr)); }
.pictures { display: grid; gap: 1rem; grid-template-columns: repeat(auto-fill, minmax(min(45%, 13rem), 1fr));
  margin-top: 1.25rem; }
.beside { display: grid; gap: 1.25rem; grid-template-columns: repeat(auto-fit, minmax(min(100%, 15rem), 1fr)); }
.samples img { width: 100%; max-width: 32rem; image-rendering: pixelated; }
.points img { width: 100%; max-width: 28rem; }
.pictures img, .beside img { width: 100%; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-size: .95rem; }
th, td { text-align: left; padding: .35rem 1.5rem .35rem 0; border-bottom: 1px solid var(--line); white-space: nowrap; }
th { color: var(--soft); font-weight: 500; }
.number { text-align: right; font-variant-numeric: tabular-nums; }
dl { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 17rem), 1fr)); gap: 0 2rem; margin: 0;
  font-size: .9rem; }
dl div { display: flex; justify-content: space-between; gap: 1rem; padding: .25rem 0;
  border-bottom: 1px solid var(--line); }
dt { color: var(--soft); } dd { margin: 0; text-align: right; overflow-wrap: anywhere; }
summary { cursor: pointer; color: var(--soft); margin: .75rem 0 .5rem; }
"""


def paragraph(text: str, kind: str | None = None) -> str:
    """A paragraph of plain text, escaped; kind "note" is soft, "warning" stands out."""
    opening = f'<p class="{kind}">' if kind else "<p>"
    return f"{opening}{escape(text)}</p>"


def picture(content: bytes, caption: str = "", alt: str = "") -> str:
    """A figure that holds its image: PNG or SVG bytes, a plain caption, and the text for who does not see it.

    Without `alt` the caption is that text.

    Raises:
        ValueError: the bytes are neither.
    """
    if content.startswith(b"\x89PNG"):
        kind = "png"
    elif content.lstrip().startswith((b"<?xml", b"<svg")):
        kind = "svg+xml"
    else:
        raise ValueError(f"pictures must be PNG or SVG, not a file that begins with {content[:8]!r}")
    below = f"<figcaption>{escape(caption)}</figcaption>" if caption else ""
    source = f"data:image/{kind};base64,{b64encode(content).decode()}"
    return f'<figure><img alt="{escape(alt or caption)}" src="{source}">{below}</figure>'


def block(kind: str, parts: list[str]) -> str:
    """The parts laid out in one of the page's ways: "plots", "pictures", "beside", "samples", "points"."""
    return f'<div class="{kind}">{"".join(parts)}</div>'


def tiles(values: dict[str, str]) -> str:
    """Summary numbers, each over its name."""
    return block(
        "tiles", [f'<div class="tile"><b>{escape(v)}</b><span>{escape(k)}</span></div>' for k, v in values.items()]
    )


def settings(values: dict[str, str]) -> str:
    """Names and values in columns."""
    return f"<dl>{''.join(f'<div><dt>{escape(k)}</dt><dd>{escape(v)}</dd></div>' for k, v in values.items())}</dl>"


def page(title: str, sections: list[Section]) -> str:
    """A whole HTML page, readable in light and dark mode and on a phone, that loads nothing from elsewhere.

    Args:
        title: plain text, escaped here.
        sections: pairs (heading, HTML): the heading is plain text, escaped here, "" for none; the HTML is taken
            as it is, made for example by :func:`html_table` and :func:`picture`.
    """
    body = "\n".join(
        f"<section>{f'<h2>{escape(heading)}</h2>' if heading else ''}\n{content}\n</section>"
        for heading, content in sections
    )
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>{_STYLE}</style>\n</head>\n"
        f"<body>\n<h1>{escape(title)}</h1>\n{body}\n</body>\n</html>\n"
    )
