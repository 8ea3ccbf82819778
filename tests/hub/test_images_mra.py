"""Pictures of any depth, with any metadata: what is read, and what preparation stores for `datasets.Image`."""

import io
import struct
import zlib

import datasets
import numpy as np
import pytest
from PIL import Image, ImageOps

from images_mra import open_picture, read_picture, storable_picture, to_rgb, upright_size


ORIENTATION, RESOLUTION_UNIT, SHORT, ASCII, RATIONAL, FLOAT = 274, 296, 3, 2, 5, 11
# (tag, type, count, value of four bytes): each entry is fine for a parser and stops one of Pillow's writers or readers
STRANGE = {
    "resolution unit as a float": [(ORIENTATION, SHORT, 1, b"\6\0\0\0"), (RESOLUTION_UNIT, FLOAT, 1, b"\0\0\0\x40")],
    "offset behind the end": [(ORIENTATION, SHORT, 1, b"\6\0\0\0"), (282, RATIONAL, 1, b"\xff\xff\0\0")],
    "orientation as text": [(ORIENTATION, ASCII, 2, b"6\0\0\0")],
    "orientation of nothing": [(ORIENTATION, SHORT, 1, b"\x63\0\0\0")],
}


@pytest.fixture(scope="module")
def pixels():
    return np.random.default_rng(0).integers(0, 256, (24, 16, 3), dtype=np.uint8)


def jpeg(pixels, exif=b""):
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "JPEG", quality=95, exif=exif)
    return file.getvalue()


def exif(entries):
    """Bytes of an EXIF block in the order of Intel with the given entries."""
    listed = b"".join(struct.pack("<HHI", tag, kind, count) + value for tag, kind, count, value in entries)
    return b"Exif\0\0II*\0\x08\0\0\0" + struct.pack("<H", len(entries)) + listed + bytes(4)


@pytest.mark.parametrize("name", STRANGE)
def test_strange_metadata_stop_nothing(pixels, name):
    content = jpeg(pixels, exif(STRANGE[name]))
    is_turned = STRANGE[name][0][1] == SHORT and STRANGE[name][0][3][0] == 6
    plain = Image.open(io.BytesIO(jpeg(pixels))).convert("RGB")
    expected = np.asarray(plain.transpose(Image.Transpose.ROTATE_270) if is_turned else plain)
    np.testing.assert_array_equal(np.asarray(read_picture(content)), expected)
    assert upright_size(open_picture(content)) == (expected.shape[1], expected.shape[0])

    stored = storable_picture(content)
    decoded = datasets.Image().decode_example({"bytes": stored, "path": None})
    np.testing.assert_array_equal(np.asarray(decoded.convert("RGB")), expected)
    np.testing.assert_array_equal(np.asarray(read_picture(stored)), expected)


def test_a_float_resolution_unit_is_the_fault_that_it_was():
    """Pillow and `datasets.Image` still fail on these bytes; where they no longer do, the repair has nothing to do."""
    content = jpeg(np.zeros((8, 8, 3), np.uint8), exif(STRANGE["resolution unit as a float"]))
    with pytest.raises(struct.error):
        ImageOps.exif_transpose(Image.open(io.BytesIO(content)))
    assert storable_picture(content) != content


def test_ordinary_files_are_stored_as_they_are(pixels):
    for content in (jpeg(pixels), jpeg(pixels, exif([(ORIENTATION, SHORT, 1, b"\6\0\0\0")]))):
        assert storable_picture(content) == content


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        (np.array([[0, 257, 25700, 65535]], np.uint16), [0, 1, 100, 255]),
        (np.array([[12850, 25700]], np.uint16), [50, 100]),
        (np.array([[100, 200]], np.uint16), [0, 1]),
        (np.array([[0, 200, 100, 255]], np.int32), [0, 200, 100, 255]),
        (np.array([[0, 257, 25700, 65535]], np.int32), [0, 1, 100, 255]),
        (np.array([[0.0, 0.2, 1.0, 0.4]], np.float32), [0, 51, 255, 102]),
        (np.array([[0.0, 200.0, 100.0, 255.0]], np.float32), [0, 200, 100, 255]),
        (np.array([[-1000.0, 1000.0, 0.0, np.nan]], np.float32), [0, 255, 128, 0]),
    ],
    ids=[
        "16-bit",
        "16-bit of middle greys",
        "16-bit in the dark",
        "32-bit of 8",
        "32-bit of 16",
        "floats to 1",
        "floats to 255",
        "floats of any range",
    ],
)
def test_deep_pictures_keep_their_range(values, expected):
    image = Image.fromarray(values)
    assert np.asarray(to_rgb(image))[0].tolist() == [[value] * 3 for value in expected]
    file = io.BytesIO()
    image.save(file, "TIFF")
    stored = datasets.Image().decode_example({"bytes": storable_picture(file.getvalue()), "path": None})
    assert np.asarray(stored.convert("RGB"))[0, :, 0].tolist() == expected


