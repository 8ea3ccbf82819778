"""Pictures of what is looked at: heatmaps of the patch grid laid over the image, one tile a word."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from PIL import Image

from images_mra import to_rgb
from mra.common.drawing import GREY, HEATMAPS, INK, Tile, TileRow, draw_sheet


# Low to high; dark to light as well, so that it can be read in grey and by the colour-blind.
RAMP = ((38, 30, 84), (134, 38, 112), (220, 74, 66), (250, 160, 40), (255, 240, 150))
LEAST_OPACITY, MOST_OPACITY = 0.30, 0.72
FAINT_OPACITY = 0.35  # of the tile of a word that stands for nothing visible
TILE_HEIGHT = HEATMAPS.tile_size[1]


@dataclass(frozen=True)
class HeatmapTile:
    """One small picture: its label, a (rows, columns) heatmap in 0..1 or None for the bare image, and whether it is faint."""

    label: str
    heatmap: torch.Tensor | None = None
    is_faint: bool = False


def overlay_heatmap(image: Image.Image, heatmap: torch.Tensor, is_faint: bool = False) -> Image.Image:
    """Lay a heatmap over an image of any size.

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


def draw_tiles(image: Image.Image, title: str, tiles: Sequence[HeatmapTile], columns: int = 6) -> Image.Image:
    """Draw one overlay a tile, labelled, in rows under a title.

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
