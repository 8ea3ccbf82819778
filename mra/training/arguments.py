"""Arguments of the training scripts: dataclasses by theme."""

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

from mra.common.arguments import option, require
from mra.training.augmentation import OPERATIONS


# Parts of the model that can have their own learning rate (optim.py).
PARTS = ("cross_attention", "late_vision_stages", "late_text_layers", "late_fusion_layers", "mlm_head", "match_head")


# ---------------------------------------------------------------- model and objective


@dataclass
class ModelArguments:
    """Where the weights come from, and changes to the architecture."""

    theme_name: ClassVar[str] = "model"

    model_name_or_path: str | None = option(
        None,
        "folder or Hub id of the MRA model to start from; a new model when left out, or with `none`",
    )
    model_config: dict[str, Any] | str | None = option(
        None,
        "fields of MRAConfig to set: a mapping in a recipe; JSON text or the path of a JSON file on the command line",
    )
    tokenizer_name: str | None = option(
        None, "folder or Hub id of the BERT tokenizer; the starting model's when left out"
    )
    vision_weights: str | None = option(
        None, "initial Swin weights of a new model: path of the official file, or `timm` for its copy on the Hub"
    )
    text_weights: str | None = option(None, "initial weights of a new model's BERT layers: folder or Hub id of a BERT")
    image_size: list[int] | None = option(None, "height and width of images in pixels")
    window_size: list[int] | None = option(None, "window side of each Swin stage, in tokens")
    drop_rate: float | None = option(None, "dropout rate in the Swin")
    drop_path_rate: float | None = option(None, "drop rate of the last Swin block (stochastic depth)")
    projection_type: Literal["part_pooling", "linear"] | None = option(None, "kind of projection to the shared space")
    projection_dim: int | None = option(None, "dimension of the shared space")
    head_initialization: Literal["bert", "published"] | None = option(
        None,
        "initialisation of new projections and matching heads: `bert` draws from a normal of deviation "
        "initializer_range; `published` draws pooled parts from one of 1e-5 (not with max_grad_norm) and keeps PyTorch's "
        "defaults elsewhere; the starting model's choice when left out",
    )
    caption_style: Literal["plain", "clean"] | None = option(
        None,
        "cleaning of captions: `plain` for SDA and CUHK-PEDES, `clean` for ICFG-PEDES and RSTPReid; "
        "the starting model's when left out",
    )
    attn_implementation: Literal["sdpa", "eager"] = option(
        "sdpa", "attention implementation of the text, fusion and Swin layers"
    )
    gradient_checkpointing: Literal["none", "selective", "vision", "all"] = option(
        "none",
        "what is recomputed in the backward pass to save memory: `selective` all but the results of wide linear layers, "
        "about a tenth of the time of a step; `vision` whole layers of the image encoder; `all` every layer",
    )
    chunk_size: int | None = option(
        None,
        "images whose activations are held at a time, and eight times as many texts and pairs: the step of a large "
        "batch in little memory, with its exact losses and gradients, for one more forward pass; all at once when left out",
    )
    torch_compile: bool = option(False, "compile the Swin, BERT and fusion layers with TorchInductor")

    def __post_init__(self) -> None:
        self.model_config = _read_model_config(self.model_config)
        size = self.chunk_size
        require(size is None or size > 0, "chunk_size", "at least 1, or left out", size)
        if self.model_name_or_path is not None:
            for name in ("vision_weights", "text_weights"):
                if getattr(self, name) is not None:
                    raise ValueError(
                        f"`{name}` initialises a new model, but `model_name_or_path` is {self.model_name_or_path!r}, "
                        "which has its own weights: leave one of them out"
                    )
        elif self.tokenizer_name is None:
            raise ValueError("set `model_name_or_path` to start from a model, or `tokenizer_name` to build a new one")