def test_grey_of_12_bits_has_a_range_of_its_own():
    first, second, third, fourth = 0, 4095, 1606, 16
    packed = b"".join(
        bytes([left >> 4, (left & 15) << 4 | right >> 8, right & 255])
        for left, right in ((first, second), (third, fourth))
    )
    tags = {256: 4, 257: 1, 258: 12, 259: 1, 262: 1, 273: 8 + 2 + 12 * 9 + 4, 277: 1, 278: 1, 279: len(packed)}
    entries = b"".join(struct.pack("<HHII", tag, SHORT, 1, value) for tag, value in tags.items())
    content = b"II*\0" + struct.pack("<IH", 8, len(tags)) + entries + bytes(4) + packed
    assert np.asarray(read_picture(content))[0, :, 0].tolist() == [0, 255, 100, 1]


@pytest.mark.parametrize(
    ("white", "values", "expected"), [(1000, [100, 1000], [26, 255]), (65535, [100, 200], [0, 1])]
)
def test_a_grey_map_of_more_than_8_bits_keeps_its_range(white, values, expected):
    content = f"P5 2 1 {white}\n".encode() + np.array([values], ">u2").tobytes()
    assert np.asarray(read_picture(content))[0, :, 0].tolist() == expected


def segment(marker: int, payload: bytes) -> bytes:
    """A segment of a JPEG."""
    return struct.pack(">BBH", 0xFF, marker, len(payload) + 2) + payload


def chunk(kind: bytes, payload: bytes) -> bytes:
    """A chunk of a PNG."""
    return struct.pack(">I", len(payload)) + kind + payload + struct.pack(">I", zlib.crc32(kind + payload))


@pytest.mark.parametrize(
    "part", [(0xE0, b"JFIF\0\1"), (0xEE, b"Adobe"), (0xE2, b"ICC_PROFILE\0")], ids=["JFIF", "Adobe", "profile"]
)
def test_segments_that_keep_a_jpeg_from_being_opened_are_left_out(pixels, part):
    plain = jpeg(pixels)
    content = plain[:2] + segment(*part) + plain[2:]
    with pytest.raises(OSError):
        Image.open(io.BytesIO(content))
    expected = np.asarray(read_picture(plain))
    for picture in (content, storable_picture(content)):
        np.testing.assert_array_equal(np.asarray(read_picture(picture)), expected)
    Image.open(io.BytesIO(storable_picture(content))).load()


@pytest.mark.parametrize(
    "part",
    [(b"iCCP", b"x\0\1zz"), (b"zTXt", b"x\0\1zz"), (b"pHYs", b"\0"), (b"gAMA", b"\0"), (b"eXIf", b"XX")],
    ids=lambda part: part[0].decode(),
)
@pytest.mark.parametrize("place", ["before the pixels", "behind the pixels"])
def test_chunks_that_stop_a_reader_of_png_are_left_out(pixels, part, place):
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    plain = file.getvalue()
    cut = 33 if place == "before the pixels" else len(plain) - 12  # behind IHDR, or before IEND
    content = plain[:cut] + chunk(*part) + plain[cut:]
    np.testing.assert_array_equal(np.asarray(read_picture(content)), pixels)
    decoded = datasets.Image().decode_example({"bytes": storable_picture(content), "path": None})
    np.testing.assert_array_equal(np.asarray(decoded.convert("RGB")), pixels)


def test_a_tiff_is_turned_once_whatever_its_other_tags_hold(pixels):
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "TIFF", tiffinfo={ORIENTATION: 6})
    expected = np.asarray(Image.fromarray(pixels).transpose(Image.Transpose.ROTATE_270))
    picture = open_picture(file.getvalue())
    assert upright_size(picture) == (expected.shape[1], expected.shape[0])
    np.testing.assert_array_equal(np.asarray(read_picture(file.getvalue())), expected)


def test_transparency_is_dropped():
    image = Image.fromarray(np.array([[[10, 20, 30, 0], [40, 50, 60, 255]]], np.uint8))
    assert np.asarray(to_rgb(image))[0].tolist() == [[10, 20, 30], [40, 50, 60]]


@pytest.mark.parametrize("content", [b"", b"<html></html>", b"\xff\xd8\xff\xe0 cut"])
def test_what_is_not_a_picture_is_an_error(content):
    with pytest.raises(ValueError):
        read_picture(content)
    with pytest.raises(OSError):
        storable_picture(content)
