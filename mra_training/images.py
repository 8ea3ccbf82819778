"""Stored images: opened for their size, and decoded later, a large JPEG at a fraction of it."""

import io

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


def largest_reduction(crop: Crop, height: int, width: int) -> int:
    """The largest reduction that leaves the crop at least as large as the `height` and `width` to which it is resized."""
    for reduction in REDUCTIONS:
        reduced = reduce_crop(crop, reduction)
        if reduced.width >= width and reduced.height >= height:
            return reduction
    return 1


def reduce_crop(crop: Crop, reduction: int) -> Crop:
    """The crop on an image of a reduced size; its edges are rounded to whole pixels there."""
    return Crop(*(round(edge / reduction) for edge in (crop.left, crop.top, crop.right, crop.bottom)))
