"""Image transforms: pixels of the published code, statistics of what is random, and arguments."""

import json
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from mra_training.regions import Crop
from mra_training.transforms import TrainingImageTransform, draw_erasing, render


CASES = json.loads((Path(__file__).parent / "reference" / "region_geometry.json").read_text())["cases"]
MEAN, STD = [0.5, 0.4, 0.3], [0.25, 0.2, 0.3]


def drawn_image(width, height):
    """The image of the vectors: `image` in region_geometry.json."""
    y, x = np.mgrid[:height, :width]
    channels = [(3 * x + 2 * y) % 256, (x * y // 7) % 256, ((x // 8 + y // 8) % 2) * 200 + 20]
    return Image.fromarray(np.stack(channels, -1).astype(np.uint8))


def make_transform(**options):
    return TrainingImageTransform((64, 32), MEAN, STD, **options)


@pytest.mark.parametrize("case", CASES, ids=range(len(CASES)))
def test_fidelity_region_pixels(case):
    crop = Crop(*(draw[2] - 10 for draw in case["randint_calls_lo_hi_value (x0,y0,x1,y1)"]))
    image = render(drawn_image(case["W"], case["H"]), crop, case["hflip"], case["out_h"], case["out_w"])
    pixels = np.asarray(image)
    assert pixels.reshape(-1, 3).mean(0) == pytest.approx(case["image_mean_rgb"], abs=1e-9)
    for place, value in case["image_pixels"].items():
        row, column = map(int, place.split(","))
        assert pixels[row, column].tolist() == value


def test_tensor_path_is_close():
    image = drawn_image(60, 130)
    tensor = torch.from_numpy(np.array(image)).permute(2, 0, 1)
    exact = np.asarray(render(image, Crop(-4, 3, 50, 135), True, 64, 32)).astype(int)
    quick = render(tensor, Crop(-4, 3, 50, 135), True, 64, 32).permute(1, 2, 0).numpy().astype(int)
    # Out of 255, on an image of saw-teeth: photographs are smoother.
    assert np.abs(exact - quick).mean() < 0.25 and np.abs(exact - quick).max() <= 8


def test_normalisation():
    image = Image.new("RGB", (20, 30), (255, 51, 0))
    pixels, box = make_transform(erasing_probability=0)(image, random.Random(0))
    assert box is None and pixels.shape == (3, 64, 32) and pixels.dtype == torch.float32
    expected = torch.tensor([(1 - 0.5) / 0.25, (0.2 - 0.4) / 0.2, (0 - 0.3) / 0.3])
    torch.testing.assert_close(pixels, expected[:, None, None].expand(3, 64, 32))


def test_same_generator_same_image():
    image, box = drawn_image(50, 90), (5.0, 10.0, 20.0, 30.0)
    transform = make_transform()
    first, second, third = (transform(image, random.Random(seed), box) for seed in (3, 3, 4))
    assert torch.equal(first[0], second[0]) and first[1] == second[1]
    assert not torch.equal(first[0], third[0])


def test_without_box_the_whole_image_is_used():
    image = drawn_image(32, 64)
    transform = make_transform(flip_probability=0, erasing_probability=0)
    pixels, _ = transform(image, random.Random(0))
    assert torch.equal(pixels, transform.normalize(image))
    mirrored, _ = make_transform(flip_probability=1, erasing_probability=0)(image, random.Random(0))
    assert torch.equal(mirrored, pixels.flip(-1))


def test_box_follows_the_picture():
    """A white rectangle on black is found where the moved box says, whatever was drawn."""
    for seed in range(30):
        image = Image.new("RGB", (80, 160))
        image.paste((255, 255, 255), (20, 40, 60, 100))
        transform = TrainingImageTransform((128, 64), [0, 0, 0], [1, 1, 1], erasing_probability=0)
        pixels, (left, top, width, height) = transform(image, random.Random(seed), (20.0, 40.0, 40.0, 60.0))
        rows, columns = (pixels[0] > 0.5).nonzero().unbind(1)
        found = columns.min(), rows.min(), columns.max() + 1, rows.max() + 1
        assert torch.tensor(found).tolist() == pytest.approx([left, top, left + width, top + height], abs=1)


def test_statistics_of_flip_and_erasing():
    """Chances and sizes of what is drawn, within four standard errors."""
    image = Image.new("RGB", (32, 64), (255, 255, 255))
    image.paste((0, 0, 0), (0, 0, 16, 64))
    transform = TrainingImageTransform((64, 32), [-1, -1, -1], [1, 1, 1])
    flips = erased = 0
    for seed in range(1000):
        pixels, _ = transform(image, random.Random(seed))
        blank = (pixels[0] == 0).sum().item()
        erased += blank > 0
        assert blank == 0 or 0.01 * 2048 < blank < 0.42 * 2048
        flips += pixels[0, :, :8][pixels[0, :, :8] != 0].mean().item() > 1.5
    assert abs(flips - 500) < 4 * 15.8
    assert abs(erased - 600) < 4 * 15.5


def test_erasing_rectangles():
    rng = random.Random(0)
    rectangles = [draw_erasing(384, 256, rng) for _ in range(2000)]
    areas = np.array([r.width * r.height for r in rectangles]) / (384 * 256)
    ratios = np.array([r.height / r.width for r in rectangles])
    assert areas.min() > 0.019 and areas.max() < 0.401 and abs(areas.mean() - 0.21) < 0.02
    assert ratios.min() > 0.28 and ratios.max() < 3.5
    assert all(r.left >= 0 and r.top >= 0 and r.right <= 256 and r.bottom <= 384 for r in rectangles)
    assert draw_erasing(4, 400, random.Random(0), scale=(0.9, 0.9), ratio=(1, 1)) is None


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("flip_probability", 1.5),
        ("erasing_probability", -0.1),
        ("erasing_scale", (0.4, 0.02)),
        ("erasing_scale", (0.1, 2.0)),
        ("erasing_ratio", (0.0, 3.0)),
    ],
)
def test_bad_options(option, value):
    with pytest.raises(ValueError, match=f"`{option}` must"):
        make_transform(**{option: value})
