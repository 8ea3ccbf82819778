"""Pictures of any depth, with any metadata: what is read, and what preparation stores for `datasets.Image`."""

import io
import struct
import tracemalloc
import zlib

import datasets
import numpy as np
import pytest
from PIL import ExifTags, Image, ImageOps, TiffTags

from images_mra import (
    TooManyPixels,
    decode_picture,
    open_picture,
    read_orientation,
    read_picture,
    storable_picture,
    to_rgb,
    upright_size,
    without_metadata,
)


ORIENTATION, RESOLUTION_UNIT, SHORT, ASCII, RATIONAL, FLOAT = 274, 296, 3, 2, 5, 11
# (tag, type, count, value of four bytes): each entry is fine for a parser and stops one of Pillow's writers or readers
STRANGE = {
    "resolution unit as a float": [(ORIENTATION, SHORT, 1, b"\6\0\0\0"), (RESOLUTION_UNIT, FLOAT, 1, b"\0\0\0\x40")],
    "resolution unit as a float, upside down": [
        (ORIENTATION, SHORT, 1, b"\3\0\0\0"),
        (RESOLUTION_UNIT, FLOAT, 1, b"\0\0\0\x40"),
    ],
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
    turn = STRANGE[name][0][3][0] if STRANGE[name][0][1] == SHORT else 1
    plain = Image.open(io.BytesIO(jpeg(pixels))).convert("RGB")
    turns = {3: Image.Transpose.ROTATE_180, 6: Image.Transpose.ROTATE_270}
    expected = np.asarray(plain.transpose(turns[turn]) if turn in turns else plain)
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
        (np.array([[0, 300, 65534]], np.int32), [0, 1, 255]),
        (np.array([[0, 35000, 70000]], np.int32), [0, 128, 255]),
        (np.array([[-1, 0, 1]], np.int32), [0, 128, 255]),
        (np.array([[70000, 70001]], np.int32), [0, 255]),
        (np.array([[0.0, 2.0, 254.0]], np.float32), [0, 2, 254]),
        (np.array([[0.0, 300.0, 600.0]], np.float32), [0, 128, 255]),
        (np.array([[0.5, np.inf, -np.inf, 1.0]], np.float32), [128, 255, 128, 255]),
        (np.array([[-7.0, -7.0, np.inf]], np.float32), [0, 0, 0]),
        (np.array([[np.nan, np.inf, -np.inf]], np.float32), [0, 0, 0]),
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
        "32-bit of little more than 8",
        "32-bit of more than 16",
        "32-bit below 0",
        "32-bit of large numbers",
        "floats of little more than 1",
        "floats of more than 255",
        "infinite floats",
        "equal floats",
        "no finite float",
    ],
)
def test_deep_pictures_keep_their_range(values, expected):
    image = Image.fromarray(values)
    assert np.asarray(to_rgb(image))[0].tolist() == [[value] * 3 for value in expected]
    file = io.BytesIO()
    image.save(file, "TIFF")
    stored = datasets.Image().decode_example({"bytes": storable_picture(file.getvalue()), "path": None})
    assert np.asarray(stored.convert("RGB"))[0, :, 0].tolist() == expected


def test_a_deep_picture_takes_little_memory():
    """It is scaled in parts: as a whole, float64 would take eight times the picture's 4 MB, more than once."""
    image = Image.fromarray(np.arange(2**22, dtype=np.int32).reshape(2**9, 2**13))
    tracemalloc.start()
    to_rgb(image)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 64e6


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
    [
        (b"iCCP", b"x\0\1zz"),
        (b"zTXt", b"x\0\1zz"),
        (b"pHYs", b"\0"),
        (b"gAMA", b"\0"),
        (b"eXIf", b"XX"),
        (b"cHRM", b"\0"),
        (b"sRGB", b""),
        (b"tRNS", b"\0"),
    ],
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


@pytest.mark.parametrize("mode", ["RGBa", "La"])
def test_premultiplied_colours_are_divided_by_their_transparency(mode):
    image = Image.new("RGBA", (2, 1), (100, 100, 100, 128)).convert("LA" if mode == "La" else "RGBA").convert(mode)
    assert image.getpixel((0, 0))[0] < 60
    assert all(abs(value - 100) <= 1 for value in np.asarray(to_rgb(image)).ravel().tolist())


def test_rgb_is_taken_as_it_is_and_other_modes_are_converted():
    image = Image.new("RGB", (2, 1), (1, 2, 3))
    assert to_rgb(image) is image
    palette = Image.new("P", (2, 1), 1)
    palette.putpalette([0, 0, 0, 9, 8, 7])
    palette.info["transparency"] = bytes(300)  # of more colours than the palette has
    assert np.asarray(to_rgb(palette)).tolist() == [[[9, 8, 7]] * 2]
    assert len(palette.info["transparency"]) == 300  # the picture itself is left alone


