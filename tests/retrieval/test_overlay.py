"""mra/retrieval/overlay.py: colours of a heatmap, sizes and labels of the tiles."""

import pytest
import torch
from PIL import Image, ImageChops

from mra.common.drawing import HEATMAPS
from mra.retrieval.overlay import (
    LEAST_OPACITY,
    MOST_OPACITY,
    RAMP,
    TILE_HEIGHT,
    HeatmapTile,
    draw_tiles,
    overlay_heatmap,
)


GAP, MARGIN, LABEL_HEIGHT = HEATMAPS.gap, HEATMAPS.margin, HEATMAPS.label_line
GREY = (100, 100, 100)


def mixed(colour, opacity):
    return tuple(round(old * (1 - opacity) + new * opacity) for old, new in zip(GREY, colour, strict=True))


def test_colours_follow_the_ramp():
    image = Image.new("RGB", (40, 80), GREY)
    cold, hot = overlay_heatmap(image, torch.zeros(4, 2)), overlay_heatmap(image, torch.full((4, 2), 7.0))
    assert cold.getcolors() == [(3200, mixed(RAMP[0], LEAST_OPACITY))]
    assert hot.getcolors() == [(3200, mixed(RAMP[-1], MOST_OPACITY))]
    faint = overlay_heatmap(image, torch.ones(4, 2), is_faint=True)
    assert faint.getpixel((0, 0)) == mixed(RAMP[-1], MOST_OPACITY * 0.35)


def test_the_patch_lies_where_the_grid_says():
    heatmap = torch.zeros(8, 4)
    heatmap[6, 3] = 1  # lower right
    warm = overlay_heatmap(Image.new("RGB", (64, 128), GREY), heatmap).convert("L")
    assert warm.getpixel((56, 104)) > warm.getpixel((8, 104)) + 40
    assert warm.getpixel((56, 104)) > warm.getpixel((56, 24)) + 40


def test_tiles_are_laid_out_in_rows():
    image = Image.new("RGB", (50, 100), GREY)
    tiles = [
        HeatmapTile("image"),
        HeatmapTile("red", torch.ones(2, 1)),
        HeatmapTile("a very long word that cannot fit", torch.zeros(2, 1), True),
    ]
    picture = draw_tiles(image, "A title", tiles, columns=2)
    row = TILE_HEIGHT + LABEL_HEIGHT + GAP
    one_row = draw_tiles(image, "A title", tiles, columns=3)
    assert picture.height - one_row.height == row
    top = picture.height - MARGIN + GAP - 2 * row
    width = TILE_HEIGHT // 2
    assert picture.getpixel((MARGIN, top)) == GREY
    assert picture.getpixel((MARGIN + width + GAP, top)) == mixed(RAMP[-1], MOST_OPACITY)
    assert picture.getpixel((MARGIN - 1, top)) == (255, 255, 255)
    labels = picture.crop((0, top + TILE_HEIGHT, picture.width, top + TILE_HEIGHT + LABEL_HEIGHT))
    assert ImageChops.invert(labels.convert("L")).getbbox() is not None


@pytest.mark.parametrize("size", [(10, 400), (400, 10)])
def test_extreme_proportions_stay_in_bounds(size):
    assert (
        draw_tiles(Image.new("RGB", size), "", [HeatmapTile("image")] * 2).width
        <= 2 * MARGIN + 2 * (2 * TILE_HEIGHT) + GAP
    )


def test_arguments_are_checked():
    with pytest.raises(ValueError, match="expected at least one tile and one column, got 0 and 6"):
        draw_tiles(Image.new("RGB", (5, 5)), "", [])
