"""Reader of pictures of any file format, depth and metadata as upright 8-bit RGB, the same for every caller."""

import io
import numbers
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import numpy as np
from PIL import ExifTags, Image, ImageOps


# Most pixels of a picture: 200 MB as RGB, enough for the 61 million of a full-frame camera; a small file can claim any number.
MAX_PIXELS = 2**26

_ORIENTATION = ExifTags.Base.Orientation
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_PIXELS_AT_ONCE = 2**20  # of a deep picture on its way to 8 bits
_SIDEWAYS = (5, 6, 7, 8)  # orientations that exchange height and width

_TIFF_BITS = 258  # tag: BitsPerSample
_TIFF_POINTERS = (ExifTags.IFD.Exif, ExifTags.IFD.GPSInfo, ExifTags.IFD.Interop)
_TIFF_UNUSED = (65000, 1, 1, 0)  # tag for private use, type, count and value of a byte
# Tags that say where the pixels are and what they mean, JPEG in TIFF included.
_TIFF_PIXELS = {
    *range(254, 260),
    262,
    266,
    273,
    *range(277, 280),
    284,
    317,
    *range(320, 326),
    332,
    *range(338, 342),
    347,
}
_TIFF_PIXELS |= {*range(512, 522), *range(529, 533)}
_SHORT = 3  # type of a TIFF tag

_PNG_START = b"\x89PNG\r\n\x1a\n"
# Chunks that Pillow parses besides pixels and frames.
_PNG_METADATA = (b"tEXt", b"zTXt", b"iTXt", b"eXIf", b"iCCP", b"gAMA", b"cHRM", b"sRGB", b"pHYs", b"tRNS")
_PNG_PIXELS = (b"IHDR", b"PLTE", b"IDAT", b"IEND")

_JPEG_START = b"\xff\xd8"
_JPEG_SCAN = 0xDA
_JPEG_COMMENT = 0xFE
_JPEG_LEAST = {0xE0: 14, 0xEE: 12}  # least bytes of JFIF and Adobe segments, which say how colours are stored


# ---------------------------------------------------------------- opening and decoding


class TooManyPixels(OSError):
    """A picture of more than [`MAX_PIXELS`] pixels, which is not decoded."""


def open_picture(source: bytes | str | Path) -> Image.Image:
    """Open a picture without decoding its pixels; metadata that Pillow cannot read is left out.

    Args:
        source: the bytes of an image file, or its path.

    Returns:
        The opened picture, for [`upright_size`] and [`decode_picture`].

    Raises:
        OSError: if the file cannot be read, is not an image (`PIL.UnidentifiedImageError`) or has more than [`MAX_PIXELS`]
            pixels ([`TooManyPixels`]).
    """
    content = source if isinstance(source, bytes) else Path(source).read_bytes()
    content = _metadata_before_pixels(content)
    try:
        image = _open_bytes(content)
        if image.format == "TIFF":
            _read_pointers(image)
        return image
    except Exception as error:  # Pillow's metadata parsers raise errors of many kinds, struct.error and KeyError too
        bare = without_metadata(content)
        try:
            if bare != content:
                return _open_bytes(bare)
        except Exception:  # the metadata is not to blame: the first error says what is wrong
            pass
        raise _as_os_error(error) from error


def _open_bytes(content: bytes) -> Image.Image:
    image = Image.open(io.BytesIO(content))
    _refuse_large(image)
    return image


def _refuse_large(image: Image.Image) -> None:
    if image.width * image.height > MAX_PIXELS:
        raise TooManyPixels(
            f"it has {image.width:,} x {image.height:,} pixels, expected at most {MAX_PIXELS:,}: make it smaller"
        )


def read_orientation(image: Image.Image) -> int:
    """Return the EXIF orientation of an opened picture, 1 to 8; 1 where it is missing or invalid.

    A decoded TIFF has orientation 1, because Pillow turns it upright on decoding.
    """
    try:
        value = image.getexif().get(_ORIENTATION)
    except Exception:  # Pillow raises errors of many kinds for broken EXIF: the picture stays as it is stored
        return 1
    return int(float(value)) if isinstance(value, numbers.Real) and value in _TURNS else 1


