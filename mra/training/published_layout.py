"""Names and shapes of the released checkpoints, and their mapping to and from [`MRAForPreTraining`]."""

import logging
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, cast

import numpy as np
import torch
from scipy.interpolate import RectBivariateSpline

from configuration_mra import MRAConfig, MRAVisionConfig
from modeling_mra import MRAForPreTraining, MRAVisionModel


logger = logging.getLogger(__name__)

_PREFIXES = (  # published, ours; the first match is used
    ("text_encoder.bert.", "mra.text_model."),
    ("text_encoder.cls.predictions.", "mlm_head."),
    ("vision_encoder.", "mra.vision_model.swin."),
    ("vision_proj.0.", "mra.vision_projection.norm."),
    ("vision_proj.2.", "mra.vision_projection.linear."),
    ("vision_proj.", "mra.vision_projection."),
    ("text_proj.0.", "mra.text_projection.norm."),
    ("text_proj.2.", "mra.text_projection.linear."),
    ("text_proj.", "mra.text_projection."),
    ("itm_head.", "mra.match_head."),
)
_DERIVED_BUFFERS = ("position_ids", "relative_position_index", "attn_mask")
_GROUPS = (  # in the order of the published state dict
    "temp",
    "vision_encoder.",
    "text_encoder.bert.",
    "text_encoder.cls.",
    "vision_proj.",
    "text_proj.",
    "itm_head.",
)
_TIED = {
    "text_encoder.cls.predictions.decoder.weight": "text_encoder.bert.embeddings.word_embeddings.weight",
    "text_encoder.cls.predictions.decoder.bias": "text_encoder.cls.predictions.bias",
}
_NOT_CONVERTED = "only released checkpoints of MRA and APTM can be converted"
_OTHER_LAYOUTS = (  # model, prefixes that must all occur, advice; the first match is reported
    ("RaSa", ("visual_encoder_m.", "prd_head."), _NOT_CONVERTED),
    ("ALBEF", ("visual_encoder_m.", "text_encoder."), _NOT_CONVERTED),
    ("IRRA", ("base_model.visual.",), _NOT_CONVERTED),
    ("BLIP", ("visual_encoder.", "text_decoder."), _NOT_CONVERTED),
    ("ALBEF or BLIP", ("visual_encoder.blocks.", "text_encoder."), _NOT_CONVERTED),
    ("BLIP of transformers", ("vision_model.", "text_decoder."), _NOT_CONVERTED),
    ("CLIP", ("visual.", "token_embedding."), _NOT_CONVERTED),
    ("CLIP of transformers", ("vision_model.", "text_model."), _NOT_CONVERTED),
    (
        "Swin alone",
        ("patch_embed.proj.", "layers.0.blocks."),
        "pass the file to train_pretrain.py as --vision_weights",
    ),
    ("BERT alone", ("bert.embeddings.",), "pass its folder to train_pretrain.py as --text_weights"),
    ("BERT alone", ("embeddings.word_embeddings.",), "pass its folder to train_pretrain.py as --text_weights"),
    (
        "a model of this project",
        ("mra.vision_model.",),
        "it needs no conversion: load its folder with from_pretrained",
    ),
)
_PUBLISHED_REGION_WEIGHT = 0.8  # applied again in the training loop (reference notes, "Region term")
_BERT_LAYER = re.compile(r"^(text_encoder\.bert\.)encoder\.layer\.(\d+)\.")
_SWIN_BLOCK = re.compile(r"^vision_encoder\.layers\.(\d+)\.blocks\.(\d+)\.")
_SWIN_MASK = re.compile(r"^vision_encoder\.layers\.(\d+)\.blocks\.\d+\.attn_mask$")
_DOWNSAMPLE = re.compile(r"(layers\.)(\d+)(\.downsample\.)")
BIAS_TABLE = "relative_position_bias_table"


def is_derived_buffer(name: str) -> bool:
    """Return whether a published entry is an index or mask derived from the architecture, not a weight."""
    return name.rsplit(".", 1)[-1] in _DERIVED_BUFFERS


def shift_downsample(name: str, by: int) -> str:
    """Renumber a merging layer: it ends stage N in the official Swin and starts stage N + 1 in timm."""
    return _DOWNSAMPLE.sub(lambda match: f"{match[1]}{int(match[2]) + by}{match[3]}", name)