# ---------------------------------------------------------------- sources, sizes and turns


def turned(pixels, orientation, format="JPEG"):
    file, block = io.BytesIO(), Image.Exif()
    block[ORIENTATION] = orientation
    Image.fromarray(pixels).save(file, format, exif=block, **({"quality": 95} if format == "JPEG" else {}))
    return file.getvalue()


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("orientation", range(10))
def test_pictures_are_turned_upright(pixels, orientation, format):
    content = turned(pixels, orientation, format)
    expected = ImageOps.exif_transpose(Image.open(io.BytesIO(content))).convert("RGB")
    opened = open_picture(content)
    assert read_orientation(opened) == (orientation if 1 <= orientation <= 8 else 1)
    assert upright_size(opened) == expected.size
    assert np.array_equal(np.asarray(decode_picture(opened)), np.asarray(expected))
    assert storable_picture(content) == content
    if format == "JPEG":
        bare = without_metadata(content, read_orientation(opened))
        assert np.array_equal(np.asarray(read_picture(bare)), np.asarray(expected))
        assert read_orientation(open_picture(without_metadata(content))) == 1


def test_sources_of_a_picture(pixels, tmp_path):
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    (tmp_path / "a.png").write_bytes(file.getvalue())
    as_bytes, path = {"bytes": file.getvalue(), "path": "elsewhere"}, {"bytes": None, "path": str(tmp_path / "a.png")}
    for source in (
        file.getvalue(),
        str(tmp_path / "a.png"),
        tmp_path / "a.png",
        as_bytes,
        path,
        Image.fromarray(pixels),
    ):
        assert np.array_equal(np.asarray(read_picture(source)), pixels)
    assert open_picture(tmp_path / "a.png").size == open_picture(str(tmp_path / "a.png")).size == (16, 24)

    class Convertible:
        def convert(self, mode):
            return f"a picture of {mode}"

    assert read_picture(Convertible()) == "a picture of RGB"
    for source, words in ((None, "there is no image"), (3, "expected an image, its bytes or its path, got int")):
        with pytest.raises(ValueError, match=words):
            read_picture(source)
    with pytest.raises(FileNotFoundError):
        read_picture(tmp_path / "b.png")


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "the file is empty"),
        (b"<html></html>", "not an image that Pillow can read"),
        ("cut", r"the image is damaged \(.*truncated"),
    ],
)
def test_what_is_wrong_with_a_picture_is_told(pixels, content, words):
    with pytest.raises(ValueError, match=f"^{words}"):
        read_picture(jpeg(pixels)[:-200] if content == "cut" else content)


def test_errors_of_pillow_of_any_kind_are_those_of_a_broken_file(monkeypatch, pixels):
    for error, kind, words in (
        (struct.error("short"), OSError, "error: short"),
        (OSError("broken"), OSError, "broken"),
        (Image.DecompressionBombError("bomb"), TooManyPixels, "it has more than 67,108,864 pixels: make it smaller"),
    ):

        def fail(*args, error=error, **options):
            raise error

        with monkeypatch.context() as patch:
            patch.setattr(Image, "open", fail)
            with pytest.raises(kind, match=f"^{words}$"):
                open_picture(jpeg(pixels))
        image = Image.fromarray(pixels)
        monkeypatch.setattr(image, "load", fail)
        with pytest.raises(kind, match=f"^{words}$"):
            decode_picture(image)


def test_as_many_pixels_as_are_allowed_are_opened():
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", 8192, 8192, 1, 0, 0, 0, 0))
    content = b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", b"") + chunk(b"IEND", b"")
    assert open_picture(content).size == (8192, 8192)
    with pytest.raises(TooManyPixels):
        decode_picture(Image.new("1", (8192, 8193)))


@pytest.mark.parametrize(("reduction", "size"), [(1, (203, 401)), (2, (102, 201)), (4, (51, 101)), (8, (26, 51))])
def test_pictures_are_decoded_at_a_fraction_of_their_size(reduction, size):
    """Rounded up, of a JPEG; the default is the whole picture."""
    content = jpeg(np.zeros((401, 203, 3), np.uint8))
    assert decode_picture(open_picture(content), reduction).size == size
    assert decode_picture(open_picture(content)).size == (203, 401)


# ---------------------------------------------------------------- metadata, part by part