def upright_size(image: Image.Image) -> tuple[int, int]:
    """Return width and height of an opened picture after it is turned by its EXIF orientation."""
    if image.format == "TIFF":  # Pillow gives the turned size from the start
        return image.size
    return (image.height, image.width) if read_orientation(image) in _SIDEWAYS else image.size


def decode_picture(image: Image.Image, reduction: int = 1) -> Image.Image:
    """Decode an opened picture as upright 8-bit RGB (see [`to_rgb`]).

    Args:
        image: from [`open_picture`], not decoded yet, or any Pillow image.
        reduction: 1, or 2, 4 or 8 to decode a JPEG at that fraction of its width and height, rounded up. Other formats,
            and JPEGs that do not support it, are decoded at full size: compare the size of the result.

    Raises:
        OSError: if its pixels are broken, too many ([`TooManyPixels`]) or cannot be converted to RGB.
    """
    try:
        _refuse_large(image)
        if reduction > 1:
            image.draft("RGB", (image.width // reduction, image.height // reduction))
        image.load()
        rgb = to_rgb(image)
    except Exception as error:  # Pillow's decoders raise errors of many kinds, SyntaxError and struct.error too
        raise _as_os_error(error) from error
    turn = _TURNS.get(read_orientation(image))  # ImageOps.exif_transpose also rewrites the EXIF, which may fail
    return rgb if turn is None else rgb.transpose(turn)


def read_picture(source: bytes | str | Path | dict | Image.Image | None) -> Image.Image:
    """Read a picture as upright 8-bit RGB.

    Args:
        source: the bytes of an image file, its path, a dict of both as from `datasets.Image(decode=False)`, an open image,
            or another object with Pillow's `convert`, which is then called.

    Raises:
        ValueError: if it is not an image, a damaged one or one of more than [`MAX_PIXELS`] pixels.
        OSError: if a path cannot be read.
    """
    if isinstance(source, dict):
        source = source["path"] if source["bytes"] is None else source["bytes"]
    if source is None:
        raise ValueError("there is no image")
    if isinstance(source, (str, Path)):
        source = Path(source).read_bytes()
    if isinstance(source, bytes) and not source:
        raise ValueError("the file is empty")
    if not isinstance(source, (bytes, Image.Image)):
        if not hasattr(source, "convert"):
            raise ValueError(f"expected an image, its bytes or its path, got {type(source).__name__}")
        return cast(Any, source).convert("RGB")
    try:
        return decode_picture(source if isinstance(source, Image.Image) else open_picture(source))
    except Image.UnidentifiedImageError:
        raise ValueError("not an image that Pillow can read") from None
    except TooManyPixels as error:
        raise ValueError(f"the image is too large: {error}") from None
    except OSError as error:
        raise ValueError(f"the image is damaged ({error})") from None


def _as_os_error(error: Exception) -> OSError:
    """Return an error of Pillow as the kind that callers expect for a broken picture."""
    if isinstance(error, Image.DecompressionBombError):  # refused by Pillow, at a higher number
        return TooManyPixels(f"it has more than {MAX_PIXELS:,} pixels: make it smaller")
    return error if isinstance(error, OSError) else OSError(f"{type(error).__name__}: {error}")


# ---------------------------------------------------------------- colours


def to_rgb(image: Image.Image) -> Image.Image:
    """Convert a picture of any mode to 8-bit RGB.

    - 16-bit grey is divided by 257 (TIFF of fewer bits by its own range), where Pillow would clip it to white.
    - Floats in 0..1 are multiplied by 255; 32-bit integers and floats in 0..255 stay; integers in 0..65535 count as 16
      bits; any other range is stretched from its least to its largest value. NaN and negative infinity become the least
      value, infinity the largest.
    - Transparency is dropped and the colours below it are kept, as in the published code.
    - Every other mode goes through Pillow's `convert("RGB")`.

    Args:
        image: any Pillow image; it is decoded if needed.

    Returns:
        The converted picture, or the picture itself if it is already RGB.
    """
    if image.mode == "RGB":
        return image
    if image.mode in ("I", "F") or image.mode.startswith("I;16"):
        return Image.fromarray(_to_grey(image)).convert("RGB")
    if image.mode in ("La", "RGBa"):  # premultiplied alpha, which Pillow undoes only in a conversion to RGBA or LA
        image = image.convert(f"{image.mode[:-1]}A")
    if "transparency" in image.info:  # Pillow would warn, or fail at a colour that the palette does not have
        image = image.copy()
        del image.info["transparency"]
    return image.convert("RGB")


def _to_grey(image: Image.Image) -> np.ndarray:
    """Scale a picture of one deep channel to `(height, width)` uint8."""
    white = _white_level(image)  # before decoding, which may drop the file's tags
    values = np.asarray(image)
    finite = values[np.isfinite(values)] if values.dtype.kind == "f" else values
    least, largest = (float(finite.min()), float(finite.max())) if finite.size else (0.0, 0.0)
    if white is None and image.mode == "F" and least >= 0 and largest <= 1:
        white = 1.0
    elif white is None and least >= 0 and largest <= 255:
        white = 255.0
    elif white is None and image.mode == "I" and least >= 0 and largest <= 65535:
        white = 65535.0
    black = 0.0
    if white is None:
        black, white = least, max(largest - least, np.finfo(np.float64).tiny)
    grey = np.empty(values.shape, np.uint8)
    rows = max(_PIXELS_AT_ONCE // values.shape[1], 1)
    for start in range(0, len(values), rows):  # in parts, because float64 takes eight times the memory
        part = values[start : start + rows].astype(np.float64)
        part = np.nan_to_num(part, nan=least, posinf=largest, neginf=least)
        grey[start : start + rows] = np.floor(np.clip((part - black) / white, 0, 1) * 255 + 0.5)
    return grey


def _white_level(image: Image.Image) -> float | None:
    """Return the value of white that the file format defines, or None."""
    if image.mode.startswith("I;16"):
        bits = getattr(image, "tag_v2", {}).get(_TIFF_BITS, (16,))[0]
        return 2.0**bits - 1
    # Pillow stretches a grey map (PGM) of more than 8 bits to 16.
    return 65535.0 if image.mode == "I" and image.format == "PPM" else None


# ---------------------------------------------------------------- metadata


def without_metadata(content: bytes, orientation: int = 1) -> bytes:
    """Return a JPEG, PNG or TIFF without metadata, its pixels untouched; other contents are returned unchanged.

    Args:
        content: bytes of an image file.
        orientation: written into a JPEG as its only EXIF; 1 for none.
    """
    if content.startswith(_JPEG_START):
        return _bare_jpeg(content, orientation)
    if content.startswith(_PNG_START):
        kept = [chunk for kind, chunk in _png_chunks(content) if kind in _PNG_PIXELS]
        return content[: len(_PNG_START)] + b"".join(kept)
    if content[:4] in (b"II*\0", b"MM\0*"):
        return _bare_tiff(content)
    return content


def storable_picture(content: bytes) -> bytes:
    """Return bytes of a picture to store, from which every reader gets the same pixels.

    The bytes are returned unchanged if `datasets.Image` and `convert("RGB")` give what [`read_picture`] gives. Where metadata
    prevents that, a JPEG loses everything but its orientation, and another format becomes an upright PNG. A picture of more
    than 8 bits becomes an 8-bit PNG.

    Raises:
        OSError: if it is not an image or its pixels are broken.
    """
    # A JPEG decoded at an eighth of its size is read to its last byte at little cost.
    try:
        image = _open_bytes(content)
        is_plain = _reads_as_everywhere(image)
    except Exception:  # of any kind, from metadata or pixels: the next lines find out which
        is_plain = False
    if is_plain:
        return content
    opened = open_picture(content)
    if content.startswith(_JPEG_START):
        decode_picture(opened, 8)
        return without_metadata(content, read_orientation(opened))
    buffer = io.BytesIO()
    rgb = decode_picture(opened)
    (rgb.convert("L") if opened.mode in ("I", "F") or opened.mode.startswith("I;16") else rgb).save(buffer, "PNG")
    return buffer.getvalue()


def _reads_as_everywhere(image: Image.Image) -> bool:
    """Decode a picture as `datasets.Image` does; return whether `convert("RGB")` then equals [`read_picture`]."""
    image.draft(None, (1, 1))
    image.load()
    if image.getexif().get(_ORIENTATION) not in (None, 1):
        ImageOps.exif_transpose(image)
    if "transparency" in image.info:
        image.convert("RGB")
    return image.mode not in ("I", "F", "La", "RGBa") and not image.mode.startswith("I;16")


def _bare_jpeg(content: bytes, orientation: int) -> bytes:
    parts = [_JPEG_START]
    if orientation != 1:
        exif = Image.Exif()
        exif[_ORIENTATION] = orientation
        payload = exif.tobytes()
        parts.append(struct.pack(">BBH", 0xFF, 0xE1, len(payload) + 2) + payload)
    position = len(_JPEG_START)
    while position + 4 <= len(content) and content[position] == 0xFF:
        marker = content[position + 1]
        if marker == 0xFF:  # a fill byte
            position += 1
            continue
        if marker == _JPEG_SCAN:
            break
        length = struct.unpack_from(">H", content, position + 2)[0]
        end = position + 2 + length
        is_metadata = 0xE0 <= marker <= 0xEF or marker == _JPEG_COMMENT
        if not is_metadata or length - 2 >= _JPEG_LEAST.get(marker, len(content)):
            parts.append(content[position:end])
        position = end
    return b"".join([*parts, content[position:]])


def _png_chunks(content: bytes) -> Iterator[tuple[bytes, bytes]]:
    """Yield kind and bytes of the chunks of a PNG; a truncated chunk comes last, unchanged."""
    position = len(_PNG_START)
    while position + 8 <= len(content):
        length, kind = struct.unpack_from(">I4s", content, position)
        yield kind, content[position : position + 12 + length]
        position += 12 + length


def _metadata_before_pixels(content: bytes) -> bytes:
    """Move the metadata of a PNG before its pixels: after them, Pillow reads it only on decoding, and fails there."""
    if not content.startswith(_PNG_START):
        return content
    tail = content.rfind(b"IDAT")
    if not any(kind in content[tail:] for kind in _PNG_METADATA):
        return content
    chunks = list(_png_chunks(content))
    first = next((place for place, (kind, _) in enumerate(chunks) if kind == b"IDAT"), len(chunks))
    moved = [chunk for kind, chunk in chunks[first:] if kind in _PNG_METADATA]
    stay = [chunk for kind, chunk in chunks[first:] if kind not in _PNG_METADATA]
    return b"".join([content[: len(_PNG_START)], *(chunk for _, chunk in chunks[:first]), *moved, *stay])


def _read_pointers(image: Image.Image) -> None:
    """Read the TIFF tags that Pillow otherwise reads on decoding, when it is too late to leave them out."""
    exif = image.getexif()
    for pointer in _TIFF_POINTERS:
        if pointer in exif:
            exif.get_ifd(pointer)


def _bare_tiff(content: bytes) -> bytes:
    """Blank all TIFF tags but those of the pixels: EXIF, GPS, XMP, profiles and an orientation that is not a number."""
    order = "<" if content[:2] == b"II" else ">"
    patched = bytearray(content)
    try:
        (start,) = struct.unpack_from(f"{order}I", content, 4)
        (count,) = struct.unpack_from(f"{order}H", content, start)
        for entry in range(start + 2, start + 2 + 12 * count, 12):
            tag, kind, number = struct.unpack_from(f"{order}HHI", content, entry)
            is_turn = tag == _ORIENTATION and (kind, number) == (_SHORT, 1)
            if tag not in _TIFF_PIXELS and not is_turn:
                struct.pack_into(f"{order}HHII", patched, entry, *_TIFF_UNUSED)
    except struct.error:  # truncated: there are no tags to blank
        return content
    return bytes(patched)


__all__ = [
    "MAX_PIXELS",
    "TooManyPixels",
    "decode_picture",
    "open_picture",
    "read_orientation",
    "read_picture",
    "storable_picture",
    "to_rgb",
    "upright_size",
    "without_metadata",
]
