"""Picture of ranked results: one row a query, its best gallery images framed green where right and red where wrong."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont, ImageOps

from images_mra import to_rgb
from mra.common.files import whole_file


PICTURE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".tif", ".tiff", ".bmp", ".gif")

GREEN = (22, 150, 72)
RED = (208, 44, 44)
GREY = (110, 116, 124)
LINE = (226, 229, 233)
INK = (28, 32, 38)
WHITE = (255, 255, 255)
PLACEHOLDER = (244, 245, 247)

# Pixels. Crops are 1:2 as persons are; every measure is for a picture read at full size.
CROP_SIZE = (104, 208)
FRAME = 5
GAP = 12
MARGIN = 28
TEXT_WIDTH = 340
TEXT_SIZE = 16
LABEL_SIZE = 15
LABEL_HEIGHT = 26
TITLE_SIZE = 24
LINE_HEIGHT = 22


@dataclass
class RankedQuery:
    """One row of the picture.

    Attributes:
        text: the query.
        images: its ranked gallery images, best first.
        scores: their scores, as many.
        is_match: whether each shows the person searched for, as many.
        own_image: the image that the query describes, or None.
        caption: a short grey line over the query, such as its identity; may be empty.
    """

    text: str
    images: Sequence[Image.Image]
    scores: Sequence[float]
    is_match: Sequence[bool]
    own_image: Image.Image | None = None
    caption: str = ""


def draw_rankings(queries: Sequence[RankedQuery], title: str = "") -> Image.Image:
    """Draw ranked results: query text (and its own image, if any is given), then the ranked crops with rank and score.

    Raises:
        ValueError: if there are no queries, or images, scores and matches of a query differ in number.
    """
    if not queries:
        raise ValueError("queries is empty: expected at least one row to draw")
    for row, query in enumerate(queries):
        if not len(query.images) == len(query.scores) == len(query.is_match):
            raise ValueError(
                f"query {row} must have as many images as scores and matches, got {len(query.images)}, "
                f"{len(query.scores)} and {len(query.is_match)}"
            )
    has_own = any(query.own_image is not None for query in queries)
    cell_width, cell_height = CROP_SIZE[0] + 2 * FRAME, CROP_SIZE[1] + 2 * FRAME
    ranked_x = MARGIN + TEXT_WIDTH + GAP + (cell_width + 2 * GAP if has_own else 0)
    num_columns = max(len(query.images) for query in queries)
    width = ranked_x + num_columns * (cell_width + GAP) - GAP + MARGIN
    header = MARGIN + (TITLE_SIZE + 2 * GAP if title else 0)
    row_height = cell_height + LABEL_HEIGHT + 2 * GAP
    canvas = Image.new("RGB", (width, header + len(queries) * row_height + MARGIN - GAP), WHITE)
    draw = ImageDraw.Draw(canvas)
    if title:
        draw.text((MARGIN, MARGIN), title, INK, _font(TITLE_SIZE), anchor="lt")
    for row, query in enumerate(queries):
        top = header + row * row_height
        if row:
            draw.line((MARGIN, top - GAP, width - MARGIN, top - GAP), LINE)
        _draw_text(draw, query, top, cell_height)
        if query.own_image is not None:
            x = MARGIN + TEXT_WIDTH + GAP
            _draw_cell(canvas, draw, (x, top), query.own_image, LINE, "described", GREY)
        columns = zip(query.images, query.scores, query.is_match, strict=True)
        for rank, (image, score, is_match) in enumerate(columns, start=1):
            x = ranked_x + (rank - 1) * (cell_width + GAP)
            colour = GREEN if is_match else RED
            _draw_cell(canvas, draw, (x, top), image, colour, f"{rank}.  {score:.4f}", colour)
    return canvas


def save_picture(image: Image.Image, path: Path) -> None:
    """Save a picture, whole or not at all."""
    with whole_file(path) as unfinished:
        image.save(unfinished)


def wrap_text(text: str, font: ImageFont.ImageFont, width: int, max_lines: int) -> list[str]:
    """Break a text into lines no wider than `width` pixels; what exceeds `max_lines` ends in an ellipsis."""
    lines, line = [], ""
    for word in text.split():
        longer = f"{line} {word}".strip()
        if font.getlength(longer) <= width:
            line = longer
            continue
        if line:
            lines.append(line)
        line = word
        while font.getlength(line) > width:  # a word wider than the column is broken anywhere
            cut = max(1, next(n for n in range(len(line), 0, -1) if n == 1 or font.getlength(line[:n]) <= width))
            lines.append(line[:cut])
            line = line[cut:]
    if line:
        lines.append(line)
    if len(lines) > max_lines:
        lines = lines[:max_lines]
        while lines[-1] and font.getlength(lines[-1] + "…") > width:
            lines[-1] = lines[-1][:-1]
        lines[-1] = lines[-1].rstrip() + "…"
    return lines


def _draw_text(draw: ImageDraw.ImageDraw, query: RankedQuery, top: int, height: int) -> None:
    if query.caption:
        draw.text((MARGIN, top + 2), query.caption, GREY, _font(LABEL_SIZE), anchor="lt")
        top, height = top + LINE_HEIGHT, height - LINE_HEIGHT
    font = _font(TEXT_SIZE)
    for number, line in enumerate(wrap_text(query.text, font, TEXT_WIDTH - GAP, height // LINE_HEIGHT)):
        draw.text((MARGIN, top + number * LINE_HEIGHT), line, INK, font, anchor="la")


def _draw_cell(canvas, draw, corner, image, frame_colour, label, label_colour) -> None:
    x, y = corner
    outer = (x, y, x + CROP_SIZE[0] + 2 * FRAME - 1, y + CROP_SIZE[1] + 2 * FRAME - 1)
    draw.rectangle(outer, fill=frame_colour)
    crop = ImageOps.pad(to_rgb(image), CROP_SIZE, Image.Resampling.BICUBIC, color=PLACEHOLDER)
    canvas.paste(crop, (x + FRAME, y + FRAME))
    middle = (outer[0] + outer[2]) // 2
    draw.text((middle, outer[3] + 1 + LABEL_HEIGHT // 2), label, label_colour, _font(LABEL_SIZE), anchor="mm")


def _font(size: int) -> ImageFont.ImageFont:
    return ImageFont.load_default(size)
