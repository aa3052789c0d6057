"""Parts of pages that need nothing else: their style, tables, pictures."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Iterable, Sequence

STYLE = """
body { font: 15px/1.45 system-ui, sans-serif; color: #1c1c1e; margin: 2rem auto; max-width: 72rem; padding: 0 1.5rem }
h1 { font-size: 1.5rem; margin-bottom: .2rem } h2 { font-size: 1.1rem; margin-top: 2rem; border-bottom: 1px solid #ddd }
table { border-collapse: collapse; margin: .6rem 0 }
td, th { padding: .2rem .9rem .2rem 0; text-align: right; font-variant-numeric: tabular-nums }
td:first-child, th:first-child { text-align: left } th { font-weight: 600; color: #555; border-bottom: 1px solid #ccc }
.passed { color: #137333 } .failed { color: #b3261e } .verdict { font-size: 1.2rem; font-weight: 700 }
.bar { fill: #7aa6d8 } .bar.failed { fill: #b3261e } svg text { font: 11px system-ui, sans-serif; fill: #555 }
figure { margin: 1rem 0 } figure img { max-width: 100% } figcaption, .note { color: #555 }
"""


class Markup(str):
    """Text that is HTML already."""


def text(value) -> str:
    """A value as text of a page."""
    return html.escape(str(value))


def document(title: str, parts: Iterable[str]) -> str:
    """A page.

    Args:
        title: as text.
        parts: its body, HTML.
    """
    head = f"<title>{text(title)}</title><style>{STYLE}</style>"
    return f"<!doctype html><html lang=en><meta charset=utf-8>{head}{''.join(parts)}</html>\n"


def section(title: str, body: str) -> tuple[str, str]:
    """A heading and what is under it.

    Args:
        title: as text.
        body: HTML.
    """
    return f"<h2>{text(title)}</h2>", body


def table(titles: Sequence[str], rows: Iterable[Sequence]) -> str:
    """A table.

    Args:
        titles: of the columns.
        rows: of text, or of HTML as `Markup`.
    """

    def cell(value) -> str:
        return value if isinstance(value, Markup) else text(value)

    head = "".join(f"<th>{text(t)}" for t in titles)
    return f"<table><tr>{head}" + "".join("<tr>" + "".join(f"<td>{cell(v)}" for v in row) for row in rows) + "</table>"


def figure(picture, caption: str) -> str:
    """A picture in the page itself.

    Args:
        picture: a PIL image.
        caption: as text.
    """
    data = io.BytesIO()
    picture.save(data, "PNG")
    source = f"data:image/png;base64,{base64.b64encode(data.getvalue()).decode()}"
    return f"<figure><img alt='' src='{source}'><figcaption>{text(caption)}</figcaption></figure>"
