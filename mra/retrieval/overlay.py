"""Attention pictures: heatmaps of the patch grid over the image, one tile per word."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from PIL import Image

from images_mra import to_rgb
from mra.common.drawing import GREY, HEATMAPS, INK, Tile, TileRow, draw_sheet


# Low to high is also dark to light, so that the map works in greyscale and for colour-blind readers.
RAMP = ((38, 30, 84), (134, 38, 112), (220, 74, 66), (250, 160, 40), (255, 240, 150))
LEAST_OPACITY, MOST_OPACITY = 0.30, 0.72
FAINT_OPACITY = 0.35  # of the tile of a stop word
TILE_HEIGHT = HEATMAPS.tile_size[1]


@dataclass(frozen=True)
class HeatmapTile:
    """One tile: its label, a heatmap `(rows, columns)` in 0..1 (None for the bare image), and whether it is faint."""

    label: str
    heatmap: torch.Tensor | None = None
    is_faint: bool = False


def overlay_heatmap(image: Image.Image, heatmap: torch.Tensor, is_faint: bool = False) -> Image.Image:
    """Lay a heatmap over an image of any size.

    Args:
        image: the whole image.
        heatmap: `(rows, columns)` in 0..1; other values are clipped.
        is_faint: whether to draw the heatmap nearly transparent.
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


def draw_tiles(image: Image.Image, title: str, tiles: Sequence[HeatmapTile], columns: int = 6) -> Image.Image:
    """Draw labelled overlays in rows under a title.

    Args:
        image: an image of any size; its aspect ratio is kept.
        title: wrapped over at most four lines.
        tiles: tiles in reading order.
        columns: tiles per row.

    Raises:
        ValueError: if there are no tiles or no columns.
    """
    if not tiles or columns < 1:
        raise ValueError(f"expected at least one tile and one column, got {len(tiles)} and {columns}")
    tile_width = max(TILE_HEIGHT // 4, min(2 * TILE_HEIGHT, round(TILE_HEIGHT * image.width / image.height)))
    small = to_rgb(image).resize((tile_width, TILE_HEIGHT), Image.Resampling.LANCZOS)
    drawn = [
        Tile(
            small if tile.heatmap is None else overlay_heatmap(small, tile.heatmap, tile.is_faint),
            tile.label,
            GREY if tile.is_faint else INK,
        )
        for tile in tiles
    ]
    rows = [TileRow(drawn[start : start + columns]) for start in range(0, len(drawn), columns)]
    return draw_sheet(rows, replace(HEATMAPS, tile_size=small.size), title)
