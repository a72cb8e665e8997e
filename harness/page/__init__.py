"""Pages that need nothing beside themselves: one HTML file, nothing from elsewhere, light and dark, for a phone and for paper.

    render_document("title", body, style=own_css) -> the file's text

page.css is the house style, which every page has; a page adds its own sheet. Whatever comes from a run, a recipe or a model is for the
caller to escape. The promise is kept twice: nothing here loads anything, and the page's own policy forbids it to what may have slipped in.
"""

from __future__ import annotations

from html import escape
from pathlib import Path

STYLE = Path(__file__).with_name("page.css")
POLICY = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; img-src data:; base-uri 'none'; form-action 'none'"


def render_document(title: str, body: str, *, style: str = "", script: str = "", connects: bool = False) -> str:
    """body: the HTML inside <main>. script: JavaScript that stands at the end. connects: to the server that the page came from, alone."""
    policy = POLICY + ("; connect-src 'self'" if connects else "")
    tail = f"<script>\n{script}</script>\n" if script else ""
    page = (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>\n{STYLE.read_text(encoding='utf-8')}{style}</style>\n</head>\n"
        f"<body>\n<main>\n{body}\n</main>\n{tail}</body>\n</html>\n"
    )
    # A name of a file that is no UTF-8 comes with halves of characters, which no file of text can hold.
    return page.encode(errors="replace").decode()


def svg(height: float, said: str, parts: list[str]) -> str:
    """Inline SVG as wide as the page lets it be: places across it are percentages, heights are pixels. What stands out of it by half a
    point is let be. said: for those who do not see it."""
    return f'<svg class="plot" width="100%" height="{height:g}" role="img" aria-label="{escape(said)}">{"".join(parts)}</svg>'
