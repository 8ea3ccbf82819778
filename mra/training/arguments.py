"""Arguments of the training scripts: dataclasses by theme."""

import dataclasses
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

from mra.common.arguments import option, require
from mra.training.augmentation import OPERATIONS


# Parts of the model that may train at a learning rate of their own (optim.py).
PARTS = ("cross_attention", "late_vision_stages", "late_text_layers", "late_fusion_layers", "mlm_head", "match_head")


# ---------------------------------------------------------------- model and objective


@dataclass
class ModelArguments:
    """Where the weights come from, and changes to the architecture."""

    theme_name: ClassVar[str] = "model"

    model_name_or_path: str | None = option(
        None,
        "Folder or Hub id of an MRA model to start from; a new model when left out, or when `none` overrules "
        "a recipe.",
    )
    model_config: dict[str, Any] | str | None = option(
        None, "Fields of MRAConfig to set: a mapping in a recipe, JSON text or the path of a JSON file here."
    )
    tokenizer_name: str | None = option(
        None, "Folder or Hub id of the BERT tokenizer; the starting model's when left out."
    )
    vision_weights: str | None = option(
        None, "Weights of a new model's Swin: path of the official file, or `timm` for its Hub copy."
    )
    text_weights: str | None = option(None, "Weights of a new model's BERT layers: folder or Hub id of a BERT.")
    image_size: list[int] | None = option(None, "Height and width in pixels.")
    window_size: list[int] | None = option(None, "Side of the Swin window of each stage.")
    drop_rate: float | None = option(None, "Dropout in the Swin.")
    drop_path_rate: float | None = option(None, "Stochastic depth of the last Swin block.")
    projection_type: Literal["part_pooling", "linear"] | None = option(None, "Projection to the shared space.")
    projection_dim: int | None = option(None, "Width of the shared space.")
    head_initialization: Literal["bert", "published"] | None = option(
        None,
        "Where new projections and a new matching head start: `bert` from a normal of initializer_range; "
        "`published` with pooled parts from one of 1e-5, not to be combined with max_grad_norm, the rest from "
        "PyTorch's defaults. The starting model's choice when left out.",
    )
    caption_style: Literal["plain", "clean"] | None = option(
        None,
        "Caption cleaning: `plain` for SDA and CUHK-PEDES, `clean` for ICFG-PEDES and RSTPReid; "
        "the starting model's when left out.",
    )
    attn_implementation: Literal["sdpa", "eager"] = option(
        "sdpa", "Attention kernels of the text, fusion and Swin layers."
    )
    gradient_checkpointing: Literal["none", "vision", "all"] = option(
        "none",
        "Layers whose activations are recomputed in the backward pass to save memory: those of the image encoder, "
        "which hold most of it, or all.",
    )
    torch_compile: bool = option(False, "Compile the layers of Swin, BERT and fusion with TorchInductor.")

    def __post_init__(self) -> None:
        self.model_config = _read_model_config(self.model_config)
        if self.model_name_or_path is not None:
            for name in ("vision_weights", "text_weights"):
                if getattr(self, name) is not None:
                    raise ValueError(
                        f"`{name}` initialises a new model, but `model_name_or_path` is {self.model_name_or_path!r}, "
                        "which has its own weights: leave one of them out"
                    )
        elif self.tokenizer_name is None:
            raise ValueError("Set `model_name_or_path` to start from a model, or `tokenizer_name` to build a new one")


@dataclass
class ObjectiveArguments:
    """Weights and choices of the losses, kept in the model's configuration."""

    theme_name: ClassVar[str] = "objective"

    itm_weight: float = option(1.0, "Weight of the matching loss.")
    mlm_weight: float = option(1.0, "Weight of the masked-language loss.")
    label_smoothing: float = option(0.0, "Smoothing of the contrastive targets, 0 to 1.")
    itc_gradient: Literal["exact", "published"] = option(
        "exact",
        "Gradient of the contrastive loss over several processes: `exact`, or 1 / processes of it "
        "as the published gather gives.",
    )
    itc_chunk_size: int | None = option(
        None,
        "Rows of the similarity matrix that the contrastive loss computes at a time, to save memory with "
        "large batches; all at once if left out.",
    )
    itm_negatives: Literal["local", "all"] = option(
        "local", "Draw negatives for matching from each process's own pairs, as published, or from all."
    )

    def overrides(self) -> dict[str, Any]:
        """Return the fields of `MRAConfig` that these arguments set."""
        return dataclasses.asdict(self)


