"""Opening of stored images without decoding, and decoding of large JPEG files at a reduced size."""

import math

from PIL import Image

from images_mra import decode_picture as decode
from images_mra import open_picture, upright_size
from mra.training.regions import Crop


__all__ = ["REDUCTIONS", "crop_reduced", "decode", "largest_reduction", "open_image", "upright_size"]

REDUCTIONS = (8, 4, 2)  # scales at which libjpeg decodes faster


def open_image(stored: dict | None) -> Image.Image:
    """Open an image of a prepared dataset without decoding it.

    Args:
        stored: `bytes`, or the `path` of a file if they are None, as from `datasets.Image(decode=False)`.

    Raises:
        ValueError: if the row has no image.
        OSError: if it is not an image.
    """
    if stored is None:
        raise ValueError("it has no image")
    return open_picture(stored["path"] if stored["bytes"] is None else stored["bytes"])


def largest_reduction(crop: Crop, size: tuple[int, int], height: int, width: int) -> int:
    """Return the largest reduction that keeps the crop at least as large as its target, and its edges in place.

    Args:
        crop: the crop in pixels of the full-size image.
        size: width and height of the full-size image. If the crop extends beyond the right or lower edge, the reduction
            must divide it, because rounding would shift the edge.
        height: height of the result, in pixels.
        width: width of the result, in pixels.
    """
    overhangs = [full for full, edge in zip(size, (crop.right, crop.bottom), strict=True) if edge > full]
    for reduction in REDUCTIONS:
        is_large = crop.width >= reduction * width and crop.height >= reduction * height
        if is_large and not any(full % reduction for full in overhangs):
            return reduction
    return 1


def crop_reduced(image: Image.Image, crop: Crop, reduction: int, height: int, width: int) -> Image.Image:
    """Crop and resize an image decoded at a reduced size; crop edges may fall between pixels.

    Args:
        image: the decoded image.
        crop: the crop in pixels of the full-size image; parts outside the image are black.
        reduction: the reduction at which the image was decoded.
        height: height of the result, in pixels.
        width: width of the result, in pixels.
    """
    left, top, right, bottom = (edge / reduction for edge in (crop.left, crop.top, crop.right, crop.bottom))
    outer_left, outer_top = math.floor(left), math.floor(top)
    outer = image.crop((outer_left, outer_top, math.ceil(right), math.ceil(bottom)))
    box = left - outer_left, top - outer_top, right - outer_left, bottom - outer_top
    return outer.resize((width, height), Image.Resampling.BICUBIC, box=box)
