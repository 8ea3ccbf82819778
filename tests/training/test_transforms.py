"""Image transforms: pixels of the published code, statistics of what is random, and arguments."""

import io
import json
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms.v2 import functional as F

from mra.training.regions import Crop
from mra.training.transforms import TrainingImageTransform, draw_erasing, render


CASES = json.loads((Path(__file__).parents[1] / "reference" / "region_geometry.json").read_text())["cases"]
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
    image = drawn_image(case["W"], case["H"])
    pixels = render(image, crop, case["hflip"], case["out_h"], case["out_w"], "pillow").permute(1, 2, 0).numpy()
    assert pixels.reshape(-1, 3).mean(0) == pytest.approx(case["image_mean_rgb"], abs=1e-9)
    for place, value in case["image_pixels"].items():
        row, column = map(int, place.split(","))
        assert pixels[row, column].tolist() == value


def test_tensor_path_is_close():
    image = drawn_image(60, 130)
    exact, quick = (
        render(image, Crop(-4, 3, 50, 135), True, 64, 32, backend).int() for backend in ("pillow", "tensor")
    )
    # Out of 255, on an image of saw-teeth: photographs are smoother.
    assert (exact - quick).abs().float().mean() < 0.25 and (exact - quick).abs().max() <= 8


@pytest.mark.parametrize("size", [(50, 90), (300, 500), (1100, 700)])
def test_backends_choose_alike(size):
    """The same box, crop and mirroring, also of a JPEG that the tensor backend decodes at a part of its size."""
    buffer = io.BytesIO()
    drawn_image(20, 30).resize(size, Image.Resampling.BICUBIC).save(buffer, "JPEG", quality=95)
    box = (0.3 * size[0], 0.2 * size[1], 0.4 * size[0], 0.5 * size[1])
    for seed in range(8):
        exact, quick = (
            make_transform(image_backend=backend)(Image.open(buffer), random.Random(seed), box if seed % 2 else None)
            for backend in ("pillow", "tensor")
        )
        assert exact[1] == quick[1] and torch.equal(exact[0] == 0, quick[0] == 0)
        steps = (exact[0] - quick[0]).abs() * 255 * torch.tensor(STD)[:, None, None]
        assert steps.mean() < 1.5, (seed, steps.mean())


def test_result_is_written_where_it_is_wanted():
    out = torch.zeros(2, 3, 64, 32)
    pixels, _ = make_transform()(drawn_image(50, 90), random.Random(1), None, out[1])
    assert pixels.data_ptr() == out[1].data_ptr() and (out[0] == 0).all()
    assert torch.equal(pixels, make_transform()(drawn_image(50, 90), random.Random(1))[0])


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
    assert torch.equal(pixels, transform.normalize(F.pil_to_tensor(image)))
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
        ("image_backend", "opencv"),
    ],
)
def test_bad_options(option, value):
    with pytest.raises(ValueError, match=f"`{option}` must"):
        make_transform(**{option: value})
