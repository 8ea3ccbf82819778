"""Arguments of the data factory, a dataclass for each section of the configuration."""
# ruff: noqa: RUF009 (`setting` gives a dataclass field)

from dataclasses import dataclass, field
from typing import Any, Literal

from mra.training.augmentation import OPERATIONS


Precision = Literal["fp32", "fp16", "bf16"]


def setting(default: Any, help: str, decides: bool = True) -> Any:
    """
    A field of a section.

    Args:
        default: its value where the configuration is silent; a list is copied.
        help: one sentence for `--help`.
        decides: whether the stage's result depends on it; if so, a stage begun with another value is not continued.
    """
    metadata = {"help": help, "decides": decides}
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata=metadata)
    return field(default=default, metadata=metadata)


# ---------------------------------------------------------------- sections


@dataclass
class CommonSection:
    """What several stages share."""

    work_dir: str | None = setting(None, "Folder of everything that the factory makes.", decides=False)
    dataset: str | None = setting(
        None, "Target set with images and captions, as `mra prepare pedes` writes it: folder or Hub id."
    )
    seed: int = setting(0, "Seed of training, prompts and images.")
    base_model: str | None = setting(
        None, "Stable Diffusion pipeline to align with the target set: folder or Hub id. There is no default."
    )
    base_revision: str | None = setting(None, "Commit or branch of the base model on the Hub.")
    image_size: list[int] = setting([384, 256], "Height and width in pixels, multiples of 8.")
    condition: Literal["none", "white", "folder"] = setting(
        "white",
        "Control image: `none` is a zero image that the ControlNet cannot see, `white` the published one, `folder` "
        "takes `condition_dir`.",
    )
    condition_dir: str | None = setting(
        None, "Condition images (edges, poses): one file named after the row of the train split each, e.g. 17.png."
    )
    shard: str = setting("0/1", "Share of the work of this run, `index/count`, for jobs on machines apart.", False)

    def __post_init__(self):
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

    num_train_epochs: int = setting(3, "Passes over the target pairs; 0 keeps the untrained ControlNet.")
    max_train_steps: int | None = setting(None, "Optimizer steps instead of whole epochs.")
    per_device_batch_size: int = setting(4, "Pairs of each process in a step.")
    gradient_accumulation_steps: int = setting(1, "Batches averaged into one optimizer step.")
    learning_rate: float = setting(1e-5, "Peak learning rate of AdamW.")
    num_warmup_steps: float = setting(500, "Optimizer steps of the warm-up; below 1, the share of all steps.")
    final_learning_rate: float | None = setting(
        None, "Where the linear schedule ends; the rate stays at its peak when left out."
    )
    weight_decay: float = setting(0.01, "Decoupled weight decay.")
    adam_beta1: float = setting(0.9, "Decay of AdamW's first moment.")
    adam_beta2: float = setting(0.999, "Decay of AdamW's second moment.")
    max_grad_norm: float | None = setting(1.0, "Clip the gradient to this norm.")
    caption_dropout: float = setting(0.0, "Share of captions replaced by nothing, which guidance is trained on.")
    flip_probability: float = setting(0.0, "Chance of mirroring an image; captions that say left or right never are.")
    data_fraction: float = setting(1.0, "Share of the target pairs to use, chosen once by the seed.")
    mixed_precision: Literal["no", "fp16", "bf16"] | None = setting(
        None, "Precision of the matrix products; what `accelerate` is set to when left out."
    )
    gradient_checkpointing: bool = setting(False, "Recompute activations: less memory, more time.", decides=False)
    num_workers: int = setting(4, "Worker processes that prepare batches, for each process.", decides=False)
    logging_steps: int = setting(50, "Optimizer steps between two lines of metrics.jsonl.")
    save_steps: int | None = setting(1000, "Optimizer steps between two checkpoints.", decides=False)
    save_total_limit: int = setting(2, "Checkpoints that are kept, the newest.", decides=False)
    resume: str = setting(
        "latest",
        "`latest` to go on from the newest checkpoint (a damaged one is an error), `latest_whole` to pass over damaged "
        "ones with a warning, or a checkpoint's path.",
        decides=False,
    )
    resume_without_manifest: bool = setting(
        False, "Go on from a checkpoint without manifest.json, as earlier versions saved them.", decides=False
    )
    validation_steps: int | None = setting(1000, "Optimizer steps between two validations; the last step always is.")
    validation_pairs: int = setting(64, "Pairs of the validation split whose error is measured; 0 for none.")
    validation_draws: int = setting(2, "Noises and timesteps per pair, the same at every validation.")
    validation_images: int = setting(4, "Pictures drawn at every validation; 0 for none.")
    log_with: list[str] = setting([], "Trackers that receive the metrics, e.g. tensorboard.", decides=False)
    push_to_hub: bool = setting(False, "Push the trained ControlNet to the Hub.", decides=False)
    hub_model_id: str | None = setting(None, "Repository to push to, `user/name`.", decides=False)
    hub_private: bool = setting(False, "Make a new repository private.", decides=False)

    def __post_init__(self):
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

    mode: Literal["attributes", "eda"] = setting(
        "attributes",
        "`attributes` changes what a person wears by rules; `eda` changes words at random (Wei and Zou 2019).",
    )
    prompts_per_caption: int = setting(20, "Prompts made of each caption, the caption itself the first of them.")
    strength: float = setting(0.5, "Share of a caption's attributes (eda: words) that one prompt changes.")
    eda_operations: list[str] = setting(list(OPERATIONS), "Changes that `eda` chooses from.")
    max_captions: int | None = setting(None, "Captions to use, the first of the train split; all when left out.")

    def __post_init__(self):
        at_least(1, "augment", self, "prompts_per_caption", "max_captions")
        share("augment", self, "strength")


