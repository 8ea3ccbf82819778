"""Arguments of the training scripts: dataclasses by theme, filled from a YAML recipe and then the command line."""

import argparse
import dataclasses
import difflib
import functools
import json
import math
import types
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import yaml
from transformers import HfArgumentParser

from mra.training.augmentation import OPERATIONS
from mra.training.optim import PARTS


# ---------------------------------------------------------------- model and objective


# First and last line of a recipe that a run saved: all arguments are in it, so that one that was cut would lack some.
RECIPE_START = "# Every argument of a run, as resolved."
RECIPE_END = "# End of the arguments."


@dataclass
class ModelArguments:
    """Where the weights come from and what of the architecture the run changes."""

    _argument_group_name = "model"

    model_name_or_path: str | None = field(
        default=None,
        metadata={
            "help": "Folder or Hub id of an MRA model to start from; a new model when left out, or when `none` overrules "
            "a recipe."
        },
    )
    model_config: str | None = field(
        default=None,
        metadata={
            "help": "Fields of MRAConfig to set: a mapping in a recipe, JSON text or the path of a JSON file here."
        },
    )
    tokenizer_name: str | None = field(
        default=None, metadata={"help": "Folder or Hub id of the BERT tokenizer; the starting model's when left out."}
    )
    vision_weights: str | None = field(
        default=None,
        metadata={"help": "Weights of a new model's Swin: path of the official file, or `timm` for its Hub copy."},
    )
    text_weights: str | None = field(
        default=None, metadata={"help": "Weights of a new model's BERT layers: folder or Hub id of a BERT."}
    )
    image_size: list[int] | None = field(default=None, metadata={"help": "Height and width in pixels."})
    window_size: list[int] | None = field(default=None, metadata={"help": "Side of the Swin window of each stage."})
    drop_rate: float | None = field(default=None, metadata={"help": "Dropout in the Swin."})
    drop_path_rate: float | None = field(default=None, metadata={"help": "Stochastic depth of the last Swin block."})
    projection_type: Literal["part_pooling", "linear"] | None = field(
        default=None, metadata={"help": "Projection to the shared space."}
    )
    projection_dim: int | None = field(default=None, metadata={"help": "Width of the shared space."})
    head_initialization: Literal["bert", "published"] | None = field(
        default=None,
        metadata={
            "help": "Where new projections and a new matching head start: `bert` from a normal of initializer_range; "
            "`published` with pooled parts from one of 1e-5, not to be combined with max_grad_norm, the rest from "
            "PyTorch's defaults. The starting model's choice when left out."
        },
    )
    caption_style: Literal["plain", "clean"] | None = field(
        default=None,
        metadata={
            "help": "Caption cleaning: `plain` for SDA and CUHK-PEDES, `clean` for ICFG-PEDES and RSTPReid; "
            "the starting model's when left out."
        },
    )
    attn_implementation: Literal["sdpa", "eager"] = field(
        default="sdpa", metadata={"help": "Attention kernels of the text, fusion and Swin layers."}
    )
    gradient_checkpointing: Literal["none", "vision", "all"] = field(
        default="none",
        metadata={
            "help": "Layers whose activations are computed again in the backward pass, for less memory: those of the image "
            "encoder, which hold most of it, or all."
        },
    )
    torch_compile: bool = field(
        default=False, metadata={"help": "Compile the layers of Swin, BERT and fusion with TorchInductor."}
    )

    def __post_init__(self):
        self.model_config = _read_model_config(self.model_config)
        if self.model_name_or_path is not None:
            for name in ("vision_weights", "text_weights"):
                if getattr(self, name) is not None:
                    raise ValueError(
                        f"`{name}` initialises a new model, but `model_name_or_path` is {self.model_name_or_path!r}, "
                        "which brings its own weights: leave one of them out."
                    )
        elif self.tokenizer_name is None:
            raise ValueError("Set `model_name_or_path` to start from a model, or `tokenizer_name` to build a new one.")


