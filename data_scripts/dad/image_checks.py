"""Cheap measures of an image (size, contrast, colour, sharpness, detail) and perceptual hashes for near-duplicates."""

import io
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from PIL import Image
from scipy.fft import dctn
from scipy.ndimage import laplace

from images_mra import read_picture


MEASURED_SIZE = (64, 128)  # width, height; makes sharpness and detail comparable between resolutions
HASH_BITS = 256
_HASH_IMAGE = 64  # side in pixels of the image that is hashed
_COLOUR_GRID = (4, 8)  # columns, rows of mean colours
_JPEG_QUALITY = 90
_LUMA = np.array([0.299, 0.587, 0.114])


@dataclass(frozen=True)
class ImageMeasures:
    """Measures of one image for the cheap checks.

    Attributes:
        width, height: pixels.
        brightness: mean luma, 0 to 255.
        contrast: standard deviation of the luma; near 0 for a flat image.
        colour: variance of the differences between the channels R - G, G - B and B - R, averaged; near 0 for a greyscale
            or evenly tinted image.
        sharpness: variance of the Laplacian of the luma at `MEASURED_SIZE`; low for a blurred image.
        detail: size in bytes of the image as a JPEG of quality 90 at `MEASURED_SIZE`, comparable between images.
    """

    width: int
    height: int
    brightness: float
    contrast: float
    colour: float
    sharpness: float
    detail: int


MEASURES = ("brightness", "contrast", "colour", "sharpness", "detail")


def measure_image(image: Image.Image) -> dict[str, float]:
    """Measure an RGB image; see [`ImageMeasures`] for the keys and their units."""
    small = image.resize(MEASURED_SIZE, Image.Resampling.BICUBIC)
    pixels = np.asarray(small, dtype=np.float64)
    luma = pixels @ _LUMA
    differences = pixels - np.roll(pixels, -1, axis=-1)
    buffer = io.BytesIO()
    small.save(buffer, "JPEG", quality=_JPEG_QUALITY)
    measures = ImageMeasures(
        width=image.width,
        height=image.height,
        brightness=round(float(luma.mean()), 3),
        contrast=round(float(luma.std()), 3),
        colour=round(float(differences.var(axis=(0, 1)).mean()), 3),
        sharpness=round(float(laplace(luma, mode="nearest").var()), 3),
        detail=buffer.tell(),
    )
    return asdict(measures)


def load_image(source: Any) -> Image.Image:
    """Load an RGB image from a PIL image, a row with an "image", or a path, fully decoded.

    Raises:
        OSError: if the file is missing.
        ValueError: if it does not decode.
    """
    return read_picture(source["image"] if isinstance(source, dict) else source)


# Near-duplicates


def perceptual_hash(image: Image.Image) -> str:
    """Hash an image's appearance: 256 signs of its luma's low frequencies, then a grid of mean colours.

    The signs are those of the 16 x 16 lowest cosine coefficients relative to their median, and change little when an image is
    scaled, re-encoded or slightly blurred. The colours distinguish images that differ only in hue. The signs equal those of
    `imagehash.phash(image, 16)` except for one or two bits, because it includes the mean brightness; it has no colours.

    Returns:
        Hexadecimal digits: 64 of the signs, 192 of 8 x 4 colours.
    """
    luma = image.convert("L").resize((_HASH_IMAGE, _HASH_IMAGE), Image.Resampling.BICUBIC)
    side = int(HASH_BITS**0.5)
    frequencies = np.asarray(dctn(np.asarray(luma, dtype=np.float64), norm="ortho"))
    lowest = frequencies[:side, :side].flatten()
    lowest[0] = 0.0  # the sign of the mean brightness carries no information
    signs = np.packbits(lowest > np.median(lowest)).tobytes()
    return signs.hex() + image.resize(_COLOUR_GRID, Image.Resampling.BOX).tobytes().hex()


def find_near_duplicates(hashes: Sequence[str], max_bits: int = 15, max_colour: float = 24.0) -> dict[int, int]:
    """Find the images that look like an earlier image that is not itself a near-duplicate.

    Two hashes that differ in at most `max_bits` bits agree in at least one of `max_bits + 1` bands, so comparing images that
    share a band finds every such pair without comparing all pairs.

    Args:
        hashes: results of [`perceptual_hash`]; the first of several look-alikes is kept.
        max_bits: number of the 256 sign bits that may differ.
        max_colour: largest difference between mean colours, 0 to 255, averaged over the grid.

    Returns:
        Position of each near-duplicate -> position of the image that it looks like.

    Raises:
        ValueError: if `max_bits` leaves bands of less than 8 bits.
    """
    if not 0 <= max_bits < HASH_BITS // 8:
        raise ValueError(f"`max_bits` must be from 0 to {HASH_BITS // 8 - 1}, got {max_bits}")
    if len(hashes) < 2:
        return {}
    digits = HASH_BITS // 4
    raw = np.frombuffer(bytes.fromhex("".join(hashes)), dtype=np.uint8).reshape(len(hashes), -1)
    signs, colours = raw[:, : digits // 2], raw[:, digits // 2 :].astype(np.int16)
    words = np.ascontiguousarray(signs).view(np.uint64)
    pairs = np.concatenate([_alike_in_band(band, words, max_bits) for band in _bands(signs, max_bits + 1)])
    pairs = np.unique(pairs, axis=0)
    differences = np.abs(colours[pairs[:, 0]] - colours[pairs[:, 1]]).mean(axis=1)
    duplicates: dict[int, int] = {}
    for later, earlier in pairs[
        differences <= max_colour
    ].tolist():  # ascending, so earlier images are already decided
        if later not in duplicates and earlier not in duplicates:
            duplicates[later] = earlier
    return duplicates


def _bands(signs: np.ndarray, number: int) -> list[np.ndarray]:
    """Cut hashes into bands of interleaved bits, so that no band holds only the lowest frequencies, which vary least."""
    bits = np.unpackbits(signs, axis=1)
    bands = []
    for band in range(number):
        packed = np.packbits(bits[:, band::number], axis=1)
        bands.append(np.ascontiguousarray(packed).view(f"V{packed.shape[1]}").ravel())
    return bands


def _alike_in_band(band: np.ndarray, words: np.ndarray, max_bits: int) -> np.ndarray:
    """Return the pairs (later, earlier) that share a band and differ in at most `max_bits` bits of all."""
    _, groups, sizes = np.unique(band, return_inverse=True, return_counts=True)
    shared = np.flatnonzero(sizes[groups] > 1)
    order = shared[np.argsort(groups[shared], kind="stable")]
    starts = np.flatnonzero(np.diff(groups[order]))
    found = [np.empty((0, 2), dtype=np.int64)]
    for group in np.split(order, starts + 1):
        for place in range(1, len(group)):
            distance = np.bitwise_count(words[group[:place]] ^ words[group[place]]).sum(axis=1)
            alike = group[:place][distance <= max_bits]
            found.append(np.stack([np.full_like(alike, group[place]), alike], axis=1))
    return np.concatenate(found)
