"""mra/common/drawing.py: sizes, frames and text of the picture."""

import pytest
from PIL import Image, ImageFont

from mra.common.drawing import (
    BOX_COLOURS,
    CONTACT_SHEET,
    GREEN,
    RANKINGS,
    RED,
    WHITE,
    RankedQuery,
    SheetStyle,
    Tile,
    TileRow,
    draw_rankings,
    draw_sheet,
    save_picture,
    wrap_text,
)


BLUE = (0, 0, 255)
CROP_SIZE, CELL, FRAME = RANKINGS.tile_size, RANKINGS.cell_size, RANKINGS.frame
GAP, MARGIN, LABEL_HEIGHT, TEXT_WIDTH = RANKINGS.gap, RANKINGS.margin, RANKINGS.label_line, RANKINGS.text_width


def make_query(matches, **options):
    crop = Image.new("RGB", CROP_SIZE, BLUE)
    return RankedQuery("a person in red", [crop] * len(matches), [0.5] * len(matches), matches, **options)


def test_size_and_frames():
    picture = draw_rankings([make_query([True, False, False]), make_query([False, True, False])])
    left = MARGIN + TEXT_WIDTH + GAP
    row_height = CELL[1] + LABEL_HEIGHT + 2 * GAP
    assert picture.size == (left + 3 * (CELL[0] + GAP) - GAP + MARGIN, MARGIN + 2 * row_height + MARGIN - GAP)
    for row, colours in enumerate([(GREEN, RED, RED), (RED, GREEN, RED)]):
        for column, colour in enumerate(colours):
            x, y = left + column * (CELL[0] + GAP), MARGIN + row * row_height
            corners = [(x, y), (x + CELL[0] - 1, y), (x, y + CELL[1] - 1), (x + FRAME - 1, y + CELL[1] // 2)]
            assert [picture.getpixel(corner) for corner in corners] == [colour] * 4
            assert picture.getpixel((x - 1, y)) == WHITE
            assert picture.getpixel((x + CELL[0] // 2, y + CELL[1] // 2)) == BLUE
            label = picture.crop((x, y + CELL[1], x + CELL[0], y + CELL[1] + LABEL_HEIGHT))
            assert label.getcolors(10**4) is not None and len(label.getcolors(10**4)) > 1  # something is written


def test_own_image_and_title_take_room():
    plain = draw_rankings([make_query([True])])
    full = draw_rankings([make_query([True], own_image=Image.new("L", (30, 30)), caption="identity 3")], "A title")
    assert full.width == plain.width + CELL[0] + 2 * GAP
    assert full.height > plain.height


def test_rows_of_different_length():
    assert (
        draw_rankings([make_query([True] * 3), make_query([True])]).size
        == draw_rankings([make_query([True] * 3)] * 2).size
    )


def test_text_is_wrapped_to_the_column():
    font = ImageFont.load_default(16)
    text = "a very long caption with many words " * 4 + "x" * 200
    lines = wrap_text(text, font, 200, max_lines=100)
    assert all(font.getlength(line) <= 200 for line in lines)
    assert "".join(lines).replace(" ", "") == text.replace(" ", "")
    short = wrap_text(text, font, 200, max_lines=3)
    assert len(short) == 3 and short[-1].endswith("…") and font.getlength(short[-1]) <= 200


def test_arguments_are_checked():
    with pytest.raises(ValueError, match="queries is empty"):
        draw_rankings([])
    query = make_query([True, False])
    query.scores = [0.5]
    with pytest.raises(ValueError, match="query 0 must have as many images as scores and matches, got 2, 1 and 2"):
        draw_rankings([query])


def test_boxes_are_drawn_where_they_are():
    tile = Tile(Image.new("RGB", (64, 128)), "label", boxes=[("a hat", [0.5, 0.25, 0.5, 0.25])])
    sheet = draw_sheet([TileRow([tile], "row")], CONTACT_SHEET)
    places = [(x, y) for x in range(sheet.width) for y in range(sheet.height)]
    pixels = {place for place in places if sheet.getpixel(place) == BOX_COLOURS[0]}
    black = [place for place in places if sheet.getpixel(place) == (0, 0, 0)]
    left, top = min(x for x, _ in black), min(y for _, y in black)
    assert {(left + 32, top + 32), (left + 95, top + 32), (left + 32, top + 95), (left + 95, top + 95)} <= pixels
    with pytest.raises(ValueError, match="rows is empty"):
        draw_sheet([TileRow([], "row")], CONTACT_SHEET)


def test_a_title_of_one_line_widens_the_sheet():
    tile = Tile(Image.new("RGB", (10, 20)))
    title = "a title much wider than one tile"
    wide, wrapped = (draw_sheet([TileRow([tile])], SheetStyle((20, 40), title_lines=lines), title) for lines in (1, 9))
    assert wide.width > ImageFont.load_default(16).getlength(title) > wrapped.width
    assert wrapped.height > wide.height


@pytest.mark.parametrize("name", ["a.png", "a.JPG", "a.webp", "a.tif", "a.bmp", "a.gif"])
def test_pictures_are_saved_in_the_format_of_their_name(tmp_path, name):
    save_picture(Image.new("RGB", (8, 8), BLUE), tmp_path / name)
    with Image.open(tmp_path / name) as image:
        assert image.size == (8, 8) and Image.registered_extensions()[f".{name[2:].lower()}"] == image.format
    assert [path.name for path in tmp_path.iterdir()] == [name]
