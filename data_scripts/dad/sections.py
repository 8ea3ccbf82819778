"""Arguments of the data factory, a dataclass for each section of the configuration.

A stage started with other values than before is not continued, but for the options marked `decides=False`, on which its
result does not depend.
"""

from dataclasses import dataclass
from typing import Any, Literal

from mra.common.arguments import option, require
from mra.training.augmentation import OPERATIONS


Precision = Literal["fp32", "fp16", "bf16"]


# ---------------------------------------------------------------- sections


@dataclass
class CommonSection:
    """What several stages share."""

    work_dir: str = option(None, "Folder of everything that the factory makes.", decides=False)
    dataset: str = option(
        None, "Target set with images and captions, as `mra prepare pedes` writes it: folder or Hub id."
    )
    seed: int = option(0, "Seed of training, prompts and images.")
    base_model: str | None = option(
        None, "Stable Diffusion pipeline to align with the target set: folder or Hub id. There is no default."
    )
    base_revision: str | None = option(None, "Commit or branch of the base model on the Hub.")
    image_size: list[int] = option([384, 256], "Height and width in pixels, multiples of 8.")
    condition: Literal["none", "white", "folder"] = option(
        "white",
        "Control image: `none` is a zero image that the ControlNet cannot see, `white` the published one, `folder` "
        "takes `condition_dir`.",
    )
    condition_dir: str | None = option(
        None, "Condition images (edges, poses): one file named after the row of the train split each, e.g. 17.png."
    )
    shard: str = option(
        "0/1", "Share of the work of this run, `index/count`, for jobs on machines apart.", decides=False
    )

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
    """Training of the ControlNet on the target set (train_dad.py)."""

    num_train_epochs: int = option(3, "Passes over the target pairs; 0 keeps the untrained ControlNet.")
    max_train_steps: int | None = option(None, "Optimizer steps instead of whole epochs.")
    per_device_batch_size: int = option(4, "Pairs of each process in a step.")
    gradient_accumulation_steps: int = option(1, "Batches averaged into one optimizer step.")
    learning_rate: float = option(1e-5, "Peak learning rate of AdamW.")
    num_warmup_steps: float = option(500, "Optimizer steps of the warm-up; below 1, the share of all steps.")
    final_learning_rate: float | None = option(
        None, "Where the linear schedule ends; the rate stays at its peak when left out."
    )
    weight_decay: float = option(0.01, "Decoupled weight decay.")
    adam_beta1: float = option(0.9, "Decay of AdamW's first moment.")
    adam_beta2: float = option(0.999, "Decay of AdamW's second moment.")
    max_grad_norm: float | None = option(1.0, "Clip the gradient to this norm.")
    caption_dropout: float = option(0.0, "Share of captions replaced by nothing, which guidance is trained on.")
    flip_probability: float = option(0.0, "Chance of mirroring an image; captions that say left or right never are.")
    data_fraction: float = option(1.0, "Share of the target pairs to use, chosen once by the seed.")
    mixed_precision: Literal["no", "fp16", "bf16"] | None = option(
        None, "Precision of the matrix products; what `accelerate` is set to when left out."
    )
    gradient_checkpointing: bool = option(False, "Recompute activations: less memory, more time.", decides=False)
    num_workers: int = option(4, "Worker processes that prepare batches, for each process.", decides=False)
    logging_steps: int = option(50, "Optimizer steps between two lines of metrics.jsonl.")
    save_steps: int | None = option(1000, "Optimizer steps between two checkpoints.", decides=False)
    save_total_limit: int = option(2, "Checkpoints that are kept, the newest.", decides=False)
    resume: str = option(
        "latest",
        "`latest` to continue from the newest checkpoint (a damaged one is an error), `latest_whole` to skip damaged "
        "ones with a warning, or a checkpoint's path.",
        decides=False,
    )
    resume_without_manifest: bool = option(
        False, "Continue from a checkpoint without manifest.json, as earlier versions saved them.", decides=False
    )
    validation_steps: int | None = option(
        1000, "Optimizer steps between two validations; the final step is always validated."
    )
    validation_pairs: int = option(64, "Pairs of the validation split whose error is measured; 0 for none.")
    validation_draws: int = option(2, "Noises and timesteps per pair, the same at every validation.")
    validation_images: int = option(4, "Pictures drawn at every validation; 0 for none.")
    log_with: list[str] = option([], "Trackers that receive the metrics, e.g. tensorboard.", decides=False)
    push_to_hub: bool = option(False, "Push the trained ControlNet to the Hub.", decides=False)
    hub_model_id: str | None = option(None, "Repository to push to, `user/name`.", decides=False)
    hub_private: bool = option(False, "Make a new repository private.", decides=False)

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
    """Prompts from the captions of the target set (augment_captions.py)."""

    mode: Literal["attributes", "eda"] = option(
        "attributes",
        "`attributes` changes what a person wears by rules; `eda` changes words at random (Wei and Zou 2019).",
    )
    prompts_per_caption: int = option(20, "Prompts made of each caption, the caption itself the first of them.")
    strength: float = option(0.5, "Share of a caption's attributes (eda: words) that one prompt changes.")
    eda_operations: list[str] = option(list(OPERATIONS), "Changes that `eda` chooses from.")
    max_captions: int | None = option(None, "Captions to use, the first of the train split; all when left out.")

    def __post_init__(self) -> None:
        at_least(1, "augment", self, "prompts_per_caption", "max_captions")
        share("augment", self, "strength")