# Of the TIFF tags that Pillow knows by name, those that say where pixels are and what they mean (TIFF 6.0).
PIXEL_TAGS = """
    NewSubfileType SubfileType ImageWidth ImageLength BitsPerSample Compression PhotometricInterpretation FillOrder
    StripOffsets SamplesPerPixel RowsPerStrip StripByteCounts PlanarConfiguration Predictor ColorMap HalftoneHints
    TileWidth TileLength TileOffsets TileByteCounts InkSet ExtraSamples SampleFormat SMinSampleValue SMaxSampleValue
    JPEGTables JPEGProc JPEGInterchangeFormat JPEGInterchangeFormatLength JPEGRestartInterval JPEGLosslessPredictors
    JPEGPointTransforms JPEGQTables JPEGDCTables JPEGACTables YCbCrCoefficients YCbCrSubSampling YCbCrPositioning
    ReferenceBlackWhite
""".split()  # noqa: SIM905
NAMES = {number: info.name for number, info in TiffTags.TAGS_V2.items() if number < 2**16}


def tags_of(content, order):
    (start,) = struct.unpack_from(f"{order}I", content, 4)
    (count,) = struct.unpack_from(f"{order}H", content, start)
    return [struct.unpack_from(f"{order}HHII", content, start + 2 + 12 * entry) for entry in range(count)]


@pytest.mark.parametrize(("order", "mark"), [("<", b"II*\0"), (">", b"MM\0*")])
@pytest.mark.parametrize(("kind", "count"), [(SHORT, 1), (SHORT, 2), (ASCII, 1)])
def test_tags_of_a_tiff_that_are_not_of_its_pixels_are_blanked(order, mark, kind, count):
    """With them the orientation, unless it is not a number."""
    others = {34665, 34853, 40965, 700, 34675, 33723, 37724}  # EXIF, GPS, XMP, profiles, Photoshop
    numbers = sorted({*NAMES, *range(250, 540), *others} - {516})  # 516 is not used
    entries = b"".join(struct.pack(f"{order}HHII", number, kind, count, 7) for number in numbers)
    behind = struct.pack(f"{order}I", 0) + bytes(range(200))
    content = (
        mark + struct.pack(f"{order}I", 20) + bytes(12) + struct.pack(f"{order}H", len(numbers)) + entries + behind
    )
    bare = without_metadata(content)
    assert bare[:22] == content[:22] and bare.endswith(behind)
    kept = {tag: values for tag, *values in tags_of(bare, order) if values == [kind, count, 7]}
    expected = {number for number, name in NAMES.items() if name in PIXEL_TAGS}
    assert len(PIXEL_TAGS) == len(expected) and kept.keys() == expected | (
        {ORIENTATION} if (kind, count) == (SHORT, 1) else set()
    )
    blanked = [entry for entry in tags_of(bare, order) if entry[0] not in kept]
    assert len(blanked) == len(numbers) - len(kept)
    assert all(tag >= 2**15 and values == [1, 1, 0] for tag, *values in blanked)  # a private tag of one byte


def test_a_cut_tiff_has_no_tags_to_blank():
    for content in (b"II*\0", b"II*\0\xff\0\0\0", b"II*\0\x08\0\0\0\2\0" + bytes(13)):
        assert without_metadata(content) == content


@pytest.mark.parametrize(
    "options",
    [{}, {"compression": "tiff_lzw"}, {"compression": "jpeg"}, {"compression": "tiff_lzw", "tiffinfo": {317: 2}}],
    ids=str,
)
@pytest.mark.parametrize("mode", ["RGB", "L", "P", "CMYK", "RGBA", "1"])
def test_pixels_of_a_tiff_stay(pixels, mode, options):
    file = io.BytesIO()
    if mode in ("P", "RGBA", "1") and options not in ({}, {"compression": "tiff_lzw"}):
        pytest.skip("there are no such pictures")
    Image.fromarray(pixels).convert(mode).save(file, "TIFF", software="a name", **options)
    bare = without_metadata(file.getvalue())
    assert bare != file.getvalue() and Image.open(io.BytesIO(bare)).tag_v2.get(305) is None
    assert np.array_equal(np.asarray(read_picture(bare)), np.asarray(read_picture(file.getvalue())))


@pytest.mark.parametrize("pointer", [ExifTags.IFD.Exif, ExifTags.IFD.GPSInfo])
def test_a_tiff_is_opened_without_tags_that_would_stop_it_on_decoding(pointer):
    """Pillow reads what a pointer leads to when it decodes; this one leads to a place before the file."""
    tags = {256: (SHORT, 2), 257: (SHORT, 1), 258: (SHORT, 8), 259: (SHORT, 1), 262: (SHORT, 1), 273: (SHORT, 134)}
    tags |= {277: (SHORT, 1), 278: (SHORT, 1), 279: (SHORT, 2), int(pointer): (9, 2**32 - 1)}
    entries = b"".join(struct.pack("<HHII", tag, kind, 1, value) for tag, (kind, value) in tags.items())
    content = b"II*\0" + struct.pack("<IH", 8, len(tags)) + entries + bytes(4) + bytes([7, 200])
    assert len(content) == 136
    with pytest.raises(ValueError):
        Image.open(io.BytesIO(content)).load()
    opened = open_picture(content)
    assert np.asarray(decode_picture(opened))[0, :, 0].tolist() == [7, 200]


