"""Region geometry: from relative boxes to pixels, through crop, flip and resize, to a mask over image tokens."""

import math
import random
from dataclasses import dataclass

import torch


CROP_PADDING = 10  # pixels by which a crop may extend beyond each side of the image
WHOLE_IMAGE = (0.5, 0.5, 1.0, 1.0)

Box = tuple[float, float, float, float]


@dataclass(frozen=True)
class Crop:
    """Crop in pixels of the unpadded image; parts outside the image are black."""

    left: int
    top: int
    right: int
    bottom: int

    @property
    def width(self) -> int:
        """Width in pixels."""
        return self.right - self.left

    @property
    def height(self) -> int:
        """Height in pixels."""
        return self.bottom - self.top


def box_to_pixels(box: Box, width: int, height: int) -> Box:
    """Convert a relative box to pixels, rounded as published: centre and sides are truncated to whole pixels, then clipped.

    Args:
        box: centre x, centre y, width and height, each relative to the image (0 to 1).
        width: width of the image, in pixels.
        height: height of the image, in pixels.

    Returns:
        Left, top, width and height in pixels, inside the image, with sides of at least half a pixel.

    Raises:
        ValueError: if the box has no area or its centre lies outside the image.
    """
    if len(box) != 4:
        raise ValueError(f"`box` must be (centre x, centre y, width, height), got {len(box)} numbers: {tuple(box)}")
    if not (0 <= box[0] <= 1 and 0 <= box[1] <= 1 and box[2] > 0 and box[3] > 0):
        raise ValueError(
            "`box` must be (centre x, centre y, width, height) relative to the image, with its centre inside 0..1 and "
            f"positive sides, got {tuple(box)}; divide pixel boxes by the image's width and height"
        )
    sides = []
    for center, side, limit in ((box[0], box[2], width), (box[1], box[3], height)):
        # The published code fails on a box thinner than a pixel; here it gets one pixel.
        pixels = max(int(side * limit), 1)
        start = max(int(center * limit) - 0.5 * pixels, 0)
        sides.append((start, min(pixels, limit - start)))
    (left, box_width), (top, box_height) = sides
    return left, top, box_width, box_height


def crop_ranges(box: Box, width: int, height: int) -> list[tuple[int, int]]:
    """Return the inclusive ranges of the edges of crops that contain the box.

    Args:
        box: left, top, width and height in pixels.
        width: width of the image, in pixels.
        height: height of the image, in pixels.

    Returns:
        Ranges for left, top, right and bottom, in that order.
    """
    left, top, box_width, box_height = box
    return [
        (-CROP_PADDING, math.floor(left)),
        (-CROP_PADDING, math.floor(top)),
        (math.ceil(left + box_width), width + CROP_PADDING),
        (math.ceil(top + box_height), height + CROP_PADDING),
    ]


def draw_crop(box: Box, width: int, height: int, rng: random.Random) -> Crop:
    """Draw a crop that contains the box; see [`crop_ranges`]."""
    return Crop(*(rng.randint(low, high) for low, high in crop_ranges(box, width, height)))


def move_box(box: Box, crop: Crop, flip: bool, height: int, width: int) -> Box:
    """Transform a box like its image: crop, mirror, resize, in this order.

    Args:
        box: left, top, width and height in pixels of the original image.
        crop: the part to keep.
        flip: whether to mirror the crop left to right.
        height: height of the resized image, in pixels.
        width: width of the resized image, in pixels.

    Returns:
        Left, top, width and height in pixels of the resized image.
    """
    left, top, box_width, box_height = box
    left, top = left - crop.left, top - crop.top
    if flip:
        left = crop.width - left - box_width
    scale_x, scale_y = width / crop.width, height / crop.height
    return scale_x * left, scale_y * top, scale_x * box_width, scale_y * box_height


def check_grid(image_size: tuple[int, int], grid_size: tuple[int, int]) -> None:
    """Check that a grid of image tokens fits an image.

    Args:
        image_size: height and width of the model's input, in pixels.
        grid_size: rows and columns of the image tokens.

    Raises:
        ValueError: if the grid does not divide the image.
    """
    (image_height, image_width), (rows, columns) = image_size, grid_size
    if image_height % rows or image_width % columns:
        raise ValueError(
            f"`grid_size` {tuple(grid_size)} does not divide `image_size` {tuple(image_size)} (height, width); "
            "pass `config.vision_config.grid_size` of the model and a processor of the same image size"
        )


def region_attention_mask(box: Box, image_size: tuple[int, int], grid_size: tuple[int, int]) -> torch.Tensor:
    """Mark the image tokens that a box overlaps: 1 inside, 0 outside, and 1 for the global token at index 0.

    Args:
        box: left, top, width and height in pixels of the model's input.
        image_size: height and width of the model's input, in pixels.
        grid_size: rows and columns of the image tokens.

    Returns:
        `(1 + rows * columns,)` int64; at least one token is inside. The published mask is inverted (0 inside), except for
        the global token, which is 1 in both.

    Raises:
        ValueError: if the grid does not divide the image.
    """
    check_grid(image_size, grid_size)
    (image_height, image_width), (rows, columns) = image_size, grid_size
    left, top, box_width, box_height = box
    first_column, last_column = _token_range(left, box_width, image_width // columns, columns)
    first_row, last_row = _token_range(top, box_height, image_height // rows, rows)
    inside = torch.zeros(rows, columns, dtype=torch.int64)
    inside[first_row:last_row, first_column:last_column] = 1
    return torch.cat([torch.ones(1, dtype=torch.int64), inside.flatten()])


def _token_range(start: float, length: float, stride: int, tokens: int) -> tuple[int, int]:
    first = min(math.floor(start / stride), tokens - 1)
    return first, max(first + 1, min(math.ceil((start + length) / stride), tokens))
