"""The blocks of a report and how they look in Markdown and in HTML."""

import html
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Heading:
    """A heading of some level, 1 to 3."""

    text: str
    level: int = 2


@dataclass(frozen=True)
class Paragraph:
    """Plain text; a note stands out."""

    text: str
    is_note: bool = False


@dataclass(frozen=True)
class Table:
    """Rows below a header; columns past the first `text_columns` are numbers, flush right."""

    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    text_columns: int = 1


@dataclass(frozen=True)
class Figure:
    """A picture by its path relative to the page, and what it shows."""

    path: str
    caption: str


Block = Heading | Paragraph | Table | Figure

_STYLE = """
:root { color-scheme: light dark; --line: #d5d9de; --quiet: #626a73; --note: #fff4d6; --ink: #1c2026; --paper: #fff; }
@media (prefers-color-scheme: dark) {
  :root { --line: #3a4048; --quiet: #a3abb5; --note: #453a1b; --ink: #e6e9ed; --paper: #16191d; }
}
body { margin: 2rem auto; max-width: 72rem; padding: 0 1.5rem; font: 16px/1.55 system-ui, sans-serif;
  color: var(--ink); background: var(--paper); }
h1, h2, h3 { line-height: 1.25; } h2 { margin-top: 2.5rem; border-bottom: 1px solid var(--line); padding-bottom: .3rem; }
p { max-width: 46rem; } .note { background: var(--note); padding: .7rem 1rem; border-radius: .4rem; }
.wide { overflow-x: auto; } table { border-collapse: collapse; margin: 1rem 0; font-variant-numeric: tabular-nums; }
th, td { padding: .3rem .9rem .3rem 0; border-bottom: 1px solid var(--line); text-align: left; vertical-align: top; }
th { color: var(--quiet); font-weight: 600; } .number { text-align: right; }
figure { margin: 1.5rem 0; } img { max-width: 100%; height: auto; border: 1px solid var(--line); }
figcaption { color: var(--quiet); font-size: .92rem; }
"""


def to_markdown(blocks: Sequence[Block]) -> str:
    """The page in Markdown."""
    return "\n\n".join(_markdown(block) for block in blocks) + "\n"


def to_html(blocks: Sequence[Block]) -> str:
    """The page in HTML, complete but for its pictures."""
    title = next((block.text for block in blocks if isinstance(block, Heading)), "Report")
    body = "\n".join(_html(block) for block in blocks)
    return (
        f'<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n<title>{html.escape(title)}</title>\n'
        f'<meta name="viewport" content="width=device-width">\n<style>{_STYLE}</style>\n</head>\n<body>\n{body}\n'
        "</body>\n</html>\n"
    )


def _markdown(block: Block) -> str:
    if isinstance(block, Heading):
        return f"{'#' * block.level} {block.text}"
    if isinstance(block, Paragraph):
        return f"> **Note.** {block.text}" if block.is_note else block.text
    if isinstance(block, Figure):
        return f"![{block.caption}]({block.path})\n\n*{block.caption}*"
    rule = ["---" if column < block.text_columns else "---:" for column in range(len(block.header))]
    return "\n".join(
        "| " + " | ".join(_cell(cell) for cell in row) + " |" for row in (block.header, rule, *block.rows)
    )


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")


def _html(block: Block) -> str:
    if isinstance(block, Heading):
        return f"<h{block.level}>{html.escape(block.text)}</h{block.level}>"
    if isinstance(block, Paragraph):
        return f"<p{' class=note' if block.is_note else ''}>{html.escape(block.text)}</p>"
    if isinstance(block, Figure):
        path, caption = html.escape(block.path, quote=True), html.escape(block.caption)
        return f'<figure><img src="{path}" alt="{caption}"><figcaption>{caption}</figcaption></figure>'
    kinds = ["" if column < block.text_columns else " class=number" for column in range(len(block.header))]
    rows = [_html_row("th", block.header, kinds), *(_html_row("td", row, kinds) for row in block.rows)]
    return f"<div class=wide><table>\n{chr(10).join(rows)}\n</table></div>"


def _html_row(tag: str, cells: Sequence[str], kinds: Sequence[str]) -> str:
    inner = "".join(f"<{tag}{kind}>{html.escape(cell)}</{tag}>" for cell, kind in zip(cells, kinds, strict=True))
    return f"<tr>{inner}</tr>"
