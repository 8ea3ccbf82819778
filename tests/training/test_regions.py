"""Region geometry against hand-drawn cases and the vectors of the published code."""

import json
import random
from pathlib import Path

import pytest
import torch

from mra.training.regions import (
    WHOLE_IMAGE,
    Crop,
    box_to_pixels,
    crop_ranges,
    draw_crop,
    move_box,
    region_attention_mask,
)


REFERENCE = Path(__file__).parents[1] / "reference"
MASK_CASES = json.loads((REFERENCE / "image_attns.json").read_text())["cases"]
GEOMETRY_CASES = json.loads((REFERENCE / "region_geometry.json").read_text())["cases"]


def tokens_inside(mask):
    """Indices of the patch tokens of a mask that lie inside, the global token checked and left out."""
    assert mask.dtype == torch.int64 and mask[0] == 1 and set(mask.tolist()) <= {0, 1}
    return (mask[1:].nonzero().flatten() + 1).tolist()


@pytest.mark.parametrize("case", MASK_CASES, ids=lambda case: f"{case['h']}x{case['w']}-{case['box_xywh'][:2]}")
def test_fidelity_patch_mask(case):
    mask = region_attention_mask(case["box_xywh"], (case["h"], case["w"]), (case["h"] // 32, case["w"] // 32))
    assert len(mask) == case["len"]
    assert tokens_inside(mask) == case["zeros"]


@pytest.mark.parametrize("case", GEOMETRY_CASES, ids=range(len(GEOMETRY_CASES)))
def test_fidelity_region_geometry(case):
    size = (case["out_h"], case["out_w"])
    box = WHOLE_IMAGE if case["box_index"] is None else case["boxes_cxcywh_rel"][case["box_index"]]
    pixels = box_to_pixels(box, case["W"], case["H"])
    draws = case["randint_calls_lo_hi_value (x0,y0,x1,y1)"]
    padded = [[low + 10, high + 10] for low, high in crop_ranges(pixels, case["W"], case["H"])]
    assert padded == [draw[:2] for draw in draws]
    crop = Crop(*(draw[2] - 10 for draw in draws))
    moved = move_box(pixels, crop, case["hflip"], *size)
    assert moved == pytest.approx(case["final_box_xywh"], abs=1e-9)
    assert tokens_inside(region_attention_mask(moved, size, (size[0] // 32, size[1] // 32))) == case["zeros"]


@pytest.mark.parametrize(
    ("box", "pixels"),
    [
        ((0.5, 0.5, 1, 1), (0, 0, 101, 50)),  # the odd side loses half a pixel on the left, which is clipped
        ((0.5, 0.5, 0.5, 0.5), (25, 12.5, 50, 25)),
        ((0.0, 0.0, 0.4, 0.4), (0, 0, 40, 20)),
        ((1.0, 1.0, 0.4, 0.4), (81, 40, 20, 10)),
        ((0.5, 0.5, 0.001, 0.001), (49.5, 24.5, 1, 1)),
    ],
)
def test_box_to_pixels(box, pixels):
    assert box_to_pixels(box, 101, 50) == pixels


@pytest.mark.parametrize("box", [(0.5, 0.5, 0, 1), (1.2, 0.5, 0.1, 0.1), (0.5, 0.5, 1), (60.0, 30.0, 20.0, 9.0)])
def test_bad_box(box):
    with pytest.raises(ValueError, match="`box` must be"):
        box_to_pixels(box, 101, 50)


def test_crop_contains_box():
    rng = random.Random(0)
    reached = set()
    for _ in range(500):
        width, height = rng.randint(8, 200), rng.randint(8, 300)
        box = box_to_pixels([rng.random(), rng.random(), rng.uniform(0.01, 1), rng.uniform(0.01, 1)], width, height)
        crop = draw_crop(box, width, height, rng)
        assert -10 <= crop.left <= box[0] and box[0] + box[2] <= crop.right <= width + 10
        assert -10 <= crop.top <= box[1] and box[1] + box[3] <= crop.bottom <= height + 10
        left, top, box_width, box_height = move_box(box, crop, rng.random() < 0.5, 64, 32)
        assert left >= -1e-9 and top >= -1e-9 and left + box_width <= 32 + 1e-9 and top + box_height <= 64 + 1e-9
        reached.add((crop.left < 0, crop.right > width))
    assert len(reached) == 4


def test_flip_twice_is_identity():
    crop = Crop(-3, 2, 40, 60)
    box = (1.5, 4.0, 20.0, 30.0)
    left, top, width, height = move_box(box, crop, True, crop.height, crop.width)
    back = move_box((left, top, width, height), Crop(0, 0, crop.width, crop.height), True, crop.height, crop.width)
    assert back == pytest.approx((4.5, 2.0, 20.0, 30.0))


def test_grid_must_fit():
    with pytest.raises(ValueError, match="does not divide"):
        region_attention_mask((0, 0, 1, 1), (100, 64), (3, 2))
