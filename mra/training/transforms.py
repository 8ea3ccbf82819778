"""Image transforms of training: region crop, mirroring, bicubic resize, normalisation and random erasing."""

import math
import random
from typing import Any

import torch
from PIL import Image
from torchvision.transforms.v2 import functional as F

from mra.training.crops import crop_reduced, decode, largest_reduction, upright_size
from mra.training.regions import Box, Crop, draw_crop, move_box


IMAGE_BACKENDS = ("tensor", "pillow")
ERASING_SCALE = (0.02, 0.4)
ERASING_RATIO = (0.3, 1 / 0.3)
ERASING_ATTEMPTS = 100


def draw_erasing(
    height: int,
    width: int,
    rng: random.Random,
    scale: tuple[float, float] = ERASING_SCALE,
    ratio: tuple[float, float] = ERASING_RATIO,
) -> Crop | None:
    """Draw the rectangle of random erasing (Zhong et al. 2020), with the usual settings of person re-identification.

    Args:
        height: height of the image, in pixels.
        width: width of the image, in pixels.
        rng: source of the random choices.
        scale: smallest and largest share of the image's area.
        ratio: smallest and largest height over width, drawn uniformly.

    Returns:
        The rectangle in pixels, smaller than the image, or None if a hundred attempts find none.
    """
    for _ in range(ERASING_ATTEMPTS):
        area = rng.uniform(*scale) * height * width
        aspect = rng.uniform(*ratio)
        rows, columns = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if rows < height and columns < width:
            top, left = rng.randint(0, height - rows), rng.randint(0, width - columns)
            return Crop(left, top, left + columns, top + rows)
    return None


def render(image: Image.Image, crop: Crop | None, flip: bool, height: int, width: int, backend: str) -> torch.Tensor:
    """Crop, mirror and resize an image without random choices.

    Args:
        image: an RGB image.
        crop: the part to keep, black outside the image; None keeps everything.
        flip: whether to mirror left to right.
        height: height of the result, in pixels.
        width: width of the result, in pixels.
        backend: `pillow` (the published pixels) or `tensor` (torch on uint8, several times faster).

    Returns:
        `(3, height, width)` uint8, interleaved in memory.
    """
    picture: Any = image  # torchvision accepts Pillow images, but its annotations name only tensors
    if crop is not None:
        picture = F.crop(picture, crop.top, crop.left, crop.height, crop.width)
    if flip:
        picture = F.horizontal_flip(picture)
    if backend == "tensor":
        return F.resize(F.pil_to_tensor(picture), [height, width], interpolation=F.InterpolationMode.BICUBIC)
    return F.pil_to_tensor(F.resize(picture, [height, width], interpolation=F.InterpolationMode.BICUBIC))


class TrainingImageTransform:
    """Random transform of an image of a person into the model's input; choices come from the given generator.

    Args:
        image_size: height and width of the result, in pixels.
        image_mean: mean of each channel, in 0..1.
        image_std: standard deviation of each channel, in 0..1.
        flip_probability: probability of mirroring left to right.
        erasing_probability: probability of filling a rectangle with 0 (the mean colour) after normalisation.
        erasing_scale: smallest and largest share of the area to blank.
        erasing_ratio: smallest and largest height over width of the blanked rectangle.
        image_backend: `pillow` gives the published pixels. `tensor` resizes with torch and decodes large JPEG files at
            1/2, 1/4 or 1/8 of their size: the same choices and geometry, slightly different values.

    Raises:
        ValueError: if a probability lies outside 0..1, a range is empty or the backend is unknown.
    """

    def __init__(
        self,
        image_size: tuple[int, int],
        image_mean: list[float],
        image_std: list[float],
        flip_probability: float = 0.5,
        erasing_probability: float = 0.6,
        erasing_scale: tuple[float, float] = ERASING_SCALE,
        erasing_ratio: tuple[float, float] = ERASING_RATIO,
        image_backend: str = "tensor",
    ) -> None:
        if image_backend not in IMAGE_BACKENDS:
            raise ValueError(f"`image_backend` must be one of {', '.join(IMAGE_BACKENDS)}, got {image_backend!r}")
        for name, value in (("flip_probability", flip_probability), ("erasing_probability", erasing_probability)):
            if not 0 <= value <= 1:
                raise ValueError(f"`{name}` must lie in 0..1, got {value}")
        for name, limits, largest in (("erasing_scale", erasing_scale, 1), ("erasing_ratio", erasing_ratio, math.inf)):
            if len(limits) != 2 or not 0 < limits[0] <= limits[1] <= largest:
                raise ValueError(f"`{name}` must be (smallest, largest), both positive, got {tuple(limits)}")
        self.image_size = image_size
        self._offset = 255 * torch.tensor(image_mean)[:, None, None]
        self._scale = 1 / (255 * torch.tensor(image_std)[:, None, None])
        self.flip_probability = flip_probability
        self.erasing_probability = erasing_probability
        self.erasing_scale = erasing_scale
        self.erasing_ratio = erasing_ratio
        self.image_backend = image_backend

    def __call__(
        self, image: Image.Image, rng: random.Random, box: Box | None = None, out: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, Box | None]:
        """Transform one image, and the box on it if there is one.

        Args:
            image: an image from [`~mra.training.crops.open_image`], not decoded yet, or any Pillow image.
            rng: source of every random choice.
            box: left, top, width and height in pixels of the upright image. With a box the image is first randomly
                cropped around it (pretraining); without a box the whole image is used (fine-tuning).
            out: `(3, height, width)` float32 tensor to write to; None for a new one.

        Returns:
            `(3, height, width)` float32, normalised, and the box in pixels of the result (None without a box).
        """
        height, width = self.image_size
        full_width, full_height = upright_size(image)
        crop = None if box is None else draw_crop(box, full_width, full_height, rng)
        flip = rng.random() < self.flip_probability
        erased = None
        if rng.random() < self.erasing_probability:
            erased = draw_erasing(height, width, rng, self.erasing_scale, self.erasing_ratio)
        pixels = self.normalize(self._render(image, crop, flip), out)
        if erased is not None:
            pixels[:, erased.top : erased.bottom, erased.left : erased.right] = 0
        return pixels, None if box is None or crop is None else move_box(box, crop, flip, height, width)

    def _render(self, image: Image.Image, crop: Crop | None, flip: bool) -> torch.Tensor:
        """Decode an image, at a reduced size if sufficient and allowed, and render it."""
        height, width = self.image_size
        full_width, full_height = upright_size(image)
        reduction = 1
        if self.image_backend == "tensor":
            size = full_width, full_height
            reduction = largest_reduction(crop or Crop(0, 0, *size), size, height, width)
        decoded = decode(image, reduction)
        if crop is not None and decoded.width < full_width:
            decoded, crop = crop_reduced(decoded, crop, reduction, height, width), None
        return render(decoded, crop, flip, height, width, self.image_backend)

    def normalize(self, image: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
        """Convert 8-bit RGB to float32 `(3, height, width)` with mean 0 and standard deviation 1."""
        # Channels first in memory too: stacking interleaved images is several times slower.
        pixels = (torch.empty(image.shape) if out is None else out).copy_(image)
        return pixels.sub_(self._offset).mul_(self._scale)
