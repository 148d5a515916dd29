"""HTML pages that hold their figures and need nothing else."""

import base64
import html
import io
from collections.abc import Iterable

import pandas as pd
from matplotlib.figure import Figure

DOTS_PER_INCH = 150
STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #222; max-width: 1200px; margin: 2rem auto;
       padding: 0 1rem }
h1, h2 { font-weight: 600 } h2 { margin-top: 2.2rem }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: 13px }
th, td { padding: .25rem .6rem; text-align: right; border-bottom: 1px solid #ddd }
th { border-bottom: 2px solid #888 } td:first-child, th:first-child { text-align: left }
img { max-width: 100%; height: auto } .wide { overflow-x: auto } .note { color: #8a4b00 }
"""


def page(title: str, sections: Iterable[str]) -> str:
    """A whole page; `sections` are HTML, `title` is text."""
    safe = html.escape(title)
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{safe}</title>\n'
        f"<style>{STYLE}</style></head>\n<body><h1>{safe}</h1>\n"
        + "\n".join(sections)
        + "\n</body></html>\n"
    )


def heading(text: str) -> str:
    """A section's heading, escaped."""
    return f"<h2>{html.escape(text)}</h2>"


def paragraph(text: str, kind: str = "") -> str:
    """A paragraph, escaped; `kind` is its CSS class ("note" for what needs attention)."""
    return f'<p class="{kind}">{html.escape(text)}</p>'


def image(content: bytes, caption: str) -> str:
    """A PNG inside the page; the caption is for those who cannot see it."""
    encoded = base64.b64encode(content).decode("ascii")
    return f'<img alt="{html.escape(caption)}" src="data:image/png;base64,{encoded}">'


def table(rows: pd.DataFrame) -> str:
    """An HTML table; pandas escapes every cell."""
    body = rows.to_html(index=False, float_format=lambda value: f"{value:.5g}", border=0)
    return f'<div class="wide">{body}</div>'


def png(figure: Figure) -> bytes:
    """A figure as a PNG."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=DOTS_PER_INCH)
    return buffer.getvalue()
