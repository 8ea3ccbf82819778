"""Stored images: opened for their size, and decoded later, a large JPEG at a fraction of it."""

import io
import math

from PIL import ExifTags, Image, ImageOps

from mra_training.regions import Crop


REDUCTIONS = (8, 4, 2)  # what libjpeg decodes for less
_ORIENTATION = ExifTags.Base.Orientation
_SIDEWAYS = (5, 6, 7, 8)  # orientations that exchange height and width


def open_image(stored: dict) -> Image.Image:
    """
    Opens an image of a prepared set without decoding it.

    Args:
        stored: `bytes`, or the `path` of a file where they are None, as `datasets.Image(decode=False)` gives them.

    Raises:
        OSError: if it is no image.
    """
    return Image.open(stored["path"] if stored["bytes"] is None else io.BytesIO(stored["bytes"]))


def upright_size(image: Image.Image) -> tuple[int, int]:
    """Width and height of an opened image once it is turned as its EXIF orientation says."""
    sideways = image.getexif().get(_ORIENTATION) in _SIDEWAYS
    return (image.height, image.width) if sideways else image.size


def decode(image: Image.Image, reduction: int = 1) -> Image.Image:
    """
    Decodes an opened image: upright, RGB.

    Args:
        image: from [`open_image`], not decoded yet.
        reduction: 1, or one of `REDUCTIONS` to decode a JPEG at that part of its width and height, rounded up. Other
            formats, and JPEGs that cannot be decoded so, come whole: compare the result's size.

    Raises:
        OSError: if it is broken.
    """
    if reduction > 1:
        image.draft("RGB", (image.width // reduction, image.height // reduction))
    image.load()
    if image.getexif().get(_ORIENTATION, 1) != 1:
        image = ImageOps.exif_transpose(image)
    return image if image.mode == "RGB" else image.convert("RGB")


def largest_reduction(crop: Crop, size: tuple[int, int], height: int, width: int) -> int:
    """
    The largest reduction that leaves the crop at least as large as what it is resized to, and its edges in place.

    Args:
        crop: in pixels of the whole size.
        size: width and height of the whole image. Where the crop reaches over its right or lower edge, the reduction
            must divide it: the last pixel of a rounded size would push the black outside away.
        height: of the result, in pixels.
        width: of the result, in pixels.
    """
    overhangs = [full for full, edge in zip(size, (crop.right, crop.bottom), strict=True) if edge > full]
    for reduction in REDUCTIONS:
        is_large = crop.width >= reduction * width and crop.height >= reduction * height
        if is_large and not any(full % reduction for full in overhangs):
            return reduction
    return 1


def crop_reduced(image: Image.Image, crop: Crop, reduction: int, height: int, width: int) -> Image.Image:
    """
    Crops and resizes an image that was decoded at a reduced size; its edges may fall between pixels there.

    Args:
        image: from [`decode`].
        crop: in pixels of the whole size, black where it reaches outside.
        reduction: what the image was decoded at.
        height: of the result, in pixels.
        width: of the result, in pixels.
    """
    left, top, right, bottom = (edge / reduction for edge in (crop.left, crop.top, crop.right, crop.bottom))
    outer_left, outer_top = math.floor(left), math.floor(top)
    outer = image.crop((outer_left, outer_top, math.ceil(right), math.ceil(bottom)))
    box = left - outer_left, top - outer_top, right - outer_left, bottom - outer_top
    return outer.resize((width, height), Image.Resampling.BICUBIC, box=box)
