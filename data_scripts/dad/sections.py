"""Arguments of the data factory, a dataclass for each section of the configuration.

A stage cannot be continued with changed values, except for options marked `decides=False`, which do not affect its result.
"""

from dataclasses import dataclass
from typing import Any, Literal

from mra.common.arguments import option, require
from mra.training.augmentation import OPERATIONS


Precision = Literal["fp32", "fp16", "bf16"]


# ---------------------------------------------------------------- sections


@dataclass
class CommonSection:
    """Arguments shared by several stages."""

    work_dir: str = option(None, "folder for all results of the factory", decides=False)
    dataset: str = option(
        None, "folder or Hub id of the target dataset with images and captions, as written by `mra prepare pedes`"
    )
    seed: int = option(0, "seed of training, prompts and images")
    base_model: str | None = option(
        None, "folder or Hub id of the Stable Diffusion pipeline to align with the target dataset"
    )
    base_revision: str | None = option(None, "commit or branch of the base model on the Hub")
    image_size: list[int] = option([384, 256], "height and width in pixels, multiples of 8")
    condition: Literal["none", "white", "folder"] = option(
        "white",
        "condition image: `none` is a zero image that the ControlNet ignores, `white` the published one, `folder` "
        "reads condition_dir",
    )
    condition_dir: str | None = option(
        None, "folder of condition images (edges, poses), one per row of the train split, e.g. 17.png"
    )
    shard: str = option("0/1", "share of this run in the work, `index/count`, for separate jobs", decides=False)

    def __post_init__(self) -> None:
        require(self.work_dir is not None, "common.work_dir", "a folder", self.work_dir)
        require(self.dataset is not None, "common.dataset", "a folder or Hub id of a prepared set", self.dataset)
        require(
            len(self.image_size) == 2 and all(side > 0 and side % 8 == 0 for side in self.image_size),
            "common.image_size",
            "[height, width], multiples of 8",
            self.image_size,
        )
        require(
            (self.condition == "folder") == (self.condition_dir is not None),
            "common.condition_dir",
            "a folder with `condition: folder`, and left out otherwise",
            self.condition_dir,
        )
        index, _, count = self.shard.partition("/")
        right = index.isdecimal() and count.isdecimal() and int(index) < int(count)
        require(right, "common.shard", "index/count with the index from 0, e.g. 0/4", self.shard)


@dataclass
class TrainSection:
    """Training of the ControlNet on the target dataset (train_dad.py)."""

    num_train_epochs: int = option(3, "epochs over the target pairs; 0 keeps the untrained ControlNet")
    max_train_steps: int | None = option(None, "optimizer steps, overriding num_train_epochs")
    per_device_batch_size: int = option(4, "pairs per process and batch")
    gradient_accumulation_steps: int = option(1, "batches averaged per optimizer step")
    learning_rate: float = option(1e-5, "peak learning rate of AdamW")
    num_warmup_steps: float = option(500, "warm-up in optimizer steps, or below 1 as a share of all steps")
    final_learning_rate: float | None = option(
        None, "learning rate at the end of the linear schedule; constant at the peak when left out"
    )
    weight_decay: float = option(0.01, "decoupled weight decay")
    adam_beta1: float = option(0.9, "decay of AdamW's first moment")
    adam_beta2: float = option(0.999, "decay of AdamW's second moment")
    max_grad_norm: float | None = option(1.0, "norm to clip the gradient to")
    caption_dropout: float = option(0.0, "share of captions replaced by empty text, to train classifier-free guidance")
    flip_probability: float = option(0.0, "probability of mirroring an image; never if the caption says left or right")
    data_fraction: float = option(1.0, "share of the target pairs to use, chosen once by the seed")
    mixed_precision: Literal["no", "fp16", "bf16"] | None = option(
        None, "precision of autocast; the setting of `accelerate` when left out"
    )
    gradient_checkpointing: bool = option(
        False, "recompute activations in the backward pass to save memory", decides=False
    )
    num_workers: int = option(4, "data-loading workers per process", decides=False)
    logging_steps: int = option(50, "optimizer steps between lines of metrics.jsonl")
    save_steps: int | None = option(1000, "optimizer steps between checkpoints", decides=False)
    save_total_limit: int = option(2, "number of newest checkpoints to keep", decides=False)
    resume: str = option(
        "latest",
        "checkpoint to continue from: its path; `latest`, the newest (a damaged one is an error); or `latest_whole`, "
        "the newest undamaged one, with a warning for others",
        decides=False,
    )
    resume_without_manifest: bool = option(
        False, "resume from a checkpoint of an earlier version, without manifest.json", decides=False
    )
    validation_steps: int | None = option(
        1000, "optimizer steps between validations; the final step is always validated"
    )
    validation_pairs: int = option(64, "validation pairs to measure the error on; 0 for none")
    validation_draws: int = option(2, "draws of noise and timestep per pair, the same at every validation")
    validation_images: int = option(4, "images generated at every validation; 0 for none")
    log_with: list[str] = option([], "trackers that receive the metrics, e.g. tensorboard", decides=False)
    push_to_hub: bool = option(False, "push the trained ControlNet to the Hub", decides=False)
    hub_model_id: str | None = option(None, "repository to push to, `user/name`", decides=False)
    hub_private: bool = option(False, "create the repository as private", decides=False)

    def __post_init__(self) -> None:
        at_least(1, "train", self, "per_device_batch_size", "gradient_accumulation_steps", "logging_steps")
        at_least(1, "train", self, "max_train_steps", "save_steps", "validation_steps", "validation_draws")
        at_least(0, "train", self, "num_train_epochs", "num_workers", "validation_pairs", "validation_images")
        share("train", self, "caption_dropout", "flip_probability", "data_fraction")
        require(self.data_fraction > 0, "train.data_fraction", "above 0", self.data_fraction)
        named = not self.push_to_hub or self.hub_model_id is not None
        require(named, "train.hub_model_id", "`user/name` with push_to_hub", self.hub_model_id)


