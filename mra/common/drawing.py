"""Pictures made of labelled image tiles: one layout engine, and the picture of ranked results."""

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
# Colours of boxes in order, chosen to be distinct for colour-blind readers too.
BOX_COLOURS = (
    (0, 114, 178),
    (213, 94, 0),
    (0, 158, 115),
    (204, 121, 167),
    (230, 159, 0),
    (86, 180, 233),
    (90, 90, 90),
)

QUALITY = 90  # of lossy formats
TEXT_SIZE = 16
TEXT_LINE = 22
NOTE_SIZE = 15


@dataclass(frozen=True)
class SheetStyle:
    """Measures of a sheet of tiles, in pixels.

    Attributes:
        tile_size: width and height into which images are fitted.
        frame: width of the coloured frame around a tile.
        gap: space between tiles.
        margin: space around everything.
        padding: space above and below each row.
        has_rules: whether to draw a line between rows, and above a row with a heading.
        text_width: width of the text column to the left of the tiles; 0 for none.
        title_size: font size of the title.
        title_lines: most lines of the title; with 1, the sheet is at least as wide as the title.
        heading_size: font size of a row's heading; 0 if rows have none.
        label_size: font size of the label below a tile.
        label_line: height of a line below a tile.
        label_lines: most lines of a left-aligned label; 0 for one centred line.
        min_width: smallest width of the sheet.
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
        """Width and height of a framed tile."""
        return self.tile_size[0] + 2 * self.frame, self.tile_size[1] + 2 * self.frame


# Crops of people are about 1:2.
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
    """One image of a sheet.

    Attributes:
        image: an image of any size and mode.
        label: text below the image.
        colour: colour of the label.
        frame: colour of the frame.
        boxes: (text, `[cx, cy, w, h]` in 0..1) of each box; the text is drawn below the label in the box's colour.
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
        tiles: tiles from left to right.
        heading: text above the tiles.
        text: wrapped text to the left of the tiles.
        note: short grey line above the text.
        lead: tile drawn before the others, set apart from them.
    """

    tiles: Sequence[Tile]
    heading: str = ""
    text: str = ""
    note: str = ""
    lead: Tile | None = None


@dataclass
class RankedQuery:
    """A query and its ranked images, one row of a picture.

    Attributes:
        text: the query.
        images: its ranked gallery images, best first.
        scores: one score per image.
        is_match: whether each image shows the person searched for.
        own_image: image that the query describes, or None.
        caption: short grey line above the query, for example its identity; may be empty.
    """

    text: str
    images: Sequence[Image.Image]
    scores: Sequence[float]
    is_match: Sequence[bool]
    own_image: Image.Image | None = None
    caption: str = ""


def draw_rankings(queries: Sequence[RankedQuery], title: str = "") -> Image.Image:
    """Draw ranked results: query text (and its own image, if given), then the ranked images with rank and score.

    Right images have a green frame, wrong ones a red frame.

    Raises:
        ValueError: if there are no queries, or a query's images, scores and matches differ in number.
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
        rows: rows from top to bottom, of any lengths.
        style: measures of the sheet.
        title: text above all rows.

    Raises:
        ValueError: if no row has a tile or a text.
    """
    if not any(row.tiles or row.text for row in rows):
        raise ValueError("rows is empty: expected at least one image to draw")
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
    """Save a picture atomically in the format of its suffix."""
    with whole_file(path) as unfinished:
        image.save(unfinished, Image.registered_extensions()[Path(path).suffix.lower()], quality=QUALITY)


def wrap_text(text: str, font: Font, width: int, max_lines: int) -> list[str]:
    """Break a text into lines of at most `width` pixels; text beyond `max_lines` is replaced by an ellipsis."""
    lines, line = [], ""
    for word in text.split():
        longer = f"{line} {word}".strip()
        if font.getlength(longer) <= width:
            line = longer
            continue
        if line:
            lines.append(line)
        line = word
        while font.getlength(line) > width:  # break a word wider than the column anywhere
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
    """Write the note and the text of a row in the column beside its tiles."""
    (left, top), (width, height) = corner, size
    if row.note:
        _write(draw, (left, top + 2), [row.note], GREY, NOTE_SIZE)
        top, height = top + TEXT_LINE, height - TEXT_LINE
    lines = wrap_text(row.text, ImageFont.load_default(TEXT_SIZE), width, height // TEXT_LINE)
    _write(draw, (left, top), lines, INK, TEXT_SIZE, TEXT_LINE, "la")


def _draw_tile(
    canvas: Image.Image, draw: ImageDraw.ImageDraw, corner: tuple[int, int], tile: Tile, style: SheetStyle
) -> None:
    """Paste an image with its frame and boxes, and write the lines below it."""
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
    """Outline boxes `[cx, cy, w, h]` in 0..1 on an image."""
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
    """Write lines of text `step` pixels apart."""
    font = ImageFont.load_default(size)
    for number, line in enumerate(lines):
        draw.text((corner[0], corner[1] + number * step), line, colour, font, anchor=anchor)
