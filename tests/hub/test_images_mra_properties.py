"""Any bytes near a picture: a picture of bounded size or one sentence, and what is stored reads as the original does."""

import io
import struct
import zlib

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from PIL import Image

import images_mra
from images_mra import TooManyPixels, read_picture, storable_picture
from tests.helpers.properties import examples


WIDTH, HEIGHT = 37, 53
LIMIT = 2**16  # in place of MAX_PIXELS, so that pictures at the limit take no time


def encoded(format: str, mode: str = "RGB", **options) -> bytes:
    values = np.random.default_rng(0).integers(0, 256, (HEIGHT, WIDTH, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(values).convert(mode).save(file, format, **options)
    return file.getvalue()


def exif(orientation: int) -> Image.Exif:
    block = Image.Exif()
    block[274], block[305] = orientation, "software"
    return block


FILES = {
    "png": encoded("PNG", exif=exif(6)),
    "png of a palette": encoded("PNG", "P", transparency=3),
    "png of 16 bits": encoded("PNG", "I;16"),
    "jpeg": encoded("JPEG", exif=exif(8)),
    "progressive jpeg": encoded("JPEG", progressive=True),
    "webp": encoded("WEBP", exif=exif(3)),
    "lossless webp": encoded("WEBP", "RGBA", lossless=True),
    "gif": encoded("GIF"),
    "bmp": encoded("BMP"),
    "tiff": encoded("TIFF", tiffinfo={274: 6}),
    "packed tiff": encoded("TIFF", compression="tiff_lzw"),
    "tiff of floats": encoded("TIFF", "F"),
}


def with_checksums(content: bytes) -> bytes:
    """Return a PNG with the checksum of its header corrected."""
    if not content.startswith(b"\x89PNG") or len(content) < 33:
        return content
    return content[:29] + struct.pack(">I", zlib.crc32(content[12:29])) + content[33:]


@st.composite
def mutations(draw):
    """A file with a few bytes changed, cut, put in, left out, or with another size in its header."""
    content = bytearray(FILES[draw(st.sampled_from(list(FILES)))])
    for _ in range(draw(st.integers(1, 3))):
        way = draw(st.sampled_from(["flip", "flip", "cut", "insert", "drop", "size", "size"]))
        # Most of what can go wrong stands in the first bytes, and in the last of a TIFF.
        size = len(content)
        place = draw(st.integers(0, 120) | st.integers(0, max(size - 1, 0)) | st.integers(size - 200, size - 1))
        place = min(max(place, 0), max(len(content) - 1, 0))
        if way == "flip" and content:
            content[place] = draw(st.sampled_from([0, 1, 255, content[place] ^ 1 << draw(st.integers(0, 7))]))
        elif way == "cut":
            del content[place:]
        elif way == "insert":
            content[place:place] = draw(st.binary(min_size=1, max_size=8))
        elif way == "drop":
            del content[place : place + draw(st.integers(1, 8))]
        else:
            side, new = (
                draw(st.sampled_from([WIDTH, HEIGHT])),
                draw(st.sampled_from([0, 1, 500, 5000, 13_300, 60_000, 65_535, 2**31 - 1])),
            )
            order = draw(st.sampled_from(["<H", ">H", "<I", ">I"]))
            if order[1] == "I" or new < 2**16:
                content = content.replace(struct.pack(order, side), struct.pack(order, new))
    return with_checksums(bytes(content)) if draw(st.booleans()) else bytes(content)


@pytest.fixture
def small_limit(monkeypatch):
    monkeypatch.setattr(images_mra, "MAX_PIXELS", LIMIT)


@pytest.mark.parametrize("name", FILES)
def test_the_files_themselves_are_read(name):
    assert read_picture(FILES[name]).size in ((WIDTH, HEIGHT), (HEIGHT, WIDTH))


@pytest.mark.filterwarnings("ignore")
@examples(150)
@given(content=mutations())
def test_any_bytes_are_a_picture_or_refused(small_limit, content):
    try:
        picture = read_picture(content)
    except ValueError as error:
        assert type(error) is ValueError and str(error) and "Bomb" not in str(error)
    else:
        assert picture.mode == "RGB" and 0 < picture.width * picture.height <= LIMIT
    try:
        stored = storable_picture(content)
    except OSError:
        return
    assert read_picture(stored).mode == "RGB"


def png(width: int, height: int) -> bytes:
    """A PNG of one bit a pixel, without pixels."""

    def chunk(kind, payload):
        return struct.pack(">I", len(payload)) + kind + payload + struct.pack(">I", zlib.crc32(kind + payload))

    header = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", b"") + chunk(b"IEND", b"")


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("size", [(13_300, 13_300), (8193, 8192), (60_000, 60_000), (2**31 - 1, 1)])
def test_a_picture_of_too_many_pixels_is_refused_before_it_is_decoded(monkeypatch, size):
    monkeypatch.setattr(Image.Image, "load", lambda self: pytest.fail("decoded"))
    for source in (png(*size), {"bytes": png(*size), "path": None}):
        with pytest.raises(ValueError, match=r"^the image is too large: it has .*67,108,864.*: make it smaller$"):
            read_picture(source)
    with pytest.raises(TooManyPixels, match="make it smaller"):
        storable_picture(png(*size))


@examples(60)
@given(
    values=st.lists(
        st.floats(width=32) | st.sampled_from([float("nan"), float("inf"), -float("inf"), 0, 1, 255]),
        min_size=1,
        max_size=9,
    )
)
@example(values=[float("nan")])
@example(values=[3.4e38, -3.4e38])
def test_floats_become_greys_in_their_order(values):
    array = np.array([values], np.float32)
    grey = np.asarray(images_mra.to_rgb(Image.fromarray(array)))[0, :, 0].astype(int)
    finite = np.isfinite(array[0])
    order = array[0][finite].argsort(kind="stable")
    assert (np.diff(grey[finite][order]) >= 0).all()


@pytest.mark.parametrize("values", [np.arange(3 * 2**11 * 1024, dtype=np.int32).reshape(-1, 2**11)])
def test_a_deep_picture_is_scaled_as_a_whole(values):
    grey = np.asarray(images_mra.to_rgb(Image.fromarray(values)))[..., 0]
    assert (grey == np.floor(values / values.max() * 255 + 0.5)).all()