def to_mra_name(name: str, num_text_layers: int) -> str:
    """Translate a published parameter name.

    Raises:
        ValueError: if the name is not part of the published layout.
    """
    if name == "temp":
        return "temperature"
    name = _TIED.get(name, name) if name.endswith(".bias") else name  # ours has a single bias
    layer = _BERT_LAYER.match(name)
    if layer and int(layer[2]) >= num_text_layers:
        return f"mra.fusion_layers.{int(layer[2]) - num_text_layers}.{name[layer.end() :]}"
    for published, ours in _PREFIXES:
        if name.startswith(published):
            translated = ours + name[len(published) :]
            return shift_downsample(translated, 1) if published == "vision_encoder." else translated
    raise ValueError(f"{name!r} is not part of the published layout")


def to_published_name(name: str, num_text_layers: int, has_norm: bool) -> str:
    """Translate one of our parameter names back.

    Args:
        name: parameter name, as in `MRAForPreTraining.state_dict()`.
        num_text_layers: layers before the fusion layers.
        has_norm: whether the projections hold a BatchNorm (`part_pooling`).
    """
    if name == "temperature":
        return "temp"
    if name.startswith("mra.fusion_layers."):
        index, rest = name.removeprefix("mra.fusion_layers.").split(".", 1)
        return f"text_encoder.bert.encoder.layer.{int(index) + num_text_layers}.{rest}"
    for published, ours in _PREFIXES:
        numbered = published in ("vision_proj.0.", "vision_proj.2.", "text_proj.0.", "text_proj.2.")
        if numbered and not has_norm:
            continue
        if name.startswith(ours):
            translated = published + name[len(ours) :]
            return shift_downsample(translated, -1) if published == "vision_encoder." else translated
    raise ValueError(f"{name!r} is not a parameter of MRAForPreTraining")


# ---------------------------------------------------------------- architecture


def infer_config(
    state_dict: Mapping[str, torch.Tensor],
    stored: Mapping | None = None,
    image_size: Sequence[int] | None = None,
    num_attention_heads: int | None = None,
) -> MRAConfig:
    """Infer the architecture from the tensors of a released checkpoint and its stored configuration.

    Args:
        state_dict: tensors by published name.
        stored: the checkpoint's `config`, if it has one.
        image_size: height and width in pixels, if neither shift masks nor configuration show them.
        num_attention_heads: heads of each BERT layer, if the configuration does not record them. Weights do not show them:
            the fallback is heads of width 64, as in every published BERT, with a warning.

    Returns:
        The configuration with the published choices: `region_features`, `itc_gradient`, and a region weight of 0.8 x 0.8.

    Raises:
        ValueError: if a part is missing, the image size is unknown or contradicts the shift masks, or the number of heads
            contradicts the configuration or does not divide the width.
    """
    stored = dict(stored or {})
    vision = _infer_vision(state_dict, stored, image_size)
    text = _infer_text(state_dict, stored, num_attention_heads)
    has_norm = any(name.startswith("vision_proj.0.") for name in state_dict)
    projection = _require(state_dict, "vision_proj.2.weight" if has_norm else "vision_proj.weight")
    return MRAConfig(
        vision_config=cast(Any, vision),  # `MRAConfig` converts it to an MRAVisionConfig
        text_config=cast(Any, text),
        projection_type="part_pooling" if has_norm else "linear",
        projection_dim=projection.shape[0],
        max_text_length=stored.get("max_tokens", 56),
        temperature=stored.get("temp") or round(float(_require(state_dict, "temp")), 8),
        label_smoothing=stored.get("LabelSmooth", 0.0),
        region_weight=round(_PUBLISHED_REGION_WEIGHT * (stored.get("region") or _PUBLISHED_REGION_WEIGHT), 6),
        region_features="published_code",
        itc_gradient="published",
    )