@dataclass
class PretrainObjectiveArguments(ObjectiveArguments):
    """The objective with region terms."""

    region_weight: float = option(0.8, "Weight of the region losses; 0 leaves them out.")
    region_features: Literal["paper", "published_code"] = option(
        "paper",
        "`paper` pools the patches inside the box and shows their mean to the cross-attention; "
        "`published_code` pools all patches and hides the mean.",
    )


@dataclass
class FinetuneObjectiveArguments(ObjectiveArguments):
    """The objective with terms on the augmented caption."""

    augmentation_weight: float = option(0.8, "Weight of the losses on the augmented caption; 0 leaves them out.")


# ---------------------------------------------------------------- data


@dataclass
class DataArguments:
    """The training set, its batches, image augmentation and masking."""

    theme_name: ClassVar[str] = "data"

    dataset: str = option(None, "Folder or Hub id of the prepared set, as `load_dataset` takes it.")
    per_device_batch_size: int = option(40, "Image-text pairs of each process in a step.")
    num_workers: int = option(4, "Worker processes that prepare batches, for each process.")
    image_backend: Literal["tensor", "pillow"] = option(
        "tensor",
        "What resizes training images: `tensor` is fast, `pillow` gives the published pixels. Crops, boxes and "
        "masks are the same; evaluation resizes as the model's processor does.",
    )
    streaming: bool = option(
        False, "Read the training set piece by piece from its Parquet files, without a copy on disk."
    )
    streaming_buffer: int = option(
        16384, "Rows among which a streamed row is shuffled; about as many are held in memory."
    )
    streaming_lanes: int = option(
        16, "Parts of a streamed epoch that are read side by side; best a multiple of processes x workers."
    )
    flip_probability: float = option(0.5, "Chance of mirroring an image.")
    erasing_probability: float = option(0.6, "Chance of erasing a rectangle of an image.")
    mlm_probability: float = option(0.25, "Share of a caption's tokens to mask.")
    mlm_max_masked: int = option(10, "Largest number of tokens to mask in a caption.")
    mlm_mask_padding: bool = option(False, "Let padding and [SEP] be masked, as the published code does.")
    whole_word_masking: bool = option(True, "Mask all pieces of a word together.")
    skipgram_probability: float = option(0.2, "Chance of masking several words in a row.")
    skipgram_max_length: int = option(3, "Largest number of words masked in a row.")

    def __post_init__(self) -> None:
        require(self.dataset is not None, "dataset", "a folder or Hub id of a prepared set", self.dataset)
        require(self.per_device_batch_size > 0, "per_device_batch_size", "at least 1", self.per_device_batch_size)
        require(self.num_workers >= 0, "num_workers", "0 or more", self.num_workers)
        for name in ("streaming_buffer", "streaming_lanes"):
            require(getattr(self, name) > 0, name, "at least 1", getattr(self, name))