def segments_of(content):
    """Markers and payloads of a JPEG up to its scan."""
    position, found = 2, []
    while content[position + 1] != 0xDA:
        length = struct.unpack_from(">H", content, position + 2)[0]
        found.append((content[position + 1], content[position + 4 : position + 2 + length]))
        position += 2 + length
    return found


def test_segments_of_a_jpeg_that_are_not_of_its_pixels_are_left_out(pixels):
    """All applications' but those that say how colours are stored, where they are whole; and comments."""
    plain = jpeg(pixels)
    adobe, jfif = (0xEE, b"Adobe" + bytes(7)), (0xE0, b"JFIF\0\1\1" + bytes(7))
    others = [(marker, b"x" * 40) for marker in (*range(0xE1, 0xEE), 0xEF, 0xFE)]
    short = [(0xE0, jfif[1][:-1]), (0xEE, adobe[1][:-1])]
    tables = [(marker, payload) for marker, payload in segments_of(plain) if marker != 0xE0]
    scan = plain[plain.index(b"\xff\xda") :]
    added = [jfif, *others, *short, adobe, (0xDF, b"x" * 9), (0xF0, b"x" * 9), (0xFD, b"x" * 9)]
    content = b"\xff\xd8" + b"".join(segment(*part) for part in [*added, *tables]) + scan
    bare = without_metadata(content)
    assert segments_of(bare) == [jfif, adobe, *added[-3:], *tables] and bare.endswith(scan)
    exif_only = without_metadata(content, 6)
    (marker, _), *rest = segments_of(exif_only)
    assert marker == 0xE1 and rest == segments_of(bare)
    assert dict(Image.open(io.BytesIO(without_metadata(plain, 6))).getexif()) == {ORIENTATION: 6}


def test_fill_bytes_between_the_segments_of_a_jpeg(pixels):
    plain = jpeg(pixels)
    comment = segment(0xFE, b"a comment")
    content = plain[:2] + b"\xff\xff\xff" + comment + b"\xff" + comment + plain[2:]
    assert without_metadata(content) == plain
    scan = b"\xff\xd8" + segment(0xDA, b"x" * 4) + b"\xff\0\0\4xx" + segment(0xE1, b"in the pixels")
    assert without_metadata(scan) == scan  # behind its header a scan is no row of segments
    for length in range(2, 30):  # wherever it is cut
        assert without_metadata(content[:length]).startswith(b"\xff\xd8")


def test_chunks_of_a_png_that_are_not_of_its_pixels_are_left_out(pixels):
    file = io.BytesIO()
    Image.fromarray(pixels).convert("P").save(file, "PNG")
    plain = file.getvalue()
    added = chunk(b"tEXt", b"a\0b") + chunk(b"eXIf", b"II*\0")
    assert without_metadata(plain[:33] + added + plain[33:]) == plain
    assert without_metadata(plain + b"\0\0\0\1IDA") == plain  # what is no chunk
    assert without_metadata(plain[:-4]) == plain[:-4]  # a cut chunk stays
    assert Image.open(io.BytesIO(without_metadata(plain))).mode == "P"


@pytest.mark.parametrize("content", [b"", b"GIF89a", b"RIFF\0\0\0\0WEBP", b"II*", b"MM*\0"])
def test_other_contents_are_left_as_they_are(content):
    assert without_metadata(content) == content


@pytest.mark.parametrize("mode", ["I;16", "I", "F"])
def test_deep_pictures_are_stored_as_greys_of_8_bits(pixels, mode):
    file, grey = io.BytesIO(), Image.fromarray(pixels[..., 0])
    deep = Image.fromarray(pixels[..., 0].astype(np.uint16) * 257) if mode == "I;16" else grey.convert(mode)
    deep.save(file, "TIFF")
    stored = Image.open(io.BytesIO(storable_picture(file.getvalue())))
    assert stored.mode == "L" and np.array_equal(np.asarray(stored), np.asarray(grey))


@pytest.mark.parametrize("content", [b"", b"<html></html>", b"\xff\xd8\xff\xe0 cut"])
def test_what_is_not_a_picture_is_an_error(content):
    with pytest.raises(ValueError):
        read_picture(content)
    with pytest.raises(OSError):
        storable_picture(content)
