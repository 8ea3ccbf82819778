"""Decoding: what datasets decodes, orientation, reduced JPEGs and crops of them."""

import io

import datasets
import numpy as np
import pytest
from PIL import Image

from mra.training.crops import crop_reduced, decode, largest_reduction, open_image, upright_size
from mra.training.regions import Crop


def smooth_picture(width, height):
    """Slow waves in three colours, which every way of resizing keeps."""
    y, x = np.mgrid[:height, :width]
    waves = [np.sin(x / 37 + phase) * np.cos(y / 53 - phase) for phase in (0, 1, 2)]
    return Image.fromarray((128 + 100 * np.stack(waves, -1)).astype(np.uint8))


def stored(image, kind="JPEG", **options):
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return {"bytes": buffer.getvalue(), "path": None}


@pytest.mark.parametrize("orientation", [None, 1, 3, 6, 8])
@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
def test_whole_images_are_those_of_datasets(kind, orientation):
    options = {}
    if orientation is not None:
        options["exif"] = Image.Exif()
        options["exif"][0x0112] = orientation
    row = stored(smooth_picture(40, 70), kind, **options)
    expected = datasets.Image(mode="RGB").decode_example(row)
    opened = open_image(row)
    assert upright_size(opened) == expected.size == ((70, 40) if orientation in (6, 8) else (40, 70))
    assert np.array_equal(np.asarray(decode(opened)), np.asarray(expected))


@pytest.mark.parametrize("mode", ["L", "CMYK"])
def test_other_modes_become_rgb(mode):
    decoded = decode(open_image(stored(smooth_picture(64, 64).convert(mode))), 2)
    assert decoded.mode == "RGB" and decoded.size == (32, 32)


def test_files_are_opened_by_path(tmp_path):
    smooth_picture(20, 30).save(tmp_path / "a.png")
    assert decode(open_image({"bytes": None, "path": str(tmp_path / "a.png")})).size == (20, 30)


def test_reductions():
    for crop, expected in (((512, 768), 2), ((511, 768), 1), ((1024, 1536), 4), ((5000, 3072), 8), ((100, 200), 1)):
        assert largest_reduction(Crop(10, 10, 10 + crop[0], 10 + crop[1]), (9000, 9000), 384, 256) == expected
    for size, expected in (((1000, 1500), 4), ((1002, 1500), 2), ((1000, 1499), 1), ((1031, 1541), 4)):
        assert largest_reduction(Crop(-10, 0, 1030, 1540), size, 384, 256) == expected
    row = stored(smooth_picture(203, 401))
    for reduction, size in ((1, (203, 401)), (2, (102, 201)), (4, (51, 101)), (8, (26, 51))):
        assert decode(open_image(row), reduction).size == size
    assert decode(open_image(stored(smooth_picture(203, 401), "PNG")), 4).size == (203, 401)


@pytest.mark.parametrize("reduction", [2, 4])
@pytest.mark.parametrize("crop", [Crop(3, 5, 383, 601), Crop(-7, -9, 350, 640), Crop(0, 0, 400, 640)])
def test_reduced_crop_lies_where_the_whole_one_does(crop, reduction):
    """To a fraction of a pixel: an edge moved by one pixel would show as a difference ten times as large."""
    row = stored(smooth_picture(400, 640), quality=95)
    whole = decode(open_image(row)).crop((crop.left, crop.top, crop.right, crop.bottom))
    expected = np.asarray(whole.resize((60, 90), Image.Resampling.BICUBIC)).astype(int)
    found = np.asarray(crop_reduced(decode(open_image(row), reduction), crop, reduction, 90, 60)).astype(int)
    moved = Crop(crop.left + 4, crop.top, crop.right + 4, crop.bottom)
    wrong = np.asarray(crop_reduced(decode(open_image(row), reduction), moved, reduction, 90, 60)).astype(int)
    inside = np.s_[4:-4, 4:-4]  # the border to black outside is softer
    assert np.abs(found - expected)[inside].mean() < 0.5 < 2 < np.abs(wrong - expected)[inside].mean()


def test_broken_images():
    row = stored(smooth_picture(40, 70))
    with pytest.raises(OSError):
        decode(open_image({"bytes": row["bytes"][:400], "path": None}))
    with pytest.raises(OSError):
        open_image({"bytes": b"no image", "path": None})