@dataclass
class GenerateSection:
    """One image for each prompt (generate.py)."""

    controlnet: str | None = option(
        None, "ControlNet to use in place of the trained one of the work folder: folder or Hub id."
    )
    num_images: int | None = option(None, "Prompts to draw, spread evenly over all; all when left out.")
    batch_size: int = option(16, "Images drawn together. It rounds the images otherwise, so it stays for a set.")
    image_size: list[int] | None = option(None, "Height and width, multiples of 8; those of `common` if left out.")
    num_inference_steps: int = option(30, "Denoising steps.")
    scheduler: Literal["ddim", "euler", "dpm", "unipc"] = option(
        "unipc", "Sampler; noise schedule and prediction type stay those of the base model."
    )
    guidance_scale: float = option(7.5, "Weight of classifier-free guidance; 1 turns it off.")
    controlnet_scale: float = option(1.0, "Factor on what the ControlNet adds.")
    prompt_suffix: str = option("", "Text added to every prompt.")
    negative_prompt: str | None = option(None, "What guidance leads away from.")
    dtype: Precision = option("fp32", "Precision of all weights; fp16 or bf16 on a GPU.")
    safety_checker: bool = option(False, "Load the base model's safety checker, which blackens what it flags.")
    jpeg_quality: int = option(95, "Quality of the JPEG files, 1 to 100.")

    def __post_init__(self) -> None:
        at_least(1, "generate", self, "num_images", "batch_size", "num_inference_steps", "jpeg_quality")
        require(self.jpeg_quality <= 100, "generate.jpeg_quality", "at most 100", self.jpeg_quality)
        size = self.image_size
        right = size is None or (len(size) == 2 and all(side > 0 and side % 8 == 0 for side in size))
        require(right, "generate.image_size", "[height, width], multiples of 8", size)