@dataclass
class GenerateSection:
    """One image for each prompt (generate.py)."""

    controlnet: str | None = setting(
        None, "ControlNet to use in place of the trained one of the work folder: folder or Hub id."
    )
    num_images: int | None = setting(None, "Prompts to draw, spread evenly over all; all when left out.")
    batch_size: int = setting(16, "Images drawn together. It rounds the images otherwise, so it stays for a set.")
    image_size: list[int] | None = setting(None, "Height and width, multiples of 8; those of `common` if left out.")
    num_inference_steps: int = setting(30, "Denoising steps.")
    scheduler: Literal["ddim", "euler", "dpm", "unipc"] = setting(
        "unipc", "Sampler; noise schedule and prediction type stay those of the base model."
    )
    guidance_scale: float = setting(7.5, "Weight of classifier-free guidance; 1 turns it off.")
    controlnet_scale: float = setting(1.0, "Factor on what the ControlNet adds.")
    prompt_suffix: str = setting("", "Text added to every prompt.")
    negative_prompt: str | None = setting(None, "What guidance leads away from.")
    dtype: Precision = setting("fp32", "Precision of all weights; fp16 or bf16 on a GPU.")
    safety_checker: bool = setting(False, "Load the base model's safety checker, which blackens what it flags.")
    jpeg_quality: int = setting(95, "Quality of the JPEG files, 1 to 100.")

    def __post_init__(self):
        at_least(1, "generate", self, "num_images", "batch_size", "num_inference_steps", "jpeg_quality")
        require(self.jpeg_quality <= 100, "generate.jpeg_quality", "at most 100", self.jpeg_quality)
        size = self.image_size
        right = size is None or (len(size) == 2 and all(side > 0 and side % 8 == 0 for side in size))
        require(right, "generate.image_size", "[height, width], multiples of 8", size)


