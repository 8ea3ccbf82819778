"""Validation during ControlNet training: the denoising error under fixed noise, and generated images."""

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import torch
from accelerate import Accelerator
from accelerate.logging import get_logger
from PIL import Image
from torch import nn
from torch.utils.data import default_collate

from data_scripts.dad.config import FactoryConfig
from data_scripts.dad.diffusion import BaseModel, Conditions
from data_scripts.dad.sampling import draw, make_pipeline
from data_scripts.dad.target_pairs import DenoisingPairs, list_pairs
from data_scripts.dad.target_set import load_target
from mra.common.files import write_whole
from mra.common.sharding import Shard, cut_batches
from mra.training.metrics_log import METRICS_FILE, MetricsLog, read_records
from mra.training.order import key_to_seed


logger = get_logger(__name__)


class Validation:
    """Validation on pairs spread evenly over the validation split, with fixed noises and timesteps.

    Without a validation split, or without condition images for it (`validation/<row>.png`), nothing is measured and a
    warning is logged.

    Args:
        accelerator: the run's accelerator.
        base: the frozen parts.
        config: the whole configuration.
        folder: folder for the drawn images.
        errors: function that returns each pair's error from ControlNet, base and batch.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        base: BaseModel,
        config: FactoryConfig,
        folder: Path,
        errors: Callable[[nn.Module, BaseModel, Any], torch.Tensor],
    ) -> None:
        self.accelerator, self.base, self.config, self.errors = accelerator, base, config, errors
        self.folder = Path(folder)
        self.dataset = self._make_dataset()
        draws = config.train.validation_draws if self.dataset else 0
        self.keys = [(epoch, pair) for epoch in range(draws) for pair in range(len(self.dataset or ()))]

    def _make_dataset(self) -> DenoisingPairs | None:
        common, train = self.config.common, self.config.train
        if max(train.validation_pairs, train.validation_images) == 0:
            return None
        rows = load_target(common.dataset, "validation")
        images = None if common.condition_dir is None else Path(common.condition_dir) / "validation"
        if rows is None or (images is not None and not images.is_dir()):
            missing = "validation split" if rows is None else f"condition images in {images}"
            logger.warning(f"nothing is validated: {common.dataset} has no {missing}")
            return None
        conditions = Conditions(common.condition, common.image_size, images and str(images))
        pairs = list_pairs(rows["captions"])
        count = min(len(pairs), max(train.validation_pairs, train.validation_images))
        pairs = [pairs[index * len(pairs) // count] for index in range(count)]
        return DenoisingPairs(rows, pairs, self.base, conditions, common.seed, purpose="validation")

    def is_due(self, step: int, total_steps: int) -> bool:
        """Return whether to validate after this optimizer step."""
        every = self.config.train.validation_steps
        return step == total_steps or (every is not None and step % every == 0)

    def run(self, controlnet: nn.Module, log: MetricsLog, step: int) -> None:
        """Log the error and write the images; every process must call this."""
        if self.dataset is None:
            return
        controlnet.eval()
        if self.config.train.validation_pairs:
            log.write(validation={"mse": self.measure(controlnet)})
        if self.config.train.validation_images and self.accelerator.is_main_process:
            self.draw(cast(nn.Module, self.accelerator.unwrap_model(controlnet)), step)
        self.accelerator.wait_for_everyone()
        controlnet.train()

    @torch.no_grad()
    def measure(self, controlnet: nn.Module) -> float:
        """Return the mean squared error over pairs and draws, independent of the number of processes."""
        assert self.dataset is not None
        keys = [key for key in self.keys if key[1] < self.config.train.validation_pairs]
        device = self.accelerator.device
        found = torch.zeros(len(keys), device=device)
        shard = Shard(self.accelerator.process_index, self.accelerator.num_processes)
        for batch in shard.own(cut_batches(len(keys), self.config.train.per_device_batch_size)):
            items = default_collate([self.dataset[keys[index]] for index in batch])
            items = {name: tensor.to(device) for name, tensor in items.items()}
            with self.accelerator.autocast():
                found[batch.start : batch.stop] = self.errors(controlnet, self.base, items).float()
        return cast(torch.Tensor, self.accelerator.reduce(found, "sum")).double().mean().item()

    @torch.no_grad()
    def draw(self, controlnet: nn.Module, step: int) -> None:
        """Write `step_<step>.png`: real images above, images generated from their captions below."""
        common, generate = self.config.common, self.config.generate
        assert self.dataset is not None
        count = min(len(self.dataset), self.config.train.validation_images)
        items = [self.dataset[0, pair] for pair in range(count)]
        prompts = [self.dataset.dataset[row]["captions"][index] for row, index in self.dataset.pairs[:count]]
        pipeline = make_pipeline(self.base, controlnet, generate.scheduler)
        with self.accelerator.autocast():
            drawn = draw(
                pipeline,
                prompts,
                [key_to_seed("validation image", common.seed, pair) for pair in range(count)],
                torch.stack([item["conditions"] for item in items]),
                generate,
            )
        height, width = common.image_size
        sheet = Image.new("RGB", (count * width, 2 * height))
        for column, (item, image) in enumerate(zip(items, drawn, strict=True)):
            pixels = (item["pixel_values"] * 255).round().byte().permute(1, 2, 0).numpy()
            sheet.paste(Image.fromarray(pixels), (column * width, 0))
            sheet.paste(image, (column * width, height))
        buffer = io.BytesIO()
        sheet.save(buffer, "PNG")
        write_whole(self.folder / f"step_{step:06d}.png", buffer.getvalue())


def read_errors(output_dir: str | Path) -> dict[int, float]:
    """Return the validation errors logged by a run: optimizer step -> mean squared error."""
    records = read_records(Path(output_dir) / METRICS_FILE)
    return {record["step"]: record["validation"]["mse"] for record in records if "validation" in record}
