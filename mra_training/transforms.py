"""Image transforms of training: region crop, mirroring, bicubic resize, normalisation and random erasing."""

import math
import random

import torch
from PIL import Image
from torchvision.transforms.v2 import functional as F

from mra_training.regions import Box, Crop, draw_crop, move_box


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
    """
    Draws the rectangle of random erasing (Zhong et al. 2020), as person re-identification usually sets it.

    Args:
        height: of the image, in pixels.
        width: of the image, in pixels.
        rng: where the choices come from.
        scale: smallest and largest share of the image's area.
        ratio: smallest and largest height over width, drawn uniformly.

    Returns:
        The rectangle in pixels, smaller than the image, or None when none was found in a hundred attempts.
    """
    for _ in range(ERASING_ATTEMPTS):
        area = rng.uniform(*scale) * height * width
        aspect = rng.uniform(*ratio)
        rows, columns = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if rows < height and columns < width:
            top, left = rng.randint(0, height - rows), rng.randint(0, width - columns)
            return Crop(left, top, left + columns, top + rows)
    return None


def render(
    image: Image.Image | torch.Tensor, crop: Crop | None, flip: bool, height: int, width: int
) -> Image.Image | torch.Tensor:
    """
    Crops, mirrors and resizes an image; a pure function of choices that were drawn before.

    Args:
        image: a PIL image (exact: the published pixels) or a `(3, height, width)` uint8 tensor.
        crop: the part to keep, black where it reaches outside; None keeps everything.
        flip: whether to mirror left to right.
        height: of the result, in pixels.
        width: of the result, in pixels.

    Returns:
        The resized image, of the kind that came in.
    """
    if crop is not None:
        image = F.crop(image, crop.top, crop.left, crop.height, crop.width)
    if flip:
        image = F.horizontal_flip(image)
    return F.resize(image, [height, width], interpolation=F.InterpolationMode.BICUBIC)


class TrainingImageTransform:
    """
    Turns a pedestrian crop into the model's input, every random choice drawn from the generator that is passed.

    Args:
        image_size: height and width of the result, in pixels.
        image_mean: of each channel, in 0..1.
        image_std: of each channel, in 0..1.
        flip_probability: of mirroring left to right.
        erasing_probability: of blanking a rectangle after normalisation, with 0 (the mean colour).
        erasing_scale: smallest and largest share of the area to blank.
        erasing_ratio: smallest and largest height over width of the blanked rectangle.

    Raises:
        ValueError: if a probability lies outside 0..1 or a range is empty.
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
    ):
        for name, value in (("flip_probability", flip_probability), ("erasing_probability", erasing_probability)):
            if not 0 <= value <= 1:
                raise ValueError(f"`{name}` must lie in 0..1, got {value}.")
        for name, limits, largest in (("erasing_scale", erasing_scale, 1), ("erasing_ratio", erasing_ratio, math.inf)):
            if len(limits) != 2 or not 0 < limits[0] <= limits[1] <= largest:
                raise ValueError(f"`{name}` must be (smallest, largest), both positive, got {tuple(limits)}.")
        self.image_size = tuple(image_size)
        self._offset = 255 * torch.tensor(image_mean)[:, None, None]
        self._scale = 1 / (255 * torch.tensor(image_std)[:, None, None])
        self.flip_probability = flip_probability
        self.erasing_probability = erasing_probability
        self.erasing_scale = tuple(erasing_scale)
        self.erasing_ratio = tuple(erasing_ratio)

    def __call__(
        self, image: Image.Image, rng: random.Random, box: Box | None = None
    ) -> tuple[torch.Tensor, Box | None]:
        """
        Transforms one image, and the box on it if there is one.

        Args:
            image: an RGB image.
            rng: where every choice comes from.
            box: left, top, width and height in pixels of the image. With a box the image is first cropped at random
                around it (pretraining); without, the whole image is used (fine-tuning).

        Returns:
            `(3, height, width)` float32, normalised, and the box in pixels of the result (None without a box).
        """
        height, width = self.image_size
        crop = None if box is None else draw_crop(box, image.width, image.height, rng)
        flip = rng.random() < self.flip_probability
        erased = None
        if rng.random() < self.erasing_probability:
            erased = draw_erasing(height, width, rng, self.erasing_scale, self.erasing_ratio)
        pixels = self.normalize(render(image, crop, flip, height, width))
        if erased is not None:
            pixels[:, erased.top : erased.bottom, erased.left : erased.right] = 0
        return pixels, None if box is None else move_box(box, crop, flip, height, width)

    def normalize(self, image: Image.Image | torch.Tensor) -> torch.Tensor:
        """Turns 8-bit RGB into a new float32 tensor `(3, height, width)` with the mean at 0 and the deviation at 1."""
        if not isinstance(image, torch.Tensor):
            image = F.pil_to_tensor(image)
        # Channels first in memory too: stacking a batch of interleaved images takes several times as long.
        return image.contiguous().to(torch.float32).sub_(self._offset).mul_(self._scale)
