"""Blocks of a report, and their rendering as Markdown and HTML."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from mra.common.cards import fill_template


@dataclass(frozen=True)
class Heading:
    """A heading of level 1 to 3."""

    kind: ClassVar[str] = "heading"
    text: str
    level: int = 2


@dataclass(frozen=True)
class Paragraph:
    """Plain text; a note is highlighted."""

    kind: ClassVar[str] = "paragraph"
    text: str
    is_note: bool = False


@dataclass(frozen=True)
class Table:
    """Rows below a header; columns after the first `text_columns` are right-aligned numbers."""

    kind: ClassVar[str] = "table"
    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    text_columns: int = 1


@dataclass(frozen=True)
class Picture:
    """A picture: its path relative to the page, and its caption."""

    kind: ClassVar[str] = "picture"
    path: str
    caption: str


Block = Heading | Paragraph | Table | Picture

_TEMPLATES = Path(__file__).parents[1] / "templates"


def to_markdown(blocks: Sequence[Block]) -> str:
    """Return the page in Markdown."""
    return fill_template(_TEMPLATES / "report_page.md", blocks=blocks)


def to_html(blocks: Sequence[Block]) -> str:
    """Return the page in HTML; pictures are linked."""
    title = next((block.text for block in blocks if isinstance(block, Heading)), "Report")
    return fill_template(_TEMPLATES / "report_page.html", blocks=blocks, title=title)