@dataclass
class ObjectiveArguments:
    """Weights and choices of the losses, kept in the model's configuration."""

    _argument_group_name = "objective"

    itm_weight: float = field(default=1.0, metadata={"help": "Weight of the matching loss."})
    mlm_weight: float = field(default=1.0, metadata={"help": "Weight of the masked-language loss."})
    label_smoothing: float = field(default=0.0, metadata={"help": "Smoothing of the contrastive targets, 0 to 1."})
    itc_gradient: Literal["exact", "published"] = field(
        default="exact",
        metadata={
            "help": "Gradient of the contrastive loss over several processes: `exact`, or 1 / processes of it "
            "as the published gather gives."
        },
    )
    itc_chunk_size: int | None = field(
        default=None,
        metadata={
            "help": "Rows of the similarity matrix that the contrastive loss computes at a time, to save memory with "
            "large batches; all at once if left out."
        },
    )
    itm_negatives: Literal["local", "all"] = field(
        default="local",
        metadata={"help": "Draw negatives for matching from each process's own pairs, as published, or from all."},
    )

    def overrides(self) -> dict[str, Any]:
        """The fields of `MRAConfig` that this theme sets."""
        return dataclasses.asdict(self)


@dataclass
class PretrainObjectiveArguments(ObjectiveArguments):
    """The objective with region terms."""

    region_weight: float = field(default=0.8, metadata={"help": "Weight of the region losses; 0 leaves them out."})
    region_features: Literal["paper", "published_code"] = field(
        default="paper",
        metadata={
            "help": "`paper` pools the patches inside the box and shows their mean to the cross-attention; "
            "`published_code` pools all patches and hides the mean."
        },
    )


@dataclass
class FinetuneObjectiveArguments(ObjectiveArguments):
    """The objective with terms on the augmented caption."""

    augmentation_weight: float = field(
        default=0.8, metadata={"help": "Weight of the losses on the augmented caption; 0 leaves them out."}
    )


# ---------------------------------------------------------------- data


@dataclass
class DataArguments:
    """The training set, its batches, image augmentation and masking."""

    _argument_group_name = "data"

    dataset: str | None = field(
        default=None, metadata={"help": "Folder or Hub id of the prepared set, as `load_dataset` takes it."}
    )
    per_device_batch_size: int = field(default=40, metadata={"help": "Image-text pairs of each process in a step."})
    num_workers: int = field(default=4, metadata={"help": "Worker processes that prepare batches, for each process."})
    image_backend: Literal["tensor", "pillow"] = field(
        default="tensor",
        metadata={
            "help": "What resizes training images: `tensor` is fast, `pillow` gives the published pixels. Crops, boxes and "
            "masks are the same; evaluation resizes as the model's processor does."
        },
    )
    streaming: bool = field(
        default=False,
        metadata={"help": "Read the training set piece by piece from its Parquet files, without a copy on disk."},
    )
    streaming_buffer: int = field(
        default=16384,
        metadata={"help": "Rows among which a streamed row is shuffled; about as many are held in memory."},
    )
    streaming_lanes: int = field(
        default=16,
        metadata={
            "help": "Parts of a streamed epoch that are read side by side; best a multiple of processes x workers."
        },
    )
    flip_probability: float = field(default=0.5, metadata={"help": "Chance of mirroring an image."})
    erasing_probability: float = field(default=0.6, metadata={"help": "Chance of erasing a rectangle of an image."})
    mlm_probability: float = field(default=0.25, metadata={"help": "Share of a caption's tokens to mask."})
    mlm_max_masked: int = field(default=10, metadata={"help": "Most tokens to mask in a caption."})
    mlm_mask_padding: bool = field(
        default=False, metadata={"help": "Let padding and [SEP] be masked, as the published code does."}
    )
    whole_word_masking: bool = field(default=True, metadata={"help": "Mask all pieces of a word together."})
    skipgram_probability: float = field(default=0.2, metadata={"help": "Chance of masking several words in a row."})
    skipgram_max_length: int = field(default=3, metadata={"help": "Most words masked in a row."})

    def __post_init__(self):
        _require(self.dataset is not None, "dataset", "a folder or Hub id of a prepared set", self.dataset)
        _require(self.per_device_batch_size > 0, "per_device_batch_size", "at least 1", self.per_device_batch_size)
        _require(self.num_workers >= 0, "num_workers", "0 or more", self.num_workers)
        for name in ("streaming_buffer", "streaming_lanes"):
            _require(getattr(self, name) > 0, name, "at least 1", getattr(self, name))


