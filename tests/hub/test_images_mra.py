"""Pictures of any depth, with any metadata: what is read, and what preparation stores for `datasets.Image`."""

import io
import struct

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
        (np.array([[0, 200, 100, 255]], np.int32), [0, 200, 100, 255]),
        (np.array([[0, 257, 25700, 65535]], np.int32), [0, 1, 100, 255]),
        (np.array([[0.0, 0.2, 1.0, 0.4]], np.float32), [0, 51, 255, 102]),
        (np.array([[0.0, 200.0, 100.0, 255.0]], np.float32), [0, 200, 100, 255]),
        (np.array([[-1000.0, 1000.0, 0.0, np.nan]], np.float32), [0, 255, 128, 0]),
    ],
    ids=["16-bit", "32-bit of 8", "32-bit of 16", "floats to 1", "floats to 255", "floats of any range"],
)
def test_deep_pictures_keep_their_range(values, expected):
    image = Image.fromarray(values)
    assert np.asarray(to_rgb(image))[0].tolist() == [[value] * 3 for value in expected]
    file = io.BytesIO()
    image.save(file, "TIFF")
    stored = datasets.Image().decode_example({"bytes": storable_picture(file.getvalue()), "path": None})
    assert np.asarray(stored.convert("RGB"))[0, :, 0].tolist() == expected


def test_transparency_is_dropped():
    image = Image.fromarray(np.array([[[10, 20, 30, 0], [40, 50, 60, 255]]], np.uint8))
    assert np.asarray(to_rgb(image))[0].tolist() == [[10, 20, 30], [40, 50, 60]]


@pytest.mark.parametrize("content", [b"", b"<html></html>", b"\xff\xd8\xff\xe0 cut"])
def test_what_is_not_a_picture_is_an_error(content):
    with pytest.raises(ValueError):
        read_picture(content)
    with pytest.raises(OSError):
        storable_picture(content)
