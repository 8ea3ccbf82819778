"""mra/common/drawing.py: sizes, frames and text of the picture."""

import pytest
from PIL import Image

from mra.common.drawing import (
    CROP_SIZE,
    FRAME,
    GAP,
    GREEN,
    LABEL_HEIGHT,
    MARGIN,
    RED,
    TEXT_WIDTH,
    WHITE,
    RankedQuery,
    _font,
    draw_rankings,
    wrap_text,
)


BLUE = (0, 0, 255)
CELL = (CROP_SIZE[0] + 2 * FRAME, CROP_SIZE[1] + 2 * FRAME)


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
    font = _font(16)
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