@dataclass
class AugmentSection:
    """Prompts from the captions of the target dataset (augment_captions.py)."""

    mode: Literal["attributes", "eda"] = option(
        "attributes",
        "`attributes` changes what a person wears by rules; `eda` changes words at random (Wei and Zou 2019)",
    )
    prompts_per_caption: int = option(20, "prompts per caption, including the caption itself")
    strength: float = option(0.5, "share of a caption's attributes (eda: words) to change per prompt")
    eda_operations: list[str] = option(list(OPERATIONS), "operations that `eda` chooses from")
    max_captions: int | None = option(
        None, "number of captions to use, from the start of the train split; all when left out"
    )

    def __post_init__(self) -> None:
        at_least(1, "augment", self, "prompts_per_caption", "max_captions")
        share("augment", self, "strength")


@dataclass
class GenerateSection:
    """One image for each prompt (generate.py)."""

    controlnet: str | None = option(None, "folder or Hub id of a ControlNet to use instead of the trained one")
    num_images: int | None = option(None, "number of prompts to use, spread evenly over all; all when left out")
    batch_size: int = option(16, "images per forward pass; it affects rounding, so keep it for a dataset")
    image_size: list[int] | None = option(
        None, "height and width in pixels, multiples of 8; those of `common` when left out"
    )
    num_inference_steps: int = option(30, "denoising steps")
    scheduler: Literal["ddim", "euler", "dpm", "unipc"] = option(
        "unipc", "sampler; noise schedule and prediction type come from the base model"
    )
    guidance_scale: float = option(7.5, "weight of classifier-free guidance; 1 turns it off")
    controlnet_scale: float = option(1.0, "factor on the ControlNet's residuals")
    prompt_suffix: str = option("", "text added to every prompt")
    negative_prompt: str | None = option(None, "prompt that guidance moves away from")
    dtype: Precision = option("fp32", "precision of all weights; fp16 or bf16 on a GPU")
    safety_checker: bool = option(False, "use the base model's safety checker, which blackens flagged images")
    jpeg_quality: int = option(95, "quality of the JPEG files, 1 to 100")

    def __post_init__(self) -> None:
        at_least(1, "generate", self, "num_images", "batch_size", "num_inference_steps", "jpeg_quality")
        require(self.jpeg_quality <= 100, "generate.jpeg_quality", "at most 100", self.jpeg_quality)
        size = self.image_size
        right = size is None or (len(size) == 2 and all(side > 0 and side % 8 == 0 for side in size))
        require(right, "generate.image_size", "[height, width], multiples of 8", size)