@dataclass
class ObjectiveArguments:
    """Weights and choices of the losses, stored in the model's configuration."""

    theme_name: ClassVar[str] = "objective"

    itm_weight: float = option(1.0, "weight of the matching loss")
    mlm_weight: float = option(1.0, "weight of the masked-language loss")
    label_smoothing: float = option(0.0, "label smoothing of the contrastive targets, 0 to 1")
    itc_gradient: Literal["exact", "published"] = option(
        "exact",
        "gradient of the contrastive loss over several processes: `exact`, or `published`: 1 / processes "
        "of it, as in the published code",
    )
    itc_chunk_size: int | None = option(
        None,
        "rows of the similarity matrix computed at a time by the contrastive loss, to save memory with "
        "large batches; all at once when left out",
    )
    itm_negatives: Literal["local", "all"] = option(
        "local", "pairs that matching negatives are drawn from: those of the process, as published, or all"
    )

    def overrides(self) -> dict[str, Any]:
        """Return these arguments as fields of `MRAConfig`."""
        return dataclasses.asdict(self)


@dataclass
class PretrainObjectiveArguments(ObjectiveArguments):
    """Objective with region terms."""

    region_weight: float = option(0.8, "weight of the region losses; 0 disables them")
    region_features: Literal["paper", "published_code"] = option(
        "paper",
        "region embedding: `paper` pools the patches inside the box and lets cross-attention see their mean; "
        "`published_code` pools all patches and hides the mean",
    )


@dataclass
class FinetuneObjectiveArguments(ObjectiveArguments):
    """Objective with terms on the augmented caption."""

    augmentation_weight: float = option(0.8, "weight of the losses on the augmented caption; 0 disables them")


# ---------------------------------------------------------------- data


@dataclass
class DataArguments:
    """The training set, its batches, image augmentation and masking."""

    theme_name: ClassVar[str] = "data"

    dataset: str = option(None, "folder or Hub id of the prepared dataset")
    per_device_batch_size: int = option(40, "image-text pairs per process and batch")
    num_workers: int = option(4, "data-loading workers per process")
    image_backend: Literal["tensor", "pillow"] = option(
        "tensor",
        "library that resizes training images: `tensor` is fast, `pillow` gives the published pixels; crops, boxes "
        "and masks are the same, and evaluation always uses the model's processor",
    )
    streaming: bool = option(False, "stream the training set from its Parquet files, without a copy on disk")
    streaming_buffer: int = option(16384, "shuffle window of a streamed set in rows; about as many are held in memory")
    streaming_lanes: int = option(
        16, "parts of a streamed epoch read in parallel; best a multiple of processes x workers"
    )
    flip_probability: float = option(0.5, "probability of mirroring an image")
    erasing_probability: float = option(0.6, "probability of erasing a rectangle of an image")
    mlm_probability: float = option(0.25, "share of a caption's tokens to mask")
    mlm_max_masked: int = option(10, "most tokens to mask in a caption")
    mlm_mask_padding: bool = option(False, "also mask padding and [SEP], as the published code does")
    whole_word_masking: bool = option(True, "mask all pieces of a word together")
    skipgram_probability: float = option(0.2, "probability of masking several words in a row")
    skipgram_max_length: int = option(3, "most words masked in a row")

    def __post_init__(self) -> None:
        require(self.dataset is not None, "dataset", "a folder or Hub id of a prepared set", self.dataset)
        require(self.per_device_batch_size > 0, "per_device_batch_size", "at least 1", self.per_device_batch_size)
        require(self.num_workers >= 0, "num_workers", "0 or more", self.num_workers)
        for name in ("streaming_buffer", "streaming_lanes"):
            require(getattr(self, name) > 0, name, "at least 1", getattr(self, name))