@dataclass
class PretrainDataArguments(DataArguments):
    """SDA and an optional set to validate on."""

    data_fraction: float = field(
        default=1.0,
        metadata={"help": "Share of the training set to use, chosen once by the seed."},
    )
    num_train_pairs: int | None = field(
        default=None,
        metadata={
            "help": "Number of training pairs to use, chosen once by the seed (68126 in the paper's loss table), in place of "
            "data_fraction; all if left out."
        },
    )
    validation_dataset: str | None = field(
        default=None,
        metadata={
            "help": "Prepared person-retrieval set whose validation split chooses the best model; none if left out."
        },
    )

    def __post_init__(self):
        super().__post_init__()
        _require(0 < self.data_fraction <= 1, "data_fraction", "more than 0 and at most 1", self.data_fraction)
        pairs = self.num_train_pairs
        _require(pairs is None or pairs > 0, "num_train_pairs", "at least 1, or left out", pairs)
        _require(
            pairs is None or self.data_fraction == 1,
            "data_fraction",
            f"1 (all) where `num_train_pairs` chooses {pairs}",
            self.data_fraction,
        )


@dataclass
class FinetuneDataArguments(DataArguments):
    """A person-retrieval set, its captions augmented by EDA, and what to validate on."""

    validation_fraction: float = field(
        default=0.0,
        metadata={
            "help": "Share of the training identities held out where the set has no validation split; "
            "with 0 the last model is the result."
        },
    )
    eda_probability: float = field(
        default=1.0,
        metadata={
            "help": "Chance of changing a caption at all; an unchanged one repeats the plain losses. Published: 1."
        },
    )
    eda_style: Literal["content_words", "published"] = field(
        default="published",
        metadata={
            "help": "Details of the operations: `content_words` neither replaces function words nor inserts synonyms of "
            "them, takes any synonym and any place; `published` does as the published code."
        },
    )
    eda_operations: list[str] = field(
        default_factory=lambda: list(OPERATIONS),
        metadata={"help": "Changes to choose from; the first two need WordNet (python -m nltk.downloader wordnet)."},
    )
    eda_synonym_strength: float = field(default=0.1, metadata={"help": "Share of a caption's words to replace."})
    eda_insertion_strength: float = field(default=0.1, metadata={"help": "Words to insert, relative to its length."})
    eda_swap_strength: float = field(default=0.1, metadata={"help": "Swaps of words, relative to its length."})
    eda_deletion_probability: float = field(default=0.1, metadata={"help": "Chance of dropping each word."})

    def __post_init__(self):
        super().__post_init__()
        _require(
            0 <= self.validation_fraction < 1, "validation_fraction", "from 0 to below 1", self.validation_fraction
        )


# ---------------------------------------------------------------- optimisation and run