@dataclass
class PretrainDataArguments(DataArguments):
    """SDA and an optional set to validate on."""

    data_fraction: float = option(1.0, "Share of the training set to use, chosen once by the seed.")
    num_train_pairs: int | None = option(
        None,
        "Number of training pairs to use, chosen once by the seed (68126 in the paper's loss table), in place of "
        "data_fraction; all if left out.",
    )
    validation_dataset: str | None = option(
        None, "Prepared person-retrieval set whose validation split chooses the best model; none if left out."
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        require(0 < self.data_fraction <= 1, "data_fraction", "more than 0 and at most 1", self.data_fraction)
        pairs = self.num_train_pairs
        require(pairs is None or pairs > 0, "num_train_pairs", "at least 1, or left out", pairs)
        require(
            pairs is None or self.data_fraction == 1,
            "data_fraction",
            f"1 (all) where `num_train_pairs` chooses {pairs}",
            self.data_fraction,
        )


@dataclass
class FinetuneDataArguments(DataArguments):
    """A person-retrieval set, its captions augmented by EDA, and what to validate on."""

    validation_fraction: float = option(
        0.0,
        "Share of the training identities held out where the set has no validation split; "
        "with 0 the last model is the result.",
    )
    eda_probability: float = option(
        1.0, "Chance of changing a caption at all; an unchanged one repeats the plain losses. Published: 1."
    )
    eda_style: Literal["content_words", "published"] = option(
        "published",
        "Details of the operations: `content_words` neither replaces function words nor inserts synonyms of "
        "them, takes any synonym and any place; `published` does as the published code.",
    )
    eda_operations: list[str] = option(
        list(OPERATIONS), "Changes to choose from; the first two need WordNet (python -m nltk.downloader wordnet)."
    )
    eda_synonym_strength: float = option(0.1, "Share of a caption's words to replace.")
    eda_insertion_strength: float = option(0.1, "Words to insert, relative to its length.")
    eda_swap_strength: float = option(0.1, "Swaps of words, relative to its length.")
    eda_deletion_probability: float = option(0.1, "Chance of dropping each word.")

    def __post_init__(self) -> None:
        super().__post_init__()
        require(
            0 <= self.validation_fraction < 1, "validation_fraction", "from 0 to below 1", self.validation_fraction
        )


# ---------------------------------------------------------------- optimisation and run


@dataclass
class OptimizationArguments:
    """AdamW, its parameter groups and the learning-rate schedule."""

    theme_name: ClassVar[str] = "optimisation"

    learning_rate: float = option(1e-4, "Peak learning rate.")
    final_learning_rate: float = option(0.0, "Where the linear schedule ends.")
    schedule: Literal["linear", "step"] = option(
        "linear",
        "`linear` decay after the warm-up, or `step`: the same, halved at a first drop and to a fifth at a second.",
    )
    schedule_drops: Literal["run", "warmup"] = option(
        "run",
        "Where `schedule: step` drops: `run`, at 40% and 70% of all steps; `warmup`, at 4 and 7 times the "
        "warm-up, as the published code does: the same with a warm-up of a tenth.",
    )
    count_dropped_batch: bool = option(
        False,
        "Let the schedule count the incomplete last batch of each epoch, which no step takes, as the published "
        "code does: the run ends a little before its schedule. Not with max_train_steps.",
    )
    num_warmup_steps: float = option(0.1, "Optimizer steps of the warm-up; below 1, the share of all steps.")
    learning_rate_multiplier: float = option(2.0, "Factor on the learning rate of the `multiplied_parts`.")
    multiplied_parts: list[str] = option([], f"Parts that train at the multiplied rate, of: {', '.join(PARTS)}.")
    weight_decay: float = option(
        0.01, "Decoupled weight decay; biases, the norms of Swin and BERT and the position tables have none."
    )
    adam_beta1: float = option(0.9, "Decay of AdamW's first moment.")
    adam_beta2: float = option(0.98, "Decay of AdamW's second moment.")
    adam_epsilon: float = option(1e-8, "Epsilon of AdamW.")
    max_grad_norm: float | None = option(
        None, "Clip the gradient to this norm; not clipped when left out, as published."
    )

    def __post_init__(self) -> None:
        unknown = [part for part in self.multiplied_parts if part not in PARTS]
        require(not unknown, "multiplied_parts", f"names among {', '.join(PARTS)}", ", ".join(unknown))
        require(self.num_warmup_steps >= 0, "num_warmup_steps", "0 or more", self.num_warmup_steps)
        require(
            self.num_warmup_steps < 1 or float(self.num_warmup_steps).is_integer(),
            "num_warmup_steps",
            "a whole number of steps, or a share below 1",
            self.num_warmup_steps,
        )
        require(
            self.schedule == "linear" or self.final_learning_rate == 0,
            "final_learning_rate",
            "0 with `schedule: step`, which always ends at 0",
            self.final_learning_rate,
        )
        require(
            self.num_warmup_steps > 0 or (self.schedule, self.schedule_drops) != ("step", "warmup"),
            "num_warmup_steps",
            "more than 0 with `schedule_drops: warmup`, which drops at its multiples",
            self.num_warmup_steps,
        )


@dataclass
class RunArguments:
    """Length, precision, logging and checkpoints."""

    theme_name: ClassVar[str] = "run"

    output_dir: str = option(None, "Folder of checkpoints, metrics and models.")
    num_train_epochs: int = option(30, "Passes over the training set; 0 saves the start.")
    max_train_steps: int | None = option(
        None, "Optimizer steps of the run and of its schedule, instead of whole epochs."
    )
    gradient_accumulation_steps: int = option(
        1,
        "Batches averaged into one optimizer step. Negatives stay within a batch; the last step of an epoch "
        "averages those that are left.",
    )
    mixed_precision: Literal["no", "fp16", "bf16"] | None = option(
        None, "Precision of the matrix products; what `accelerate` is set to when left out."
    )
    seed: int = option(42, "Seed of initialisation, data order, augmentation and dropout.")
    logging_steps: int = option(50, "Optimizer steps between two lines of metrics.jsonl.")
    log_with: list[str] = option([], "Trackers that receive the metrics, e.g. tensorboard or wandb.")
    project_name: str = option("mra", "Project that trackers file the run under.")
    save_steps: int | None = option(None, "Optimizer steps between two checkpoints.")
    save_minutes: float | None = option(
        30.0, "Minutes between two checkpoints, looked at on logging steps; 0 for none."
    )
    save_total_limit: int = option(2, "Checkpoints that are kept, the newest.")
    resume: str | None = option(
        None,
        "`latest` to continue from the newest checkpoint in output_dir (from the start if there is none; a "
        "damaged one is an error), `latest_whole` to pass over damaged ones with a warning, for queues, or a "
        "checkpoint's path.",
    )
    resume_without_manifest: bool = option(
        False,
        "Resume from a checkpoint without manifest.json, as earlier versions saved them; only what "
        "the files themselves allow is verified.",
    )
    overwrite_output_dir: bool = option(
        False, "Restart in an output_dir that holds another run, whose files are removed; not with `resume`."
    )

    def __post_init__(self) -> None:
        require(self.output_dir is not None, "output_dir", "a folder", self.output_dir)
        require(self.num_train_epochs >= 0, "num_train_epochs", "at least 0", self.num_train_epochs)
        for name in ("gradient_accumulation_steps", "logging_steps", "save_total_limit"):
            require(getattr(self, name) > 0, name, "at least 1", getattr(self, name))
        for name in ("max_train_steps", "save_steps"):
            value = getattr(self, name)
            require(value is None or value > 0, name, "at least 1, or left out", value)


@dataclass
class EvaluationArguments:
    """Evaluation on the validation split, which chooses the best model by R@1."""

    theme_name: ClassVar[str] = "evaluation"

    eval_every_epochs: int = option(1, "Epochs between two evaluations; the final epoch is always evaluated.")
    eval_rerank_k: int = option(128, "Images re-ranked for each query; 0 chooses by the similarity alone.")
    eval_flip: bool = option(True, "Average each image with its mirror image.")
    eval_batch_size: int = option(64, "Images or captions encoded at a time.")
    eval_dtype: Literal["training", "float32"] = option(
        "training",
        "Precision of the evaluation: that of the `training`, or `float32`, as published, which is slower where "
        "training runs in half precision.",
    )
    eval_score_fusion: Literal["auto", "single", "published", "posterior"] = option(
        "auto",
        "How matching scores and similarity are combined: `auto` chooses fusion and weight on the "
        "validation split at each evaluation, and saves them with the model.",
    )
    eval_match_weight: float | None = option(
        None, "Weight of the matching log-odds in `posterior`; chosen with the fusion when left out."
    )

    def __post_init__(self) -> None:
        require(self.eval_every_epochs > 0, "eval_every_epochs", "at least 1", self.eval_every_epochs)
        require(self.eval_rerank_k >= 0, "eval_rerank_k", "0 or more", self.eval_rerank_k)
        require(self.eval_batch_size > 0, "eval_batch_size", "at least 1", self.eval_batch_size)
        weight = self.eval_match_weight
        require(weight is None or 0 <= weight < math.inf, "eval_match_weight", "0 or more, or left out", weight)
        require(
            weight is None or self.eval_score_fusion == "posterior",
            "eval_score_fusion",
            "posterior with eval_match_weight, which no other fusion has",
            self.eval_score_fusion,
        )


@dataclass
class HubArguments:
    """Publication of the result."""

    theme_name: ClassVar[str] = "hub"

    push_to_hub: bool = option(False, "Push the resulting model to the Hub at the end.")
    hub_model_id: str | None = option(None, "Repository to push to, `user/name`.")
    hub_private: bool = option(False, "Make a new repository private.")

    def __post_init__(self) -> None:
        require(
            not self.push_to_hub or self.hub_model_id is not None,
            "hub_model_id",
            "`user/name` with push_to_hub",
            self.hub_model_id,
        )


# ---------------------------------------------------------------- conversion


@dataclass
class ConversionArguments:
    """What to convert."""

    checkpoint: str = option(help="Released .pth file; with --to_published, a folder.")
    output: str = option(help="Folder to write; with --to_published, a .pth file.")
    to_published: bool = option(False, "Convert a folder back to the published layout.")
    image_size: list[int] | None = option(None, "Height and width, where the checkpoint does not record them.")
    num_attention_heads: int | None = option(
        None, "Heads of each BERT layer, where the checkpoint does not record them."
    )
    tokenizer: str | None = option(None, "Hub id or folder (bert-base-uncased for the released ones).")
    overwrite: bool = option(False, "Replace what is at --output.")
    push_to_hub: str | None = option(None, "Repository to push the folder to, user/name.")

    def __post_init__(self) -> None:
        of_folders = self.tokenizer, self.push_to_hub, self.image_size, self.num_attention_heads
        if self.to_published and any(value is not None for value in of_folders):
            raise ValueError(
                "`to_published` writes a .pth alone: leave out tokenizer, push_to_hub, image_size and num_attention_heads"
            )
        if self.image_size is not None and len(self.image_size) != 2:
            raise ValueError(f"`image_size` must be height and width, got {self.image_size}")


def _read_model_config(value: Any) -> dict[str, Any]:
    if value is None:
        return {}
    if isinstance(value, dict):
        return value
    text = value
    if not value.lstrip().startswith("{"):
        if not Path(value).is_file():
            raise ValueError(f"`model_config` must be a mapping, JSON text or the path of a JSON file, got {value!r}")
        text = Path(value).read_text(encoding="utf-8")
    try:
        parsed = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"`model_config` is not valid JSON: {error}") from None
    if not isinstance(parsed, dict):
        raise ValueError(f"`model_config` must be a mapping of MRAConfig fields, got a {type(parsed).__name__}")
    return parsed


# ---------------------------------------------------------------- scripts


PRETRAINING = (
    ModelArguments,
    PretrainObjectiveArguments,
    PretrainDataArguments,
    OptimizationArguments,
    RunArguments,
    EvaluationArguments,
    HubArguments,
)
FINETUNING = (
    ModelArguments,
    FinetuneObjectiveArguments,
    FinetuneDataArguments,
    OptimizationArguments,
    RunArguments,
    EvaluationArguments,
    HubArguments,
)
