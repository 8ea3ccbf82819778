"""Distance between two sets of images: FID and KID of an image model's features, and image statistics."""

import itertools
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from scipy.stats import wasserstein_distance
from torch import nn

from data_scripts.dad.image_checks import MEASURES, load_image, measure_image
from mra.common.extras import extra_needed
from mra.common.pretrained import load_pretrained


KID_SUBSETS = 50
_LARGEST_SUBSET = 1000  # images, as usual for KID
_POOLED = ("pooler_output", "image_embeds")


@dataclass(frozen=True)
class StatisticDistance:
    """One measure of two sets: both means, and the Wasserstein distance in standard deviations of the target."""

    generated: float
    target: float
    distance: float


@dataclass(frozen=True)
class DomainDistance:
    """Distance of a generated set from the target set.

    Attributes:
        fid: Fréchet distance of the features' normal distributions. It is biased upwards for few images:
            compare only sets of equal size.
        kid, kid_std: squared maximum mean discrepancy, mean and standard deviation over random subsets. Unbiased, so
            sometimes slightly negative.
        num_generated, num_target: number of images.
        extractor: description of the feature extractor.
        num_features: number of features per image.
        statistics: [`ImageMeasures`] -> distance.
    """

    fid: float
    kid: float
    kid_std: float
    num_generated: int
    num_target: int
    extractor: str
    num_features: int
    statistics: dict[str, StatisticDistance]


