"""Model and processor of a run: new, or loaded with the recipe's changes."""

from collections.abc import Mapping
from typing import Any, cast

from transformers import AutoTokenizer, BertTokenizer

from configuration_mra import MRAConfig
from layers_mra import MRAFusionLayer, MRATextLayer, selective_contexts
from modeling_mra import MRAForPreTraining
from mra.common.loading import check_vocabulary
from mra.common.pretrained import load_pretrained
from mra.common.private_interfaces import raise_recompile_limit
from mra.training.arguments import ModelArguments
from mra.training.initialization import load_bert_weights, load_for_finetuning, load_swin_weights
from processing_mra import MRAImageProcessor, MRAProcessor


_VISION_FIELDS = ("image_size", "window_size", "drop_rate", "drop_path_rate")
_HEAD_FIELDS = ("projection_type", "projection_dim", "head_initialization")
_SMALLEST_DEVIATION = (
    1e-4  # of projection weights that learn with clipped gradients; the published initialisation has 1e-5
)


def create_config(args: ModelArguments, objective: Mapping[str, Any]) -> MRAConfig:
    """Resolve the configuration of a run's model.

    Args:
        args: a `ModelArguments`.
        objective: fields of `MRAConfig` that choose and weight the losses.

    Raises:
        ValueError: if `model_config` names a field that does not exist or that another argument sets.
    """
    fields = _merge(args, objective)
    if args.model_name_or_path is None:
        tokenizer = load_pretrained(AutoTokenizer, cast(str, args.tokenizer_name), "`tokenizer_name`")
        vocabulary = {"vocab_size": len(tokenizer), "pad_token_id": tokenizer.pad_token_id}
        return MRAConfig(**{**fields, "text_config": {**vocabulary, **fields.get("text_config", {})}})
    start = load_pretrained(MRAConfig, args.model_name_or_path, "`model_name_or_path`").to_dict()
    for name, value in fields.items():
        start[name] = {**start[name], **value} if isinstance(value, Mapping) else value
    return MRAConfig.from_dict(start)


def create_model(args: ModelArguments, config: MRAConfig, max_grad_norm: float | None = None) -> MRAForPreTraining:
    """Build the model of a run, or load the model it starts from, with the resolved configuration.

    Args:
        args: a `ModelArguments`.
        config: the configuration from [`create_config`].
        max_grad_norm: norm to which the run clips its gradients.

    Raises:
        ValueError: if gradients are clipped but a projection's weights are too small for that, see [`check_clipping`].
    """
    if args.model_name_or_path is None:
        model = MRAForPreTraining(config)
        if args.text_weights is not None:
            load_bert_weights(model, args.text_weights)
        if args.vision_weights is not None:
            load_swin_weights(model, args.vision_weights)
    else:
        model = load_for_finetuning(args.model_name_or_path, **config.to_dict())
    check_clipping(model, max_grad_norm)
    model.set_attn_implementation(args.attn_implementation)
    set_gradient_checkpointing(model, args.gradient_checkpointing)
    model.chunk_size = args.chunk_size
    if args.torch_compile:
        compile_layers(model)
    return model


def set_gradient_checkpointing(model: MRAForPreTraining, kind: str) -> None:
    """Choose what the layers of a model in training recompute in the backward pass; gradients stay the same.

    Args:
        model: changed in place.
        kind: `none`, `selective`, `vision` or `all`, as in [`ModelArguments`].
    """
    model.activation_checkpointing_disable()
    if kind != "none":
        contexts = {"context_fn": selective_contexts} if kind == "selective" else {}
        model.activation_checkpointing_enable({"use_reentrant": False, **contexts})
    if kind == "vision":
        for module in model.modules():
            if isinstance(module, (MRATextLayer, MRAFusionLayer)):
                module.gradient_checkpointing = False