def _infer_vision(
    state_dict: Mapping[str, torch.Tensor], stored: Mapping[str, Any], image_size: Sequence[int] | None
) -> dict:
    prefix = "vision_encoder."
    patch = _require(state_dict, f"{prefix}patch_embed.proj.weight")
    depths: dict[int, int] = {}
    for name in state_dict:
        if match := _SWIN_BLOCK.match(name):
            depths[int(match[1])] = max(depths.get(int(match[1]), 0), int(match[2]) + 1)
    stages = range(max(depths, default=0) + 1)
    tables = [_require(state_dict, f"{prefix}layers.{stage}.blocks.0.attn.{BIAS_TABLE}") for stage in stages]
    windows = [(math.isqrt(table.shape[0]) + 1) // 2 for table in tables]
    mlp = _require(state_dict, f"{prefix}layers.0.blocks.0.mlp.fc1.weight")
    details = _sub_config(stored, "vision_config")
    return {
        "image_size": _infer_image_size(state_dict, stored, details, image_size, windows, patch.shape[-1]),
        "patch_size": patch.shape[-1],
        "num_channels": patch.shape[1],
        "embed_dim": patch.shape[0],
        "depths": [depths[stage] for stage in stages],
        "num_heads": [table.shape[1] for table in tables],
        "window_size": windows,
        "mlp_ratio": mlp.shape[0] / patch.shape[0],
        "drop_rate": details.get("drop_rate", 0.0),
        "drop_path_rate": details.get("drop_path_rate", 0.1),
    }


def _sub_config(stored: Mapping, name: str) -> Mapping:
    """Return a part of the stored configuration, empty if it is only the path of a file, as in published recipes."""
    return stored[name] if isinstance(stored.get(name), Mapping) else {}


def _infer_image_size(
    state_dict: Mapping[str, torch.Tensor],
    stored: Mapping[str, Any],
    details: Mapping[str, Any],
    image_size: Sequence[int] | None,
    windows: list[int],
    patch_size: int,
) -> list[int]:
    from_masks = _image_size_from_masks(state_dict, windows, patch_size)
    if from_masks is not None:
        if image_size is not None and tuple(image_size) != from_masks:
            raise ValueError(
                f"`image_size` is {tuple(image_size)} but the checkpoint's shift masks belong to {from_masks}: leave "
                "it out to convert; fine-tuning on a converted model changes the size"
            )
        return list(from_masks)
    if image_size is None:
        image_size = next(((c["h"], c["w"]) for c in (stored, details) if "h" in c and "w" in c), None)
    if image_size is None:
        raise ValueError(
            "the checkpoint has neither `h` and `w` in its config nor a shift mask that shows the image size: "
            "pass --image_size HEIGHT WIDTH"
        )
    return [int(side) for side in image_size]


def _image_size_from_masks(
    state_dict: Mapping[str, torch.Tensor], windows: list[int], patch_size: int
) -> tuple[int, int] | None:
    """Infer the image size from a shift mask `(windows, area, area)`.

    Windows are numbered row by row and only those of the last row and column are masked, so the first masked window ends the
    first row.
    """
    for name, mask in state_dict.items():
        match = _SWIN_MASK.match(name)
        if match and int(match[1]) < len(windows) and mask.ndim == 3:
            masked = mask.flatten(1).ne(0).any(dim=1).nonzero().flatten().tolist()
            if masked and mask.shape[0] % (masked[0] + 1) == 0:
                columns = masked[0] + 1
                scale = windows[int(match[1])] * patch_size * 2 ** int(match[1])
                return mask.shape[0] // columns * scale, columns * scale
    return None


def _infer_text(
    state_dict: Mapping[str, torch.Tensor], stored: Mapping[str, Any], num_attention_heads: int | None
) -> dict:
    prefix = "text_encoder.bert."
    words = _require(state_dict, f"{prefix}embeddings.word_embeddings.weight")
    layers = {int(match[2]) for match in map(_BERT_LAYER.match, state_dict) if match}
    layer_names = [name for name in state_dict if ".crossattention." in name]
    fusion = {int(match[2]) for match in map(_BERT_LAYER.match, layer_names) if match}
    if not layers or not fusion:
        raise ValueError("the checkpoint has no BERT layers with cross-attention: is it a released MRA checkpoint?")
    details = _sub_config(stored, "text_config")
    hidden_size = words.shape[1]
    return {
        "vocab_size": words.shape[0],
        "hidden_size": hidden_size,
        "num_hidden_layers": max(layers) + 1,
        "num_fusion_layers": max(layers) + 1 - min(fusion),
        "num_attention_heads": _infer_heads(details.get("num_attention_heads"), num_attention_heads, hidden_size),
        "intermediate_size": _require(state_dict, f"{prefix}encoder.layer.0.intermediate.dense.weight").shape[0],
        "max_position_embeddings": _require(state_dict, f"{prefix}embeddings.position_embeddings.weight").shape[0],
        "type_vocab_size": _require(state_dict, f"{prefix}embeddings.token_type_embeddings.weight").shape[0],
        "hidden_act": details.get("hidden_act", "gelu"),
        "hidden_dropout_prob": details.get("hidden_dropout_prob", 0.1),
        "attention_probs_dropout_prob": details.get("attention_probs_dropout_prob", 0.1),
        "layer_norm_eps": details.get("layer_norm_eps", 1e-12),
    }


def _infer_heads(stored: int | None, given: int | None, hidden_size: int) -> int:
    if stored is not None and given is not None and stored != given:
        raise ValueError(
            f"`num_attention_heads` is {given}, but the checkpoint's configuration says {stored}: leave it out"
        )
    heads = stored if given is None else given
    if heads is None:
        heads = max(1, hidden_size // 64)
        logger.warning(
            "the checkpoint does not record the attention heads of its text layers: assuming %d, of width 64 as in "
            "BERT; a wrong number changes every result, set it with --num_attention_heads",
            heads,
        )
    if heads < 1 or hidden_size % heads:
        raise ValueError(f"`num_attention_heads` must divide the text layers' width of {hidden_size}, got {heads}")
    return heads


def refuse_other_layouts(names: Iterable[str]) -> None:
    """Refuse weights of other models, recognised by their names; unknown names pass.

    Raises:
        ValueError: if the names belong to another model; the message names it and what to do.
    """
    names = list(names)
    if any(name.startswith("vision_encoder.") for name in names):
        return
    for model, prefixes, advice in _OTHER_LAYOUTS:
        if all(any(name.startswith(prefix) for name in names) for prefix in prefixes):
            raise ValueError(f"these weights belong to {model} (names begin with {', '.join(prefixes)}): {advice}")


def _require(state_dict: Mapping[str, torch.Tensor], name: str) -> torch.Tensor:
    if name not in state_dict:
        raise ValueError(f"the checkpoint has no {name!r}, so it is not in the layout of the released MRA checkpoints")
    return state_dict[name]


def describe_config(config: MRAConfig) -> dict:
    """Build the published `config` entry of a model, as read by [`infer_config`]."""
    vision, text = config.vision_config, config.text_config
    height, width = vision.image_size
    drop = {"drop_rate": vision.drop_rate, "drop_path_rate": vision.drop_path_rate}
    names = (
        "num_attention_heads",
        "hidden_act",
        "hidden_dropout_prob",
        "attention_probs_dropout_prob",
        "layer_norm_eps",
    )
    return {
        "h": height,
        "w": width,
        "vision_config": {"h": height, "w": width, "window_size": vision.window_size[0], **drop},
        "text_config": {
            **{name: getattr(text, name) for name in names},
            "num_hidden_layers": text.num_hidden_layers,
            "fusion_layer": text.num_text_layers,
            "encoder_width": vision.hidden_size,
        },
        "embed_dim": config.projection_dim,
        "temp": config.temperature,
        "max_tokens": config.max_text_length,
        "LabelSmooth": config.label_smoothing,
    }


# ---------------------------------------------------------------- tensors


def derived_buffers(config: MRAConfig) -> dict[str, torch.Tensor]:
    """Return the index and mask buffers stored in the published layout, by published name."""
    vision = config.vision_config
    windows = vision.effective_window_size
    narrow = MRAVisionConfig(  # the buffers depend on neither width nor heads
        image_size=vision.image_size,
        patch_size=vision.patch_size,
        embed_dim=1,
        depths=vision.depths,
        num_heads=[1] * len(windows),
        window_size=windows,
        mlp_ratio=1.0,
    )
    with torch.random.fork_rng(devices=[]), torch.device("cpu"):
        swin = MRAVisionModel(narrow).swin
        positions = torch.arange(config.text_config.max_position_embeddings)[None]
    buffers = {f"vision_encoder.{name}": b for name, b in swin.named_buffers() if is_derived_buffer(name)}
    return buffers | {"text_encoder.bert.embeddings.position_ids": positions}


def from_published(state_dict: Mapping[str, torch.Tensor], config: MRAConfig) -> dict[str, torch.Tensor]:
    """Rename the tensors of a released checkpoint for `MRAForPreTraining(config)`.

    Raises:
        ValueError: if a tensor is unknown, missing, of another shape, different from the one it is tied to or, for index
            and mask buffers, from the architecture; the message lists them all.
    """
    with torch.device("meta"):
        expected = to_published(MRAForPreTraining(config))
    known = {name: tensor for name, tensor in state_dict.items() if name in expected}
    misshapen = {name for name, tensor in known.items() if tensor.shape != expected[name].shape}
    compared = {name: expected[name] for name in known if is_derived_buffer(name)}
    compared |= {name: state_dict[source] for name, source in _TIED.items() if name in known and source in known}
    unlike = [
        name
        for name, tensor in compared.items()
        if name not in misshapen and not torch.equal(known[name], tensor.to(known[name].dtype))
    ]
    problems = {
        "unknown": [name for name in state_dict if name not in expected],
        "missing": [name for name in expected if name not in state_dict],
        "of another shape": [
            f"{name} {tuple(known[name].shape)} instead of {tuple(expected[name].shape)}" for name in sorted(misshapen)
        ],
        "different from the weight it is tied to": [name for name in unlike if name in _TIED],
        "different from the architecture": [name for name in unlike if name not in _TIED],
    }
    if any(problems.values()):
        listing = "\n".join(
            f"{title} ({len(names)}): {', '.join(names)}" for title, names in problems.items() if names
        )
        raise ValueError(
            f"the tensors do not match the published layout; is this a complete released checkpoint of MRA or APTM?\n{listing}"
        )
    text_layers = config.text_config.num_text_layers
    weights = {to_mra_name(name, text_layers): t for name, t in known.items() if not is_derived_buffer(name)}
    return {**weights, "temperature": weights["temperature"].reshape(1)}


def to_published(model: MRAForPreTraining) -> dict[str, torch.Tensor]:
    """Rename the tensors of a model for the published code and add its index and mask buffers.

    The names are in the published order, on which the published resizing of the bias tables depends.
    """
    text_layers = model.config.text_config.num_text_layers
    has_norm = model.config.projection_type == "part_pooling"
    weights = {to_published_name(n, text_layers, has_norm): tensor for n, tensor in model.state_dict().items()}
    weights["temp"] = weights["temp"].reshape(())  # ours has one dimension, which DeepSpeed needs
    buffers = derived_buffers(model.config)
    published: dict[str, torch.Tensor] = {}

    def insert(name: str, after: str | None = None) -> None:
        if name in buffers:  # masks have the model's dtype, as in the published code
            published[name] = buffers[name].to(weights[after].dtype) if after else buffers[name]

    for name in sorted(weights, key=lambda name: next(i for i, group in enumerate(_GROUPS) if name.startswith(group))):
        if name.endswith(".norm1.weight"):
            insert(name.replace("norm1.weight", "attn_mask"), after=name)
        if name.endswith("embeddings.word_embeddings.weight"):
            insert(name.replace("word_embeddings.weight", "position_ids"))
        if name.endswith("downsample.norm.weight"):
            reduction = name.replace("norm", "reduction")
            published[reduction] = weights[reduction]
        published.setdefault(name, weights[name])
        if name == "text_encoder.cls.predictions.decoder.weight":
            tied = name.replace("weight", "bias")
            published[tied] = weights[_TIED[tied]]
        if name.endswith(BIAS_TABLE):
            insert(name.replace(BIAS_TABLE, "relative_position_index"))
    return published


def resize_bias_table(table: torch.Tensor, window_size: int) -> torch.Tensor:
    """Resize a relative-position table with a cubic spline over geometrically spaced distances.

    The source distances grow by a ratio, found by bisection in 1.01..1.5, such that they span the target (reference file
    `resize_tables.json`); near positions keep a finer resolution than far ones.

    Args:
        table: `((2 w - 1) ** 2, heads)`.
        window_size: side of the new window.

    Returns:
        `((2 window_size - 1) ** 2, heads)`; the input itself if the size is unchanged.
    """
    source, target = math.isqrt(table.shape[0]), 2 * window_size - 1
    if source == target:
        return table
    if source == 1:  # a window of one token has no distances
        return table.expand(target * target, -1).clone()
    low, high = 1.01, 1.5
    while high - low > 1e-6:
        ratio = (low + high) / 2
        reach = (1 - ratio ** (source // 2)) / (1 - ratio)
        low, high = (low, ratio) if reach > target // 2 else (ratio, high)
    distances = np.cumsum(ratio ** np.arange(source // 2))
    grid = np.concatenate([-distances[::-1], [0.0], distances])
    points = np.clip(np.arange(-(target // 2), target // 2 + 1, dtype=np.float64), grid[0], grid[-1])
    values = table.detach().double().cpu().numpy().reshape(source, source, -1)
    degree = min(3, source - 1)
    resized = [
        RectBivariateSpline(grid, grid, values[..., head], kx=degree, ky=degree)(points, points)
        for head in range(values.shape[-1])
    ]
    return torch.from_numpy(np.stack(resized, axis=-1)).reshape(target * target, -1).to(table)