@dataclass
class FilterSection:
    """Which images are kept (filter.py)."""

    calibration_images: int = setting(2000, "Target images whose quantiles set the thresholds, chosen by the seed.")
    quantile: float = setting(0.01, "Share of the target images that each one-sided threshold would drop.")
    min_width: int = setting(64, "Smallest width in pixels.")
    min_height: int = setting(128, "Smallest height in pixels.")
    min_contrast: float | None = setting(None, "Lowest contrast; the quantile of the target's when left out.")
    min_colour: float | None = setting(None, "Lowest variance between channels; the target's quantile if left out.")
    min_sharpness: float | None = setting(None, "Lowest variance of the Laplacian; the target's quantile if left out.")
    min_detail: float | None = setting(None, "Fewest bytes as a small JPEG; the target's quantile if left out.")
    max_detail: float | None = setting(None, "Most bytes as a small JPEG; the target's quantile if left out.")
    duplicate_distance: int = setting(12, "Bits of the 256 of a perceptual hash in which a near-duplicate may differ.")
    person_model: str | None = setting(None, "Object detector that counts persons; no check when left out.")
    person_threshold: float = setting(0.5, "Score from which a detection is a person.")
    min_person_height: float = setting(0.5, "Smallest height of the person, as a share of the image.")
    score_model: str | None = setting(None, "CLIP-like model of image and text; no check when left out.")
    min_score: float | None = setting(None, "Lowest image-text score; the quantile of the target's when left out.")
    batch_size: int = setting(32, "Images that a model sees at a time.")
    dtype: Precision = setting("fp32", "Precision of the models' weights.")

    def __post_init__(self):
        at_least(1, "filter", self, "min_width", "min_height", "batch_size")
        at_least(2, "filter", self, "calibration_images")
        share("filter", self, "quantile", "person_threshold", "min_person_height")
        near = 0 <= self.duplicate_distance <= 31
        require(near, "filter.duplicate_distance", "from 0 to 31 bits", self.duplicate_distance)


@dataclass
class CaptionSection:
    """A caption for each image that was kept (caption.py)."""

    model: str | None = setting(None, "Image-to-text model: folder or Hub id.")
    prompt: str | None = setting(
        "Describe the image in English",
        "What the model is asked: a question, a task token such as <DETAILED_CAPTION> (Florence-2), or the beginning of "
        "the caption (BLIP); none lets a model without chat template begin by itself.",
    )
    max_new_tokens: int = setting(60, "Longest caption in tokens.")
    num_beams: int = setting(1, "Beams of the search.")
    clean_style: bool = setting(False, "Keep one sentence, in lower case.")
    batch_size: int = setting(16, "Images captioned together.")
    dtype: Precision = setting("fp32", "Precision of the model's weights.")

    def __post_init__(self):
        at_least(1, "caption", self, "max_new_tokens", "num_beams", "batch_size")


@dataclass
class GroundSection:
    """Boxes of the captions' phrases, as SDA annotations (ground.py)."""

    model: str | None = setting(None, "Zero-shot object detector: folder or Hub id.")
    box_threshold: float = setting(0.35, "Lowest score of a box, over all words.")
    text_threshold: float = setting(0.35, "Lowest score of a box for the words of its phrase.")
    nms_threshold: float = setting(0.7, "Overlap (IoU) from which the weaker of two boxes of a phrase is dropped.")
    duplicate_threshold: float = setting(0.9, "Overlap (IoU) from which boxes of two phrases are the same box.")
    min_box_side: float = setting(0.02, "Smallest side of a box, as a share of the image.")
    batch_size: int = setting(8, "Images grounded together.")
    dtype: Precision = setting("fp32", "Precision of the model's weights.")

    def __post_init__(self):
        at_least(1, "ground", self, "batch_size")
        share("ground", self, "box_threshold", "text_threshold", "nms_threshold")
        share("ground", self, "duplicate_threshold", "min_box_side")


@dataclass
class ReportSection:
    """The page about the result (report.py)."""

    feature_extractor: str | None = setting(
        None,
        "Image model whose features measure the domain distance, e.g. a CLIP or DINOv2: folder or Hub id; colours and "
        "edges when left out.",
    )
    images: int = setting(2000, "Images of each set that the distances are measured on.")
    note: str | None = setting(None, "What the reader of the page must know first.")

    def __post_init__(self):
        at_least(2, "report", self, "images")


# ---------------------------------------------------------------- checks


def require(holds: bool, name: str, expected: str, got: Any) -> None:
    """
    Checks one argument.

    Raises:
        ValueError: naming it, what was expected and what came.
    """
    if not holds:
        raise ValueError(f"`{name}` must be {expected}, got {got!r}: set it in the configuration or as {name}=VALUE.")


def at_least(least: int, section: str, values: Any, *names: str) -> None:
    """Checks numbers that have a least value; None is left alone."""
    for name in names:
        value = getattr(values, name)
        require(value is None or value >= least, f"{section}.{name}", f"at least {least}", value)


def share(section: str, values: Any, *names: str) -> None:
    """Checks numbers that lie from 0 to 1."""
    for name in names:
        value = getattr(values, name)
        require(0 <= value <= 1, f"{section}.{name}", "from 0 to 1", value)