def measure_distance(
    generated: Sequence[Any],
    target: Sequence[Any],
    extractor: "FeatureExtractor | None" = None,
    *,
    batch_size: int = 64,
) -> DomainDistance:
    """Measure the distance of generated images from the target dataset.

    Args:
        generated: at least two PIL images, rows with an "image", or paths.
        target: images of the target dataset, likewise.
        extractor: feature extractor, on the device to use; None for [`ColourEdgeFeatures`].
        batch_size: images per forward pass.

    Raises:
        ValueError: if a set has fewer than two images, or torchmetrics is not installed.
    """
    fid_class, kid_class = _metrics()
    for name, pictures in (("generated", generated), ("target", target)):
        if len(pictures) < 2:
            raise ValueError(f"`{name}` must hold at least 2 images to measure a distance, got {len(pictures)}")
    extractor = extractor if extractor is not None else ColourEdgeFeatures()
    subset = min(_LARGEST_SUBSET, max(2, min(len(generated), len(target)) // 2))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Metric `Kernel Inception Distance` will save")
        # Each image passes the extractor once; the metrics get the features.
        fid = fid_class(_Given(extractor.num_features)).set_dtype(torch.float64)
        kid = kid_class(_Given(extractor.num_features), subsets=KID_SUBSETS, subset_size=subset)
    statistics = {}
    for name, pictures in (("generated", generated), ("target", target)):
        measures = []
        for images in _batches(pictures, batch_size):
            measures += [measure_image(image) for image in images]
            features = extractor.extract(images).double().cpu()
            for metric in (fid, kid):
                metric.update(features, real=name == "target")
        statistics[name] = measures
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)  # for the subsets of KID
        kid_mean, kid_std = kid.compute()
    return DomainDistance(
        fid=float(fid.compute()),
        kid=float(kid_mean),
        kid_std=float(kid_std),
        num_generated=len(generated),
        num_target=len(target),
        extractor=extractor.description,
        num_features=extractor.num_features,
        statistics=compare_statistics(statistics["generated"], statistics["target"]),
    )


def compare_statistics(generated: Sequence[dict], target: Sequence[dict]) -> dict[str, StatisticDistance]:
    """Compare the measures of two sets (results of [`measure_image`]); see [`StatisticDistance`]."""
    distances = {}
    for name in MEASURES:
        ours, theirs = (np.array([measures[name] for measures in rows], dtype=float) for rows in (generated, target))
        spread = float(theirs.std()) or 1.0
        distance = wasserstein_distance(ours, theirs) / spread
        distances[name] = StatisticDistance(float(ours.mean()), float(theirs.mean()), float(distance))
    return distances


def _batches(pictures: Sequence[Any], size: int) -> Iterator[list[Image.Image]]:
    for start in range(0, len(pictures), size):
        yield [load_image(pictures[row]) for row in range(start, min(start + size, len(pictures)))]


def _metrics() -> tuple[Any, Any]:
    try:
        from torchmetrics.image.fid import FrechetInceptionDistance
        from torchmetrics.image.kid import KernelInceptionDistance
    except ImportError as error:
        raise extra_needed("measuring domain distances", "dad", error) from error
    return FrechetInceptionDistance, KernelInceptionDistance


class _Given(nn.Module):
    """Replacement of torchmetrics' network for precomputed features."""

    def __init__(self, num_features: int) -> None:
        super().__init__()
        self.num_features = num_features

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        return features


# Feature extractors


class FeatureExtractor(nn.Module):
    """Base class of feature extractors.

    Attributes:
        description: a few words for the report.
        size: height and width in pixels that images are scaled to, without cropping, to keep heads and shoes.
        num_features: number of features per image.
    """

    description: str
    size: tuple[int, int]
    num_features: int

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Return features `(batch, num_features)` of images `(batch, 3, height, width)` in 0..1."""
        raise NotImplementedError

    @torch.no_grad()
    def extract(self, images: Sequence[Image.Image]) -> torch.Tensor:
        """Return features `(batch, num_features)` of RGB images of any size."""
        height, width = self.size
        scaled = [image.resize((width, height), Image.Resampling.BICUBIC) for image in images]
        pixels = torch.from_numpy(np.stack([np.asarray(image) for image in scaled])).permute(0, 3, 1, 2)
        tensor = next(itertools.chain(self.parameters(), self.buffers()))
        return self(pixels.to(tensor.device, tensor.dtype) / 255).float()


class ColourEdgeFeatures(FeatureExtractor):
    """Colours and edges on a grid of 4 x 2 cells: no weights to download, and no semantics.

    For each cell the mean and standard deviation of red, green and blue, and the mean strength of edges in four directions: 80
    features. They reflect palette, contrast, blur, noise and layout, but not whether a person has two heads.
    """

    description = "colours and edges on a grid of 4 x 2 cells (80 hand-made features, no network)"
    size = (128, 64)
    num_features = 80
    _GRID = (4, 2)
    _EDGE_WEIGHT = 4.0  # edge strengths vary about four times less than colours

    def __init__(self) -> None:
        super().__init__()
        horizontal = torch.tensor([[-1.0, 0.0, 1.0], [-2.0, 0.0, 2.0], [-1.0, 0.0, 1.0]]) / 8
        diagonal = torch.tensor([[-2.0, -1.0, 0.0], [-1.0, 0.0, 1.0], [0.0, 1.0, 2.0]]) / 8
        kernels = torch.stack([horizontal, horizontal.T, diagonal, diagonal.flip(1)])
        self.kernels: torch.Tensor
        self.register_buffer("kernels", kernels[:, None], persistent=False)  # (4, 1, 3, 3)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Return the features of images; see [`FeatureExtractor`]."""
        mean = F.adaptive_avg_pool2d(images, self._GRID)
        square = F.adaptive_avg_pool2d(images**2, self._GRID)
        spread = (square - mean**2).clamp(min=0).sqrt()
        padded = F.pad(images.mean(dim=1, keepdim=True), (1, 1, 1, 1), mode="replicate")
        edges = F.adaptive_avg_pool2d(F.conv2d(padded, self.kernels).abs(), self._GRID) * self._EDGE_WEIGHT
        return torch.cat([mean, spread, edges], dim=1).flatten(1)  # (batch, 10 x 4 x 2)


class ImageModelFeatures(FeatureExtractor):
    """Pooled features of an image model of transformers, for example CLIP or DINOv2.

    Args:
        name: folder or Hub id.
        device: device to run on.

    Raises:
        ValueError: if there is no such model, or it has no pooled features.
    """

    def __init__(self, name: str, device: str | torch.device = "cpu") -> None:
        super().__init__()
        from transformers import AutoImageProcessor, AutoModel

        model = load_pretrained(AutoModel, name, "`report.feature_extractor`")
        processor = load_pretrained(AutoImageProcessor, name, "`report.feature_extractor`")
        self.description = f"features of {name}"
        self.model = model.eval().requires_grad_(False).to(device)
        self.size = _input_size(processor)
        shape = (1, 3, 1, 1)
        mean, std = (torch.tensor(values).reshape(shape) for values in (processor.image_mean, processor.image_std))
        self.mean: torch.Tensor
        self.std: torch.Tensor
        self.register_buffer("mean", mean.to(device), persistent=False)
        self.register_buffer("std", std.to(device), persistent=False)
        try:
            with torch.no_grad():
                self.num_features = self(torch.zeros(1, 3, *self.size, device=device)).shape[1]
        except TypeError:  # it needs more inputs than an image
            raise ValueError(
                f"report.feature_extractor {name!r} is of type {model.config.model_type}; expected an image model like "
                "CLIP or DINOv2"
            ) from None

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Return the features of images; see [`FeatureExtractor`]."""
        pixel_values = (images - self.mean) / self.std
        if hasattr(self.model, "get_image_features"):
            outputs = self.model.get_image_features(pixel_values=pixel_values)
        else:
            outputs = self.model(pixel_values=pixel_values)
        pooled = next((outputs[name] for name in _POOLED if outputs.get(name) is not None), None)
        if pooled is None:
            raise ValueError(f"report.feature_extractor: {self.description} are not pooled; expected {_POOLED[0]}")
        return pooled.flatten(1)


def load_extractor(name: str | None, device: str | torch.device = "cpu") -> FeatureExtractor:
    """Return the extractor of a folder or Hub id, or the default without a model.

    Raises:
        ValueError: if the model cannot be used.
    """
    return ImageModelFeatures(name, device) if name else ColourEdgeFeatures().to(device)


def _input_size(processor: Any) -> tuple[int, int]:
    """Return the height and width of an image processor's output, after cropping if it crops."""
    size = (
        processor.crop_size if getattr(processor, "do_center_crop", False) and processor.crop_size else processor.size
    )
    side = size.get("shortest_edge")
    return (size["height"], size["width"]) if side is None else (side, side)