@dataclass
class OptimizationArguments:
    """AdamW, its parameter groups and the learning-rate schedule."""

    _argument_group_name = "optimisation"

    learning_rate: float = field(default=1e-4, metadata={"help": "Peak learning rate."})
    final_learning_rate: float = field(default=0.0, metadata={"help": "Where the linear schedule ends."})
    schedule: Literal["linear", "step"] = field(
        default="linear",
        metadata={
            "help": "`linear` decay after the warm-up, or `step`: the same, halved at a first drop and to a fifth at a second."
        },
    )
    schedule_drops: Literal["run", "warmup"] = field(
        default="run",
        metadata={
            "help": "Where `schedule: step` drops: `run`, at 40%% and 70%% of all steps; `warmup`, at 4 and 7 times the "
            "warm-up, as the published code does: the same with a warm-up of a tenth."
        },
    )
    count_dropped_batch: bool = field(
        default=False,
        metadata={
            "help": "Let the schedule count the incomplete last batch of each epoch, which no step takes, as the published "
            "code does: the run ends a little before its schedule. Not with max_train_steps."
        },
    )
    num_warmup_steps: float = field(
        default=0.1, metadata={"help": "Optimizer steps of the warm-up; below 1, the share of all steps."}
    )
    learning_rate_multiplier: float = field(
        default=2.0, metadata={"help": "Factor on the learning rate of the `multiplied_parts`."}
    )
    multiplied_parts: list[str] = field(
        default_factory=list,
        metadata={"help": f"Parts that train at the multiplied rate, of: {', '.join(PARTS)}."},
    )
    weight_decay: float = field(
        default=0.01,
        metadata={
            "help": "Decoupled weight decay; biases, the norms of Swin and BERT and the position tables have none."
        },
    )
    adam_beta1: float = field(default=0.9, metadata={"help": "Decay of AdamW's first moment."})
    adam_beta2: float = field(default=0.98, metadata={"help": "Decay of AdamW's second moment."})
    adam_epsilon: float = field(default=1e-8, metadata={"help": "Epsilon of AdamW."})
    max_grad_norm: float | None = field(
        default=None, metadata={"help": "Clip the gradient to this norm; not clipped when left out, as published."}
    )

    def __post_init__(self):
        unknown = [part for part in self.multiplied_parts if part not in PARTS]
        _require(not unknown, "multiplied_parts", f"names among {', '.join(PARTS)}", ", ".join(unknown))
        _require(self.num_warmup_steps >= 0, "num_warmup_steps", "0 or more", self.num_warmup_steps)
        _require(
            self.num_warmup_steps < 1 or float(self.num_warmup_steps).is_integer(),
            "num_warmup_steps",
            "a whole number of steps, or a share below 1",
            self.num_warmup_steps,
        )
        _require(
            self.schedule == "linear" or self.final_learning_rate == 0,
            "final_learning_rate",
            "0 with `schedule: step`, which always ends at 0",
            self.final_learning_rate,
        )
        _require(
            self.num_warmup_steps > 0 or (self.schedule, self.schedule_drops) != ("step", "warmup"),
            "num_warmup_steps",
            "more than 0 with `schedule_drops: warmup`, which drops at its multiples",
            self.num_warmup_steps,
        )