@dataclass
class FilterSection:
    """Which images are kept (filter.py)."""

    calibration_images: int = option(2000, "Target images whose quantiles set the thresholds, chosen by the seed.")
    quantile: float = option(0.01, "Share of the target images that each one-sided threshold would drop.")
    min_width: int = option(64, "Smallest width in pixels.")
    min_height: int = option(128, "Smallest height in pixels.")
    min_contrast: float | None = option(None, "Lowest contrast; the quantile of the target's when left out.")
    min_colour: float | None = option(None, "Lowest variance between channels; the target's quantile if left out.")
    min_sharpness: float | None = option(None, "Lowest variance of the Laplacian; the target's quantile if left out.")
    min_detail: float | None = option(None, "Fewest bytes as a small JPEG; the target's quantile if left out.")
    max_detail: float | None = option(None, "Most bytes as a small JPEG; the target's quantile if left out.")
    duplicate_distance: int = option(12, "Bits of the 256 of a perceptual hash in which a near-duplicate may differ.")
    person_model: str | None = option(None, "Object detector that counts persons; no check when left out.")
    person_threshold: float = option(0.5, "Score from which a detection is a person.")
    min_person_height: float = option(0.5, "Smallest height of the person, as a share of the image.")
    score_model: str | None = option(None, "CLIP-like model of image and text; no check when left out.")
    min_score: float | None = option(None, "Lowest image-text score; the quantile of the target's when left out.")
    batch_size: int = option(32, "Images that a model sees at a time.")
    dtype: Precision = option("fp32", "Precision of the models' weights.")

    def __post_init__(self) -> None:
        at_least(1, "filter", self, "min_width", "min_height", "batch_size")
        at_least(2, "filter", self, "calibration_images")
        share("filter", self, "quantile", "person_threshold", "min_person_height")
        near = 0 <= self.duplicate_distance <= 31
        require(near, "filter.duplicate_distance", "from 0 to 31 bits", self.duplicate_distance)


@dataclass
class CaptionSection:
    """A caption for each image that was kept (caption.py)."""

    model: str | None = option(None, "Image-to-text model: folder or Hub id.")
    prompt: str | None = option(
        "Describe the image in English",
        "What the model is asked: a question, a task token such as <DETAILED_CAPTION> (Florence-2), or the beginning of "
        "the caption (BLIP); none lets a model without chat template start the text.",
    )
    max_new_tokens: int = option(60, "Longest caption in tokens.")
    num_beams: int = option(1, "Beams of the search.")
    clean_style: bool = option(False, "Keep one sentence, in lower case.")
    batch_size: int = option(16, "Images captioned together.")
    dtype: Precision = option("fp32", "Precision of the model's weights.")

    def __post_init__(self) -> None:
        at_least(1, "caption", self, "max_new_tokens", "num_beams", "batch_size")


@dataclass
class GroundSection:
    """Boxes of the captions' phrases, as SDA annotations (ground.py)."""

    model: str | None = option(None, "Zero-shot object detector: folder or Hub id.")
    box_threshold: float = option(0.35, "Lowest score of a box, over all words.")
    text_threshold: float = option(0.35, "Lowest score of a box for the words of its phrase.")
    nms_threshold: float = option(0.7, "Overlap (IoU) from which the weaker of two boxes of a phrase is dropped.")
    duplicate_threshold: float = option(0.9, "Overlap (IoU) from which boxes of two phrases are the same box.")
    min_box_side: float = option(0.02, "Smallest side of a box, as a share of the image.")
    batch_size: int = option(8, "Images grounded together.")
    dtype: Precision = option("fp32", "Precision of the model's weights.")

    def __post_init__(self) -> None:
        at_least(1, "ground", self, "batch_size")
        share("ground", self, "box_threshold", "text_threshold", "nms_threshold")
        share("ground", self, "duplicate_threshold", "min_box_side")


@dataclass
class ReportSection:
    """The page about the result (report.py)."""

    feature_extractor: str | None = option(
        None,
        "Image model whose features measure the domain distance, e.g. a CLIP or DINOv2: folder or Hub id; colours and "
        "edges when left out.",
    )
    images: int = option(2000, "Images of each set that the distances are measured on.")
    note: str | None = option(None, "What the reader of the page must know first.")

    def __post_init__(self) -> None:
        at_least(2, "report", self, "images")


# ---------------------------------------------------------------- checks


def at_least(least: int, section: str, values: Any, *names: str) -> None:
    """Check numbers that have a smallest value; None passes."""
    for name in names:
        value = getattr(values, name)
        require(value is None or value >= least, f"{section}.{name}", f"at least {least}", value)


def share(section: str, values: Any, *names: str) -> None:
    """Check numbers that lie from 0 to 1."""
    for name in names:
        value = getattr(values, name)
        require(0 <= value <= 1, f"{section}.{name}", "from 0 to 1", value)