@dataclass
class PretrainDataArguments(DataArguments):
    """SDA and an optional dataset to validate on."""

    data_fraction: float = option(1.0, "share of the training set to use, chosen once by the seed")
    num_train_pairs: int | None = option(
        None,
        "number of training pairs to use, chosen once by the seed (68126 in the paper's loss table), instead of "
        "data_fraction; all when left out",
    )
    validation_dataset: str | None = option(
        None,
        "folder or Hub id of the prepared dataset with the validation split that selects the best model; none when left out",
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
    """A person-retrieval dataset, the augmentation of its captions by EDA, and the validation data."""

    validation_fraction: float = option(
        0.0,
        "share of the training identities held out for validation if the dataset has no validation split; "
        "0 holds out none and keeps the last model",
    )
    eda_probability: float = option(
        1.0, "probability of changing a caption; an unchanged one repeats the plain losses"
    )
    eda_style: Literal["content_words", "published"] = option(
        "published",
        "variant of the operations: `content_words` leaves function words alone and takes any synonym and any "
        "place; `published` follows the published code",
    )
    eda_operations: list[str] = option(
        list(OPERATIONS), "operations to choose from; the first two need WordNet (python -m nltk.downloader wordnet)"
    )
    eda_synonym_strength: float = option(0.1, "share of a caption's words to replace")
    eda_insertion_strength: float = option(0.1, "number of words to insert, relative to the caption's length")
    eda_swap_strength: float = option(0.1, "number of word swaps, relative to the caption's length")
    eda_deletion_probability: float = option(0.1, "probability of dropping each word")

    def __post_init__(self) -> None:
        super().__post_init__()
        require(
            0 <= self.validation_fraction < 1, "validation_fraction", "from 0 to below 1", self.validation_fraction
        )


# ---------------------------------------------------------------- optimisation and run


@dataclass
class OptimizationArguments:
    """AdamW, its parameter groups, the learning-rate schedule and the average of the weights."""

    theme_name: ClassVar[str] = "optimisation"

    learning_rate: float = option(1e-4, "peak learning rate")
    final_learning_rate: float = option(0.0, "learning rate at the end of the linear schedule")
    schedule: Literal["linear", "step"] = option(
        "linear",
        "decay after the warm-up: `linear`, or `step`: linear, multiplied by 1/2 from a first drop and 1/5 from a second",
    )
    schedule_drops: Literal["run", "warmup"] = option(
        "run",
        "when `schedule: step` drops: `run`, at 40% and 70% of all steps; `warmup`, at 4 and 7 times the "
        "warm-up, as in the published code (the same for a warm-up of 10%)",
    )
    count_dropped_batch: bool = option(
        False,
        "count the dropped last batch of each epoch in the schedule, as the published code does, so that the run "
        "ends slightly before its schedule; not with max_train_steps",
    )
    num_warmup_steps: float = option(0.1, "warm-up in optimizer steps, or below 1 as a share of all steps")
    learning_rate_multiplier: float = option(2.0, "factor on the learning rate of multiplied_parts")
    multiplied_parts: list[str] = option([], f"parts with the multiplied learning rate, from: {', '.join(PARTS)}")
    weight_decay: float = option(
        0.01, "decoupled weight decay, except for biases, position tables and the norms of Swin and BERT"
    )
    adam_beta1: float = option(0.9, "decay of AdamW's first moment")
    adam_beta2: float = option(0.98, "decay of AdamW's second moment")
    adam_epsilon: float = option(1e-8, "epsilon of AdamW")
    ema_decay: float | None = option(
        None,
        "share that the moving average of the weights keeps at each step, e.g. 0.999; it is validated and saved as best_ema "
        "and final_ema (not with ZeRO-3 or FSDP); no average when left out",
    )
    max_grad_norm: float | None = option(None, "norm to clip the gradient to; no clipping when left out, as published")

    def __post_init__(self) -> None:
        unknown = [part for part in self.multiplied_parts if part not in PARTS]
        require(not unknown, "multiplied_parts", f"names among {', '.join(PARTS)}", ", ".join(unknown))
        decay = self.ema_decay
        require(decay is None or 0 < decay < 1, "ema_decay", "between 0 and 1, or left out", decay)
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
    """Length, precision, BatchNorm, logging and checkpoints."""

    theme_name: ClassVar[str] = "run"

    output_dir: str = option(None, "folder for checkpoints, metrics and models")
    num_train_epochs: int = option(30, "epochs; 0 saves the initial model")
    max_train_steps: int | None = option(None, "optimizer steps of run and schedule, overriding num_train_epochs")
    gradient_accumulation_steps: int = option(
        1,
        "batches averaged per optimizer step; negatives come from one batch, and the last step of an epoch averages "
        "the remaining batches",
    )
    mixed_precision: Literal["no", "fp16", "bf16"] | None = option(
        None, "precision of autocast; the setting of `accelerate` when left out"
    )
    sync_batchnorm: bool = option(
        False,
        "share the statistics of BatchNorm among the processes, which must be on GPUs; as published, each has its own",
    )
    seed: int = option(42, "seed of initialisation, data order, augmentation and dropout")
    logging_steps: int = option(50, "optimizer steps between lines of metrics.jsonl")
    log_with: list[str] = option([], "trackers that receive the metrics, e.g. tensorboard or wandb")
    project_name: str = option("mra", "project name for the trackers")
    save_steps: int | None = option(None, "optimizer steps between checkpoints; none when left out")
    save_minutes: float | None = option(30.0, "minutes between checkpoints, checked on logging steps; 0 for none")
    save_total_limit: int = option(2, "number of newest checkpoints to keep")
    resume: str | None = option(
        None,
        "checkpoint to continue from: its path; `latest`, the newest in output_dir (the start if there is none; a "
        "damaged one is an error); or `latest_whole`, the newest undamaged one, with a warning for others, for job queues",
    )
    resume_without_manifest: bool = option(
        False,
        "resume from a checkpoint of an earlier version, without manifest.json; its files are only partly verified",
    )
    overwrite_output_dir: bool = option(
        False, "remove the files of another run in output_dir and start again; not with resume"
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
    """Evaluation on the validation split, which selects the best model."""

    theme_name: ClassVar[str] = "evaluation"

    eval_every_epochs: int = option(1, "epochs between evaluations; the final epoch is always evaluated")
    eval_queries: int | None = option(
        None,
        "captions that validation uses as queries to all images, drawn once by the seed; it then costs less and says less; "
        "all when left out",
    )
    eval_whole_epochs: int = option(
        3,
        "last epochs validated with all captions despite eval_queries; the best model is then one of these, because the "
        "figures of earlier epochs are not comparable; 0 for none",
    )
    eval_rerank_k: int = option(128, "images re-ranked per query; 0 ranks by similarity alone")
    eval_flip: bool = option(True, "use the mirror image of each image too")
    eval_batch_size: int = option(64, "images or captions per forward pass")
    selection_metric: Literal["R1", "mAP", "mean"] = option(
        "R1", "metric that selects the best model, after re-ranking if it is done: R@1, mAP, or the mean of both"
    )
    eval_dtype: Literal["training", "float32"] = option(
        "training",
        "precision of the evaluation: that of the `training`, or `float32`, as published, which is slower than "
        "half precision",
    )
    eval_score_fusion: Literal["auto", "single", "published", "posterior"] = option(
        "auto",
        "fusion of matching scores and similarity; `auto` chooses fusion and weight on the validation split at "
        "each evaluation and saves them with the model",
    )
    eval_match_weight: float | None = option(
        None, "weight of the matching log-odds in `posterior`; chosen on validation when left out"
    )

    def __post_init__(self) -> None:
        require(self.eval_every_epochs > 0, "eval_every_epochs", "at least 1", self.eval_every_epochs)
        queries = self.eval_queries
        require(queries is None or queries > 0, "eval_queries", "at least 1, or left out", queries)
        require(self.eval_whole_epochs >= 0, "eval_whole_epochs", "0 or more", self.eval_whole_epochs)
        require(self.eval_rerank_k >= 0, "eval_rerank_k", "0 or more", self.eval_rerank_k)
        require(self.eval_batch_size > 0, "eval_batch_size", "at least 1", self.eval_batch_size)
        weight = self.eval_match_weight
        require(weight is None or weight >= 0, "eval_match_weight", "0 or more, or left out", weight)
        require(
            weight is None or self.eval_score_fusion == "posterior",
            "eval_score_fusion",
            "posterior with eval_match_weight, which no other fusion has",
            self.eval_score_fusion,
        )


@dataclass
class HubArguments:
    """Upload of the result to the Hub."""

    theme_name: ClassVar[str] = "hub"

    push_to_hub: bool = option(False, "push the resulting model to the Hub at the end")
    hub_model_id: str | None = option(None, "repository to push to, `user/name`")
    hub_private: bool = option(False, "create the repository as private")

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
    """Checkpoint to convert, and the output."""

    checkpoint: str = option(help="released .pth file; a model folder with --to_published")
    output: str = option(help="folder to write; a .pth file with --to_published")
    to_published: bool = option(False, "convert a folder back to the published layout")
    image_size: list[int] | None = option(None, "height and width in pixels, if the checkpoint does not record them")
    num_attention_heads: int | None = option(
        None, "attention heads of each BERT layer, if the checkpoint does not record them"
    )
    tokenizer: str | None = option(
        None, "folder or Hub id of the tokenizer (bert-base-uncased for the released checkpoints)"
    )
    overwrite: bool = option(False, "replace an existing --output")
    push_to_hub: str | None = option(None, "repository to push the folder to, `user/name`")

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