@dataclass
class RunArguments:
    """Length, precision, logging and checkpoints."""

    _argument_group_name = "run"

    output_dir: str | None = field(default=None, metadata={"help": "Folder of checkpoints, metrics and models."})
    num_train_epochs: int = field(default=30, metadata={"help": "Passes over the training set; 0 saves the start."})
    max_train_steps: int | None = field(
        default=None, metadata={"help": "Optimizer steps of the run and of its schedule, instead of whole epochs."}
    )
    gradient_accumulation_steps: int = field(
        default=1,
        metadata={
            "help": "Batches averaged into one optimizer step. Negatives stay within a batch; the last step of an epoch "
            "averages those that are left."
        },
    )
    mixed_precision: Literal["no", "fp16", "bf16"] | None = field(
        default=None, metadata={"help": "Precision of the matrix products; what `accelerate` is set to when left out."}
    )
    seed: int = field(default=42, metadata={"help": "Seed of initialisation, data order, augmentation and dropout."})
    logging_steps: int = field(default=50, metadata={"help": "Optimizer steps between two lines of metrics.jsonl."})
    log_with: list[str] = field(
        default_factory=list, metadata={"help": "Trackers that receive the metrics, e.g. tensorboard or wandb."}
    )
    project_name: str = field(default="mra", metadata={"help": "Project that trackers file the run under."})
    save_steps: int | None = field(default=None, metadata={"help": "Optimizer steps between two checkpoints."})
    save_minutes: float | None = field(
        default=30.0, metadata={"help": "Minutes between two checkpoints, looked at on logging steps; 0 for none."}
    )
    save_total_limit: int = field(default=2, metadata={"help": "Checkpoints that are kept, the newest."})
    resume: str | None = field(
        default=None,
        metadata={
            "help": "`latest` to continue from the newest checkpoint in output_dir (from the start if there is none; a "
            "damaged one is an error), `latest_whole` to pass over damaged ones with a warning, for queues, or a "
            "checkpoint's path."
        },
    )
    resume_without_manifest: bool = field(
        default=False,
        metadata={
            "help": "Resume from a checkpoint without manifest.json, as earlier versions saved them; only what its files "
            "tell of themselves is verified."
        },
    )
    overwrite_output_dir: bool = field(
        default=False,
        metadata={
            "help": "Start anew in an output_dir that holds another run, whose files are removed; not with `resume`."
        },
    )

    def __post_init__(self):
        _require(self.output_dir is not None, "output_dir", "a folder", self.output_dir)
        _require(self.num_train_epochs >= 0, "num_train_epochs", "at least 0", self.num_train_epochs)
        for name in ("gradient_accumulation_steps", "logging_steps", "save_total_limit"):
            _require(getattr(self, name) > 0, name, "at least 1", getattr(self, name))
        for name in ("max_train_steps", "save_steps"):
            value = getattr(self, name)
            _require(value is None or value > 0, name, "at least 1, or left out", value)


@dataclass
class EvaluationArguments:
    """Evaluation on the validation split, which chooses the best model by R@1."""

    _argument_group_name = "evaluation"

    eval_every_epochs: int = field(default=1, metadata={"help": "Epochs between two evaluations; the last always is."})
    eval_rerank_k: int = field(
        default=128, metadata={"help": "Images re-ranked for each query; 0 chooses by the similarity alone."}
    )
    eval_flip: bool = field(default=True, metadata={"help": "Average each image with its mirror image."})
    eval_batch_size: int = field(default=64, metadata={"help": "Images or captions encoded at a time."})
    eval_dtype: Literal["training", "float32"] = field(
        default="training",
        metadata={
            "help": "Precision of the evaluation: that of the `training`, or `float32`, as published, which is slower where "
            "training runs in half precision."
        },
    )
    eval_score_fusion: Literal["auto", "single", "published", "posterior"] = field(
        default="auto",
        metadata={
            "help": "How matching scores and similarity are put together: `auto` chooses fusion and weight on the "
            "validation split at each evaluation, and saves them with the model."
        },
    )
    eval_match_weight: float | None = field(
        default=None,
        metadata={"help": "Weight of the matching log-odds in `posterior`; chosen with the fusion when left out."},
    )

    def __post_init__(self):
        _require(self.eval_every_epochs > 0, "eval_every_epochs", "at least 1", self.eval_every_epochs)
        _require(self.eval_rerank_k >= 0, "eval_rerank_k", "0 or more", self.eval_rerank_k)
        _require(self.eval_batch_size > 0, "eval_batch_size", "at least 1", self.eval_batch_size)
        weight = self.eval_match_weight
        _require(weight is None or 0 <= weight < math.inf, "eval_match_weight", "0 or more, or left out", weight)
        _require(
            weight is None or self.eval_score_fusion == "posterior",
            "eval_score_fusion",
            "posterior with eval_match_weight, which no other fusion has",
            self.eval_score_fusion,
        )


@dataclass
class HubArguments:
    """Publication of the result."""

    _argument_group_name = "hub"

    push_to_hub: bool = field(default=False, metadata={"help": "Push the resulting model to the Hub at the end."})
    hub_model_id: str | None = field(default=None, metadata={"help": "Repository to push to, `user/name`."})
    hub_private: bool = field(default=False, metadata={"help": "Make a new repository private."})

    def __post_init__(self):
        _require(
            not self.push_to_hub or self.hub_model_id is not None,
            "hub_model_id",
            "`user/name` with push_to_hub",
            self.hub_model_id,
        )


