"""Contact sheets: rows of pictures under a heading each, with labels and boxes drawn where there are any."""

import io
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont, ImageOps

from data_scripts.dad.files import write_whole
from images_mra import to_rgb
from mra.common.drawing import GREY, INK, LINE, PLACEHOLDER, WHITE, wrap_text


# Of boxes in their order; told apart by people who see red and green as one, too.
BOX_COLOURS = (
    (0, 114, 178),
    (213, 94, 0),
    (0, 158, 115),
    (204, 121, 167),
    (230, 159, 0),
    (86, 180, 233),
    (90, 90, 90),
)

# Pixels; pictures are fitted into a frame of 1:2, as persons are.
_FRAME = (128, 256)
_GAP, _MARGIN = 14, 24
_TITLE_SIZE, _HEADING_SIZE, _LABEL_SIZE, _LINE_HEIGHT = 24, 18, 13, 17


@dataclass
class Picture:
    """
    One picture of a sheet.

    Attributes:
        image: of any size.
        label: below it, grey, wrapped.
        boxes: (what it shows, [cx, cy, w, h] in 0..1); each has its line below the label in the colour of its box.
    """

    image: Image.Image
    label: str = ""
    boxes: Sequence[tuple[str, Sequence[float]]] = field(default_factory=list)


def draw_contact_sheet(
    groups: Sequence[tuple[str, Sequence[Picture]]], title: str, label_lines: int = 1
) -> Image.Image:
    """
    Draws groups of pictures, a row each.

    Args:
        groups: heading and pictures of each row.
        title: over all.
        label_lines: lines that the label of a picture may take.

    Raises:
        ValueError: if there is no picture.
    """
    columns = max((len(pictures) for _, pictures in groups), default=0)
    if columns == 0:
        raise ValueError("groups is empty: expected at least one picture to draw")
    text_heights = [
        _LINE_HEIGHT * (label_lines + max((len(picture.boxes) for picture in pictures), default=0))
        for _, pictures in groups
    ]
    row_heights = [_HEADING_SIZE + 2 * _GAP + _FRAME[1] + height for height in text_heights]
    width = 2 * _MARGIN + columns * (_FRAME[0] + _GAP) - _GAP
    width = max(width, 2 * _MARGIN + int(_font(_TITLE_SIZE).getlength(title)))
    top = _MARGIN + _TITLE_SIZE + _GAP
    canvas = Image.new("RGB", (width, top + sum(row_heights) + _MARGIN), WHITE)
    draw = ImageDraw.Draw(canvas)
    draw.text((_MARGIN, _MARGIN), title, INK, _font(_TITLE_SIZE), anchor="lt")
    for (heading, pictures), height in zip(groups, row_heights, strict=True):
        draw.line((_MARGIN, top, width - _MARGIN, top), LINE)
        draw.text((_MARGIN, top + _GAP), heading, INK, _font(_HEADING_SIZE), anchor="lt")
        for column, picture in enumerate(pictures):
            corner = (_MARGIN + column * (_FRAME[0] + _GAP), top + _HEADING_SIZE + 2 * _GAP)
            _draw_picture(canvas, draw, corner, picture, label_lines)
        top += height
    return canvas


def save_picture(image: Image.Image, path: str | Path) -> None:
    """Saves a picture as JPEG, whole or not at all."""
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=90)
    write_whole(path, buffer.getvalue())


def _draw_picture(canvas, draw, corner, picture: Picture, label_lines: int) -> None:
    left, top = corner
    shown = ImageOps.contain(to_rgb(picture.image), _FRAME, Image.Resampling.BICUBIC)
    draw.rectangle((left, top, left + _FRAME[0] - 1, top + _FRAME[1] - 1), fill=PLACEHOLDER)
    x, y = left + (_FRAME[0] - shown.width) // 2, top + (_FRAME[1] - shown.height) // 2
    canvas.paste(shown, (x, y))
    font = _font(_LABEL_SIZE)
    line_top = top + _FRAME[1] + 3
    for number, line in enumerate(wrap_text(picture.label, font, _FRAME[0], label_lines)):
        draw.text((left, line_top + number * _LINE_HEIGHT), line, GREY, font, anchor="lt")
    line_top += label_lines * _LINE_HEIGHT
    for number, (text, (cx, cy, width, height)) in enumerate(picture.boxes):
        colour = BOX_COLOURS[number % len(BOX_COLOURS)]
        edges = ((cx - width / 2) * shown.width, (cy - height / 2) * shown.height)
        edges += ((cx + width / 2) * shown.width - 1, (cy + height / 2) * shown.height - 1)
        edges = [x + edges[0], y + edges[1], x + edges[2], y + edges[3]]
        draw.rectangle((edges[0], edges[1], max(edges[0], edges[2]), max(edges[1], edges[3])), outline=colour, width=2)
        (line,) = wrap_text(text, font, _FRAME[0], 1)[:1] or ("",)
        draw.text((left, line_top + number * _LINE_HEIGHT), line, colour, font, anchor="lt")


def _font(size: int) -> ImageFont.ImageFont:
    return ImageFont.load_default(size)