@dataclass
class FilterSection:
    """Filter of the generated images (filter.py)."""

    calibration_images: int = option(
        2000, "number of target images to calibrate the thresholds on, chosen by the seed"
    )
    quantile: float = option(0.01, "share of the target images that each one-sided threshold would drop")
    min_width: int = option(64, "smallest width in pixels")
    min_height: int = option(128, "smallest height in pixels")
    min_contrast: float | None = option(None, "lowest contrast; the target's quantile when left out")
    min_colour: float | None = option(None, "lowest variance between channels; the target's quantile when left out")
    min_sharpness: float | None = option(None, "lowest variance of the Laplacian; the target's quantile when left out")
    min_detail: float | None = option(
        None, "lowest size in bytes as a small JPEG; the target's quantile when left out"
    )
    max_detail: float | None = option(
        None, "largest size in bytes as a small JPEG; the target's quantile when left out"
    )
    duplicate_distance: int = option(12, "largest distance of near-duplicates, of 256 bits of the perceptual hash")
    person_model: str | None = option(
        None, "folder or Hub id of an object detector to count people; no check when left out"
    )
    person_threshold: float = option(0.5, "lowest score of a person's detection")
    min_person_height: float = option(0.5, "smallest height of the person, as a share of the image")
    score_model: str | None = option(None, "folder or Hub id of a CLIP-like model; no check when left out")
    min_score: float | None = option(None, "lowest image-text score; the target's quantile when left out")
    batch_size: int = option(32, "images per forward pass")
    dtype: Precision = option("fp32", "precision of the models' weights")

    def __post_init__(self) -> None:
        at_least(1, "filter", self, "min_width", "min_height", "batch_size")
        at_least(2, "filter", self, "calibration_images")
        share("filter", self, "quantile", "person_threshold", "min_person_height")
        near = 0 <= self.duplicate_distance <= 31
        require(near, "filter.duplicate_distance", "from 0 to 31 bits", self.duplicate_distance)


@dataclass
class CaptionSection:
    """Captions of the kept images (caption.py)."""

    model: str | None = option(None, "folder or Hub id of the image-to-text model")
    prompt: str | None = option(
        "Describe the image in English",
        "prompt: a question, a task token like <DETAILED_CAPTION> (Florence-2), or the beginning of the caption (BLIP); "
        "none lets a model without chat template start the text",
    )
    max_new_tokens: int = option(60, "longest caption in tokens")
    num_beams: int = option(1, "beams of the search")
    clean_style: bool = option(False, "keep one sentence, in lower case")
    batch_size: int = option(16, "images per forward pass")
    dtype: Precision = option("fp32", "precision of the model's weights")

    def __post_init__(self) -> None:
        at_least(1, "caption", self, "max_new_tokens", "num_beams", "batch_size")


@dataclass
class GroundSection:
    """Boxes of the captions' phrases, as SDA annotations (ground.py)."""

    model: str | None = option(None, "folder or Hub id of the zero-shot object detector")
    box_threshold: float = option(0.35, "lowest score of a box, over all words")
    text_threshold: float = option(0.35, "lowest score of a box for the words of its phrase")
    nms_threshold: float = option(0.7, "overlap (IoU) from which the weaker of two boxes of a phrase is dropped")
    duplicate_threshold: float = option(0.9, "overlap (IoU) from which boxes of two phrases are the same box")
    min_box_side: float = option(0.02, "smallest side of a box, as a share of the image")
    batch_size: int = option(8, "images per forward pass")
    dtype: Precision = option("fp32", "precision of the model's weights")

    def __post_init__(self) -> None:
        at_least(1, "ground", self, "batch_size")
        share("ground", self, "box_threshold", "text_threshold", "nms_threshold")
        share("ground", self, "duplicate_threshold", "min_box_side")


@dataclass
class ReportSection:
    """Report on the result (report.py)."""

    feature_extractor: str | None = option(
        None,
        "folder or Hub id of the image model for the domain distance, e.g. CLIP or DINOv2; features of colours and "
        "edges when left out",
    )
    images: int = option(2000, "images per dataset to measure the distances on")
    note: str | None = option(None, "note at the top of the page")

    def __post_init__(self) -> None:
        at_least(2, "report", self, "images")


# ---------------------------------------------------------------- checks


def at_least(least: int, section: str, values: Any, *names: str) -> None:
    """Check numbers against a minimum; None passes."""
    for name in names:
        value = getattr(values, name)
        require(value is None or value >= least, f"{section}.{name}", f"at least {least}", value)


def share(section: str, values: Any, *names: str) -> None:
    """Check that numbers are from 0 to 1."""
    for name in names:
        value = getattr(values, name)
        require(0 <= value <= 1, f"{section}.{name}", "from 0 to 1", value)