# ---------------------------------------------------------------- parsing


class _HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Shows each option once, by the name it has in a recipe."""

    def _format_action_invocation(self, action):
        if not action.option_strings:
            return super()._format_action_invocation(action)
        value = "" if action.nargs == 0 else " " + self._format_args(action, action.dest.upper())
        return action.option_strings[0] + value

    def _get_help_string(self, action):
        return action.help if action.default in (None, [], argparse.SUPPRESS) else super()._get_help_string(action)


def parse_arguments(dataclass_types, description: str | None = None, argv: list[str] | None = None) -> tuple:
    """
    Reads `--config recipe.yaml` and then the command line, which wins.

    Args:
        dataclass_types: one dataclass for each theme.
        description: shown by `--help`.
        argv: arguments; the process's own when absent.

    Returns:
        One instance of each dataclass. A wrong or unknown argument ends the process with a message that names it.
    """
    parser = HfArgumentParser(
        dataclass_types,
        usage="%(prog)s --config RECIPE.yaml [--ARGUMENT VALUE ...]",
        description=description,
        allow_abbrev=False,
        formatter_class=_HelpFormatter,
    )
    for action in parser._actions:  # HfArgumentParser gives --no_x the help of --x
        if action.const is False and action.option_strings[0].startswith("--no_"):
            action.help = f"Turn `{action.dest}` off."
    _let_none_clear(parser, dataclass_types)
    parser.add_argument("--config", help="YAML recipe whose keys are the arguments below; the command line wins.")
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--config")
    recipe, _ = first.parse_known_args(argv)
    try:
        if recipe.config is not None:
            parser.set_defaults(**load_recipe(recipe.config, dataclass_types))
        *themes, _, unknown = parser.parse_args_into_dataclasses(
            argv, return_remaining_strings=True, look_for_args_file=False
        )
        if unknown:
            name = unknown[0].split("=")[0].lstrip("-").replace("-", "_")
            raise ValueError(f"unknown argument {unknown[0]!r}{_nearest(name, dataclass_types)}")
    except ValueError as error:
        parser.error(str(error))
    return tuple(themes)


def _let_none_clear(parser: argparse.ArgumentParser, dataclass_types) -> None:
    """Takes `none` for no value at all where a value is optional, so that the command line can clear a recipe's."""
    hints = {name: hint for theme in dataclass_types for name, hint in get_type_hints(theme).items()}

    def or_none(convert):
        def read(text):
            return None if text == "none" else convert(text)

        return functools.update_wrapper(read, convert, assigned=("__name__",), updated=())

    for action in parser._actions:
        if type(None) in get_args(hints.get(action.dest)) and action.nargs is None and action.choices is None:
            action.type = or_none(action.type)


def load_recipe(path: str | Path, dataclass_types) -> dict[str, Any]:
    """
    Reads a YAML recipe, each value cast to its field's type.

    Raises:
        ValueError: if the file is missing or no mapping, a key is unknown, or a value is of another type.
    """
    return cast_values(read_mapping(path), dataclass_types, str(path))


def read_mapping(path: str | Path) -> dict[str, Any]:
    """
    Read a YAML file that holds a mapping; comments alone are an empty one.

    Raises:
        ValueError: if the file is missing, empty, not YAML or not a mapping, or lacks the end of a recipe that a run saved.
    """
    if not Path(path).is_file():
        raise ValueError(f"`config`: no recipe at {str(path)!r}.")
    try:
        text = Path(path).read_text(encoding="utf-8")
        recipe = yaml.safe_load(text)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: not readable as YAML in UTF-8 ({' '.join(str(error).split())})") from None
    if not text:
        raise ValueError(f"{path}: the file is empty, expected a mapping of arguments to values")
    first = text.split("\n", 1)[0]
    saved = first == RECIPE_START or (first == text and RECIPE_START.startswith(text))
    if saved and RECIPE_END not in text:
        raise ValueError(f"{path}: cut short, its last line is not {RECIPE_END!r}; take the recipe of a checkpoint")
    recipe = {} if recipe is None else recipe
    if not isinstance(recipe, dict):
        raise ValueError(f"{path}: a recipe is a mapping of arguments to values, got a {type(recipe).__name__}.")
    return recipe