def check_clipping(model: MRAForPreTraining, max_grad_norm: float | None) -> None:
    """Refuse to clip the gradients of projections with the published initialisation of deviation 1e-5.

    Args:
        model: the model before the first step.
        max_grad_norm: norm to which the run clips its gradients; None if it does not.

    Raises:
        ValueError: if gradients are clipped and a projection's weights are that small. On the sample set such a run
            hardly learns (reference notes, "Optimisation").
    """
    for name in ("vision_projection", "text_projection"):
        linear = getattr(getattr(model.mra, name), "linear", None)
        if max_grad_norm is not None and linear is not None and linear.weight.std() < _SMALLEST_DEVIATION:
            raise ValueError(
                f"`max_grad_norm` is {max_grad_norm}, but {name} starts from weights of deviation "
                f"{linear.weight.std():.1e}, which clipped gradients keep from learning: leave `max_grad_norm` out "
                "(`none`), or set `head_initialization: bert` and start from new or trained projections"
            )


def compile_layers(model: MRAForPreTraining, **options: Any) -> None:
    """Compile each Swin, BERT and fusion layer in place, so that layers of one kind share the compiled code.

    Weight names do not change. Swin layers differ in width and drop rate, and texts in length, so a kind of layer is compiled
    more often than TorchDynamo's default limit of 8. Lengths become dynamic with the second batch.

    Args:
        model: changed in place.
        options: options of `torch.compile`.
    """
    raise_recompile_limit(64)
    for module in model.modules():
        if type(module).__name__ in (model._no_split_modules or ()):
            module.compile(**options)


def create_processor(args: ModelArguments, config: MRAConfig) -> MRAProcessor:
    """Load the starting model's processor, or build one, for the model's image size and caption length.

    Args:
        args: a `ModelArguments`.
        config: the configuration from [`create_config`].

    Raises:
        ValueError: if the tokenizer holds no words or is not the model's.
    """
    start = args.model_name_or_path
    image_processor, style = MRAImageProcessor(), "plain"
    if start is not None:
        # Part by part, because the Auto classes would load the folder's copy of the code.
        image_processor = load_pretrained(MRAImageProcessor, start, "`model_name_or_path`")
        style = MRAProcessor.get_processor_dict(start)[0].get("caption_style", style)
    if args.tokenizer_name is not None:
        tokenizer = load_pretrained(AutoTokenizer, args.tokenizer_name, "`tokenizer_name`")
    else:
        tokenizer = load_pretrained(BertTokenizer, cast(str, start), "`model_name_or_path`")
    check_vocabulary(tokenizer, config, f"`tokenizer_name` {args.tokenizer_name or start}")
    height, width = config.vision_config.image_size
    image_processor.size = {"height": height, "width": width}
    return MRAProcessor(
        image_processor, tokenizer, max_text_length=config.max_text_length, caption_style=args.caption_style or style
    )


def _merge(args: ModelArguments, objective: Mapping[str, Any]) -> dict[str, Any]:
    """Merge `model_config` and the dedicated arguments into fields of `MRAConfig`."""
    fields = {
        name: dict(value) if isinstance(value, Mapping) else value
        for name, value in cast(Mapping[str, Any], args.model_config).items()
    }
    _refuse_unknown(fields)
    _refuse_twice(fields, objective, "")
    fields |= objective
    vision = {name: getattr(args, name) for name in _VISION_FIELDS if getattr(args, name) is not None}
    heads = {name: getattr(args, name) for name in _HEAD_FIELDS if getattr(args, name) is not None}
    _refuse_twice(fields, heads, "")
    _refuse_twice(fields.get("vision_config", {}), vision, "vision_config.")
    fields |= heads
    if vision:
        fields["vision_config"] = {**fields.get("vision_config", {}), **vision}
    if args.model_name_or_path is not None and "temperature" in fields:
        raise ValueError(
            "`model_config.temperature` initialises a new model, but the learned temperature comes with "
            f"{args.model_name_or_path!r}: leave it out"
        )
    return fields


def _refuse_unknown(fields: Mapping[str, Any]) -> None:
    known = MRAConfig().to_dict()
    for name, value in fields.items():
        if name not in known:
            raise ValueError(f"`model_config.{name}` is not a field of MRAConfig")
        for inner in value if isinstance(value, Mapping) else ():
            if inner not in known[name]:
                raise ValueError(f"`model_config.{name}.{inner}` is not a field of its configuration")


def _refuse_twice(fields: Mapping[str, Any], named: Mapping[str, Any], prefix: str) -> None:
    for name in named:
        if name in fields:
            raise ValueError(f"`model_config.{prefix}{name}` has its own argument: set `{name}` instead")
