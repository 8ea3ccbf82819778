"""Text and labelled tiles on pictures: one layout engine, and the pictures of ranked results that it draws."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont, ImageOps

from images_mra import to_rgb
from mra.common.files import whole_file


Font = ImageFont.FreeTypeFont | ImageFont.ImageFont


PICTURE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".tif", ".tiff", ".bmp", ".gif")

Colour = tuple[int, int, int]

GREEN = (22, 150, 72)
RED = (208, 44, 44)
GREY = (110, 116, 124)
LINE = (226, 229, 233)
INK = (28, 32, 38)
WHITE = (255, 255, 255)
PLACEHOLDER = (244, 245, 247)
# Of boxes in their order; people who see red and green alike can tell them apart.
BOX_COLOURS = (
    (0, 114, 178),
    (213, 94, 0),
    (0, 158, 115),
    (204, 121, 167),
    (230, 159, 0),
    (86, 180, 233),
    (90, 90, 90),
)

QUALITY = 90  # of formats that lose detail
TEXT_SIZE = 16
TEXT_LINE = 22
NOTE_SIZE = 15


@dataclass(frozen=True)
class SheetStyle:
    """Measures of a sheet in pixels of a picture read at full size.

    Attributes:
        tile_size: width and height into which pictures are fitted.
        frame: width of the coloured frame around a tile.
        gap: space between tiles.
        margin: space around everything.
        padding: space above and below each row.
        has_rules: draw a line between rows, and above a row that has a heading.
        text_width: of the column of text to the left of the tiles; 0 for none.
        title_size: of the title's letters.
        title_lines: lines that the title may take; with 1, the sheet is as wide as the title at least.
        heading_size: of the letters of a row's heading; 0 for rows without.
        label_size: of the letters below a tile.
        label_line: height of a line below a tile.
        label_lines: lines that a label may take, left-aligned; 0 for one line, centred.
        min_width: of the sheet.
    """

    tile_size: tuple[int, int]
    frame: int = 0
    gap: int = 12
    margin: int = 28
    padding: tuple[int, int] = (0, 12)
    has_rules: bool = False
    text_width: int = 0
    title_size: int = TEXT_SIZE
    title_lines: int = 4
    heading_size: int = 0
    label_size: int = NOTE_SIZE
    label_line: int = 26
    label_lines: int = 0
    min_width: int = 0

    @property
    def cell_size(self) -> tuple[int, int]:
        """Width and height of a tile with its frame."""
        return self.tile_size[0] + 2 * self.frame, self.tile_size[1] + 2 * self.frame


# Crops are 1:2, as persons are.
RANKINGS = SheetStyle(
    (104, 208), frame=5, padding=(12, 12), has_rules=True, text_width=340, title_size=24, title_lines=1
)
HEATMAPS = SheetStyle((104, 208), min_width=320)
CONTACT_SHEET = SheetStyle(
    (128, 256),
    gap=14,
    margin=24,
    padding=(14, 0),
    has_rules=True,
    title_size=24,
    title_lines=1,
    heading_size=18,
    label_size=13,
    label_line=17,
    label_lines=1,
)


@dataclass(frozen=True)
class Tile:
    """One picture of a sheet.

    Attributes:
        image: of any size and mode.
        label: text below it.
        colour: of the label.
        frame: colour of the frame.
        boxes: what each shows, and its `[cx, cy, w, h]` in 0..1; each has a line below the label in the colour of its box.
    """

    image: Image.Image
    label: str = ""
    colour: Colour = GREY
    frame: Colour = LINE
    boxes: Sequence[tuple[str, Sequence[float]]] = ()


@dataclass(frozen=True)
class TileRow:
    """One row of a sheet.

    Attributes:
        tiles: from left to right.
        heading: above the tiles.
        text: to the left of the tiles, wrapped.
        note: short grey line over the text.
        lead: a tile set apart before the others.
    """

    tiles: Sequence[Tile]
    heading: str = ""
    text: str = ""
    note: str = ""
    lead: Tile | None = None


@dataclass
class RankedQuery:
    """One row of a picture of rankings.

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

    Crops are framed green where right and red where wrong.

    Raises:
        ValueError: if there are no queries, or images, scores and matches of a query differ in number.
    """
    if not queries:
        raise ValueError("queries is empty: expected at least one row to draw")
    rows = []
    for row, query in enumerate(queries):
        if not len(query.images) == len(query.scores) == len(query.is_match):
            raise ValueError(
                f"query {row} must have as many images as scores and matches, got {len(query.images)}, "
                f"{len(query.scores)} and {len(query.is_match)}"
            )
        tiles = []
        for rank, (image, score, is_match) in enumerate(
            zip(query.images, query.scores, query.is_match, strict=True), start=1
        ):
            colour = GREEN if is_match else RED
            tiles.append(Tile(image, f"{rank}.  {score:.4f}", colour, colour))
        lead = None if query.own_image is None else Tile(query.own_image, "described")
        rows.append(TileRow(tiles, text=query.text, note=query.caption, lead=lead))
    return draw_sheet(rows, RANKINGS, title)


def draw_sheet(rows: Sequence[TileRow], style: SheetStyle, title: str = "") -> Image.Image:
    """Draw rows of labelled tiles under a title.

    Args:
        rows: from top to bottom; they may differ in length.
        style: measures.
        title: above all.

    Raises:
        ValueError: if no row has a tile or a text.
    """
    if not any(row.tiles or row.text for row in rows):
        raise ValueError("rows is empty: expected at least one picture to draw")
    cell_width, cell_height = style.cell_size
    left = style.margin + (style.text_width + style.gap if style.text_width else 0)
    has_lead = any(row.lead is not None for row in rows)
    first = left + (cell_width + 2 * style.gap if has_lead else 0)
    columns = max(len(row.tiles) for row in rows)
    width = max(first + columns * (cell_width + style.gap) - style.gap + style.margin, style.min_width)
    title_font = ImageFont.load_default(style.title_size)
    if style.title_lines == 1:
        width = max(width, 2 * style.margin + int(title_font.getlength(title)))
        title_step, title_anchor, title_rows = style.title_size, "lt", [title] if title else []
    else:
        title_step, title_anchor = TEXT_LINE, "la"
        title_rows = wrap_text(title, title_font, width - 2 * style.margin, style.title_lines)
    top = style.margin + (len(title_rows) * title_step + style.gap if title_rows else -style.padding[0])
    heading_height = style.heading_size + style.gap if style.heading_size else 0
    heights = [sum(style.padding) + heading_height + cell_height + _label_height(row, style) for row in rows]
    bottom = style.margin - (0 if style.has_rules else style.padding[1])
    canvas = Image.new("RGB", (width, top + sum(heights) + bottom), WHITE)
    draw = ImageDraw.Draw(canvas)
    _write(draw, (style.margin, style.margin), title_rows, INK, style.title_size, title_step, title_anchor)
    for number, (row, height) in enumerate(zip(rows, heights, strict=True)):
        if style.has_rules and (number or style.heading_size):
            draw.line((style.margin, top, width - style.margin, top), LINE)
        y = top + style.padding[0]
        if style.heading_size:
            _write(draw, (style.margin, y), [row.heading], INK, style.heading_size)
        y += heading_height
        if style.text_width:
            _draw_text(draw, row, (style.margin, y), (style.text_width - style.gap, cell_height))
        if row.lead is not None:
            _draw_tile(canvas, draw, (left, y), row.lead, style)
        for column, tile in enumerate(row.tiles):
            _draw_tile(canvas, draw, (first + column * (cell_width + style.gap), y), tile, style)
        top += height
    return canvas


def save_picture(image: Image.Image, path: str | Path) -> None:
    """Save a picture in the format that its name asks for, whole or not at all."""
    with whole_file(path) as unfinished:
        image.save(unfinished, Image.registered_extensions()[Path(path).suffix.lower()], quality=QUALITY)


def wrap_text(text: str, font: Font, width: int, max_lines: int) -> list[str]:
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


def _label_height(row: TileRow, style: SheetStyle) -> int:
    """Return the height below the tiles of a row."""
    most_boxes = max((len(tile.boxes) for tile in row.tiles), default=0)
    return style.label_line * (max(style.label_lines, 1) + most_boxes)


def _draw_text(draw: ImageDraw.ImageDraw, row: TileRow, corner: tuple[int, int], size: tuple[int, int]) -> None:
    """Write the note and the text of a row into the column beside its tiles."""
    (left, top), (width, height) = corner, size
    if row.note:
        _write(draw, (left, top + 2), [row.note], GREY, NOTE_SIZE)
        top, height = top + TEXT_LINE, height - TEXT_LINE
    lines = wrap_text(row.text, ImageFont.load_default(TEXT_SIZE), width, height // TEXT_LINE)
    _write(draw, (left, top), lines, INK, TEXT_SIZE, TEXT_LINE, "la")


def _draw_tile(
    canvas: Image.Image, draw: ImageDraw.ImageDraw, corner: tuple[int, int], tile: Tile, style: SheetStyle
) -> None:
    """Paste a picture with its frame and boxes, and write what stands below it."""
    (left, top), (width, height) = corner, style.cell_size
    if style.frame:
        draw.rectangle((left, top, left + width - 1, top + height - 1), fill=tile.frame)
    picture = ImageOps.contain(to_rgb(tile.image), style.tile_size, Image.Resampling.BICUBIC)
    _draw_boxes(picture, [box for _, box in tile.boxes])
    picture = ImageOps.pad(picture, style.tile_size, Image.Resampling.BICUBIC, color=PLACEHOLDER)
    canvas.paste(picture, (left + style.frame, top + style.frame))
    font, below = ImageFont.load_default(style.label_size), top + height
    if not style.label_lines:
        where, room = (left + (width - 1) // 2, below + style.label_line // 2), width + style.gap
        label = tile.label if font.getlength(tile.label) <= room else wrap_text(tile.label, font, room, 1)[0]
        draw.text(where, label, tile.colour, font, anchor="mm")
        return
    labels = wrap_text(tile.label, font, width, style.label_lines)
    _write(draw, (left, below + 3), labels, tile.colour, style.label_size, style.label_line)
    for number, (text, _) in enumerate(tile.boxes):
        colour = BOX_COLOURS[number % len(BOX_COLOURS)]
        line = below + 3 + (style.label_lines + number) * style.label_line
        _write(draw, (left, line), wrap_text(text, font, width, 1), colour, style.label_size)


def _draw_boxes(picture: Image.Image, boxes: Sequence[Sequence[float]]) -> None:
    """Outline boxes `[cx, cy, w, h]` in 0..1 on a picture."""
    draw = ImageDraw.Draw(picture)
    for number, (cx, cy, width, height) in enumerate(boxes):
        left, top = (cx - width / 2) * picture.width, (cy - height / 2) * picture.height
        right, bottom = (cx + width / 2) * picture.width - 1, (cy + height / 2) * picture.height - 1
        edges = (left, top, max(left, right), max(top, bottom))
        draw.rectangle(edges, outline=BOX_COLOURS[number % len(BOX_COLOURS)], width=2)


def _write(
    draw: ImageDraw.ImageDraw,
    corner: tuple[int, int],
    lines: Sequence[str],
    colour: Colour,
    size: int,
    step: int = 0,
    anchor: str = "lt",
) -> None:
    """Write lines of text, each `step` pixels below the one before."""
    font = ImageFont.load_default(size)
    for number, line in enumerate(lines):
        draw.text((corner[0], corner[1] + number * step), line, colour, font, anchor=anchor)