def cast_values(values: dict[str, Any], dataclass_types, place: str) -> dict[str, Any]:
    """
    Casts what YAML read to the types of the dataclasses' fields.

    Args:
        values: name -> value.
        dataclass_types: whose fields the names are.
        place: where the values come from, for the error messages.

    Raises:
        ValueError: if a key is unknown, or a value is of another type.
    """
    field_types = {}
    for dataclass_type in dataclass_types:
        field_types.update({item.name: get_type_hints(dataclass_type)[item.name] for item in _fields(dataclass_type)})
    cast = {}
    for key, value in values.items():
        if key not in field_types:
            raise ValueError(f"{place}: unknown key {key!r}{_nearest(str(key), dataclass_types)}")
        cast[key] = _cast(f"{place}: `{key}`", value, field_types[key])
    return cast


def resolved_recipe(*themes) -> dict[str, Any]:
    """The value of every argument, as a mapping that can be saved and read as a recipe again."""
    return {item.name: getattr(theme, item.name) for theme in themes for item in _fields(theme)}


def _fields(theme):
    return [item for item in dataclasses.fields(theme) if item.init]


def _nearest(name: str, dataclass_types) -> str:
    names = [item.name for dataclass_type in dataclass_types for item in _fields(dataclass_type)]
    close = difflib.get_close_matches(name, [*names, "config"], n=1)
    return f"; did you mean {close[0]!r}?" if close else "; see --help for the known ones"


def _require(holds: bool, name: str, expected: str, got: Any) -> None:
    if not holds:
        raise ValueError(f"`{name}` must be {expected}, got {got!r}: set it in the recipe or with --{name}.")


def _cast(place: str, value: Any, field_type: Any) -> Any:
    """Casts what YAML read, where `1e-4` is a string, to the type of a field."""
    options = get_args(field_type) if get_origin(field_type) in (Union, types.UnionType) else (field_type,)
    if value is None and type(None) in options:
        return None
    wanted = next(option for option in options if option is not type(None))
    choices = get_args(wanted) if get_origin(wanted) is Literal else None
    if value is False and choices and "no" in choices:  # YAML reads `no` as false
        value = "no"
    if isinstance(value, dict) and wanted is str:
        return json.dumps(value)
    if get_origin(wanted) is list:
        if not isinstance(value, list):
            raise ValueError(f"{place} must be a list, got {value!r}.")
        return [_cast(place, item, get_args(wanted)[0]) for item in value]
    if choices:
        if value not in choices:
            raise ValueError(f"{place} must be one of {', '.join(map(str, choices))}, got {value!r}.")
        return value
    if wanted is bool:
        if not isinstance(value, bool):
            raise ValueError(f"{place} must be true or false, got {value!r}.")
        return value
    try:
        if isinstance(value, (bool, list, dict)) or (wanted is int and isinstance(value, float)):
            raise TypeError
        return wanted(value)
    except (TypeError, ValueError):
        raise ValueError(f"{place} must be of type {wanted.__name__}, got {value!r}.") from None


def _read_model_config(value) -> dict[str, Any]:
    if value is None:
        return {}
    if isinstance(value, dict):
        return value
    text = value
    if not value.lstrip().startswith("{"):
        if not Path(value).is_file():
            raise ValueError(f"`model_config` must be a mapping, JSON text or the path of a JSON file, got {value!r}.")
        text = Path(value).read_text(encoding="utf-8")
    try:
        parsed = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"`model_config` is no valid JSON: {error}.") from None
    if not isinstance(parsed, dict):
        raise ValueError(f"`model_config` must be a mapping of MRAConfig fields, got a {type(parsed).__name__}.")
    return parsed
