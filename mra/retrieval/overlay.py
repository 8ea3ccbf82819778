"""Pictures of what is looked at: heatmaps of the patch grid laid over the image, one tile a word."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

from images_mra import to_rgb
from mra.common.drawing import (
    GAP,
    GREY,
    INK,
    LABEL_HEIGHT,
    LABEL_SIZE,
    LINE_HEIGHT,
    MARGIN,
    TEXT_SIZE,
    WHITE,
    wrap_text,
)


# Low to high; dark to light as well, so that it can be read in grey and by the colour-blind.
RAMP = ((38, 30, 84), (134, 38, 112), (220, 74, 66), (250, 160, 40), (255, 240, 150))
LEAST_OPACITY, MOST_OPACITY = 0.30, 0.72
FAINT_OPACITY = 0.35  # of the tile of a word that stands for nothing visible
TILE_HEIGHT = 208  # pixels
MOST_LINES = 4  # of the caption above the tiles


@dataclass(frozen=True)
class Tile:
    """One small picture: its label, a (rows, columns) heatmap in 0..1 or None for the bare image, and whether it is faint."""

    label: str
    heatmap: torch.Tensor | None = None
    is_faint: bool = False


def overlay_heatmap(image: Image.Image, heatmap: torch.Tensor, is_faint: bool = False) -> Image.Image:
    """
    Lays a heatmap over an image of any size.

    Args:
        image: what the heatmap is of, whole.
        heatmap: (rows, columns) in 0..1, values outside are cut.
        is_faint: let the image show through nearly everywhere.
    """
    values = (heatmap.clamp(0, 1).cpu().numpy() * 255).astype(np.uint8)
    heat = np.asarray(Image.fromarray(values).resize(image.size, Image.Resampling.BICUBIC), dtype=np.float32) / 255
    steps = np.linspace(0, 1, len(RAMP))
    colours = np.stack([np.interp(heat, steps, channel) for channel in zip(*RAMP, strict=True)], axis=-1)
    opacity = LEAST_OPACITY + (MOST_OPACITY - LEAST_OPACITY) * heat[..., None]
    if is_faint:
        opacity = opacity * FAINT_OPACITY
    mixed = np.asarray(to_rgb(image), dtype=np.float32) * (1 - opacity) + colours * opacity
    return Image.fromarray(mixed.round().astype(np.uint8))


def draw_tiles(image: Image.Image, title: str, tiles: Sequence[Tile], columns: int = 6) -> Image.Image:
    """
    Draws one overlay a tile, labelled, in rows under a title.

    Args:
        image: of any size; it keeps its proportions.
        title: wrapped over at most four lines.
        tiles: in reading order.
        columns: tiles a row.

    Raises:
        ValueError: if there are no tiles or no columns.
    """
    if not tiles or columns < 1:
        raise ValueError(f"expected at least one tile and one column, got {len(tiles)} and {columns}")
    columns = min(columns, len(tiles))
    tile_width = max(TILE_HEIGHT // 4, min(2 * TILE_HEIGHT, round(TILE_HEIGHT * image.width / image.height)))
    small = to_rgb(image).resize((tile_width, TILE_HEIGHT), Image.Resampling.LANCZOS)
    width = max(2 * MARGIN + columns * (tile_width + GAP) - GAP, 320)
    lines = wrap_text(title, _font(TEXT_SIZE), width - 2 * MARGIN, MOST_LINES)
    top = MARGIN + len(lines) * LINE_HEIGHT + GAP
    row_height = TILE_HEIGHT + LABEL_HEIGHT + GAP
    rows = -(-len(tiles) // columns)
    canvas = Image.new("RGB", (width, top + rows * row_height + MARGIN - GAP), WHITE)
    draw = ImageDraw.Draw(canvas)
    for number, line in enumerate(lines):
        draw.text((MARGIN, MARGIN + number * LINE_HEIGHT), line, INK, _font(TEXT_SIZE), anchor="la")
    for number, tile in enumerate(tiles):
        x = MARGIN + number % columns * (tile_width + GAP)
        y = top + number // columns * row_height
        picture = small if tile.heatmap is None else overlay_heatmap(small, tile.heatmap, tile.is_faint)
        canvas.paste(picture, (x, y))
        (label,) = wrap_text(tile.label, _font(LABEL_SIZE), tile_width + GAP, 1) or [""]
        where = (x + tile_width // 2, y + TILE_HEIGHT + LABEL_HEIGHT // 2)
        draw.text(where, label, GREY if tile.is_faint else INK, _font(LABEL_SIZE), anchor="mm")
    return canvas


def _font(size: int) -> ImageFont.ImageFont:
    return ImageFont.load_default(size)
