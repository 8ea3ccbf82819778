"""Names and shapes of the released checkpoints, and how they map to and from [`MRAForPreTraining`]."""

import math
import re
from collections.abc import Mapping

import numpy as np
import torch
from scipy.interpolate import RectBivariateSpline

from configuration_mra import MRAConfig
from modeling_mra import MRAForPreTraining


_PREFIXES = (  # published, ours; the order matters: the first that fits is taken
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
_BERT_LAYER = re.compile(r"^(text_encoder\.bert\.)encoder\.layer\.(\d+)\.")
_DOWNSAMPLE = re.compile(r"(layers\.)(\d+)(\.downsample\.)")
BIAS_TABLE = "relative_position_bias_table"


def is_derived_buffer(name: str) -> bool:
    """Whether a published entry holds no weight but an index or mask that follows from the architecture."""
    return name.rsplit(".", 1)[-1] in _DERIVED_BUFFERS


def shift_downsample(name: str, by: int) -> str:
    """Renumbers a merging layer: the official Swin ends stage N with it, timm begins stage N + 1."""
    return _DOWNSAMPLE.sub(lambda match: f"{match[1]}{int(match[2]) + by}{match[3]}", name)


def to_mra_name(name: str, num_text_layers: int) -> str:
    """
    Translates a published parameter name.

    Raises:
        ValueError: if the name belongs to no part of the published layout.
    """
    if name == "temp":
        return "temperature"
    layer = _BERT_LAYER.match(name)
    if layer and int(layer[2]) >= num_text_layers:
        return f"mra.fusion_layers.{int(layer[2]) - num_text_layers}.{name[layer.end() :]}"
    for published, ours in _PREFIXES:
        if name.startswith(published):
            translated = ours + name[len(published) :]
            return shift_downsample(translated, 1) if published == "vision_encoder." else translated
    raise ValueError(f"{name!r} belongs to no part of the published layout.")


def to_published_name(name: str, num_text_layers: int, has_norm: bool) -> str:
    """
    Translates one of our parameter names back.

    Args:
        name: as in `MRAForPreTraining.state_dict()`.
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
    raise ValueError(f"{name!r} is no parameter of MRAForPreTraining.")


# ---------------------------------------------------------------- architecture


def infer_config(
    state_dict: Mapping[str, torch.Tensor], stored: Mapping | None = None, image_size: tuple[int, int] | None = None
) -> MRAConfig:
    """
    Reads the architecture off the tensors of a released checkpoint and its stored configuration.

    Args:
        state_dict: tensors by published name.
        stored: the checkpoint's `config`, where it has one.
        image_size: height and width in pixels, where neither the configuration nor the shift masks tell.

    Returns:
        A configuration with the published choices (`region_features`, `itc_gradient`, region weight 0.64).

    Raises:
        ValueError: if a part is missing or the image size cannot be known.
    """
    stored = dict(stored or {})
    vision = _infer_vision(state_dict, stored, image_size)
    text = _infer_text(state_dict, stored)
    has_norm = "vision_proj.0.weight" in state_dict
    projection = state_dict["vision_proj.2.weight" if has_norm else "vision_proj.weight"]
    return MRAConfig(
        vision_config=vision,
        text_config=text,
        projection_type="part_pooling" if has_norm else "linear",
        projection_dim=projection.shape[0],
        max_text_length=stored.get("max_tokens", 56),
        temperature=stored.get("temp", 0.07),
        label_smoothing=stored.get("LabelSmooth", 0.0),
        region_weight=0.64,
        region_features="published_code",
        itc_gradient="published",
    )


def _infer_vision(state_dict, stored, image_size) -> dict:
    prefix = "vision_encoder."
    patch = _require(state_dict, f"{prefix}patch_embed.proj.weight")
    blocks = [re.match(rf"{re.escape(prefix)}layers\.(\d+)\.blocks\.(\d+)\.norm1\.weight$", name) for name in state_dict]
    counts: dict[int, int] = {}
    for match in filter(None, blocks):
        counts[int(match[1])] = max(counts.get(int(match[1]), 0), int(match[2]) + 1)
    depths = [counts[stage] for stage in sorted(counts)]
    tables = [_require(state_dict, f"{prefix}layers.{stage}.blocks.0.attn.{BIAS_TABLE}") for stage in range(len(depths))]
    details = stored.get("vision_config")
    details = details if isinstance(details, Mapping) else {}
    windows = [(math.isqrt(table.shape[0]) + 1) // 2 for table in tables]
    if image_size is None:
        image_size = _stored_image_size(stored, details) or _image_size_from_masks(state_dict, windows, patch.shape[-1])
    if image_size is None:
        raise ValueError(
            "The checkpoint holds neither `h` and `w` in its config nor a shift mask to read the image size from: "
            "pass --image_size HEIGHT WIDTH."
        )
    return {
        "image_size": list(image_size),
        "patch_size": patch.shape[-1],
        "num_channels": patch.shape[1],
        "embed_dim": patch.shape[0],
        "depths": depths,
        "num_heads": [table.shape[1] for table in tables],
        "window_size": windows,
        "mlp_ratio": state_dict[f"{prefix}layers.0.blocks.0.mlp.fc1.weight"].shape[0] / patch.shape[0],
        "drop_rate": details.get("drop_rate", 0.0),
        "drop_path_rate": details.get("drop_path_rate", 0.1),
    }


def _stored_image_size(*configs: Mapping) -> tuple[int, int] | None:
    for config in configs:
        if "h" in config and "w" in config:
            return int(config["h"]), int(config["w"])
    return None


def _image_size_from_masks(state_dict, windows: list[int], patch_size: int) -> tuple[int, int] | None:
    """
    Reads the image size off a shift mask `(windows, area, area)`.

    Windows are counted row by row and only those of the last row and column are masked, so the first masked window
    ends the first row.
    """
    for name, mask in state_dict.items():
        match = re.match(r"vision_encoder\.layers\.(\d+)\.blocks\.\d+\.attn_mask$", name)
        if match:
            masked = mask.flatten(1).ne(0).any(dim=1).nonzero().flatten()
            columns = int(masked[0]) + 1
            rows = mask.shape[0] // columns
            scale = windows[int(match[1])] * patch_size * 2 ** int(match[1])
            if rows > 1 and columns > 1:
                return rows * scale, columns * scale
    return None


def _infer_text(state_dict, stored) -> dict:
    prefix = "text_encoder.bert."
    words = _require(state_dict, f"{prefix}embeddings.word_embeddings.weight")
    layers = {int(match[2]) for match in map(_BERT_LAYER.match, state_dict) if match}
    fusion = {int(_BERT_LAYER.match(name)[2]) for name in state_dict if ".crossattention." in name}
    if not layers or not fusion:
        raise ValueError("The checkpoint holds no BERT layers with cross-attention: is it a released MRA checkpoint?")
    details = stored.get("text_config")
    details = details if isinstance(details, Mapping) else {}
    hidden_size = words.shape[1]
    return {
        "vocab_size": words.shape[0],
        "hidden_size": hidden_size,
        "num_hidden_layers": len(layers),
        "num_fusion_layers": len(fusion),
        "num_attention_heads": details.get("num_attention_heads", max(1, hidden_size // 64)),  # 64 wide in every BERT
        "intermediate_size": _require(state_dict, f"{prefix}encoder.layer.0.intermediate.dense.weight").shape[0],
        "max_position_embeddings": _require(state_dict, f"{prefix}embeddings.position_embeddings.weight").shape[0],
        "type_vocab_size": _require(state_dict, f"{prefix}embeddings.token_type_embeddings.weight").shape[0],
        "hidden_dropout_prob": details.get("hidden_dropout_prob", 0.1),
        "attention_probs_dropout_prob": details.get("attention_probs_dropout_prob", 0.1),
        "layer_norm_eps": details.get("layer_norm_eps", 1e-12),
    }


def _require(state_dict, name: str) -> torch.Tensor:
    if name not in state_dict:
        raise ValueError(f"The checkpoint has no {name!r}: it is not in the layout of the released MRA checkpoints.")
    return state_dict[name]


# ---------------------------------------------------------------- tensors


def from_published(state_dict: Mapping[str, torch.Tensor], config: MRAConfig) -> dict[str, torch.Tensor]:
    """
    Renames the tensors of a released checkpoint for `MRAForPreTraining(config)`.

    Raises:
        ValueError: listing every tensor that is unknown, missing or of another shape.
    """
    with torch.device("meta"):
        expected = MRAForPreTraining(config).state_dict()
    converted, unknown = {}, []
    for name, tensor in state_dict.items():
        if is_derived_buffer(name):
            continue
        try:
            translated = to_mra_name(name, config.text_config.num_text_layers)
        except ValueError:
            unknown.append(name)
            continue
        if translated in expected:
            converted[translated] = tensor
        else:
            unknown.append(name)
    missing = sorted(expected.keys() - converted.keys())
    misshapen = [
        f"{name}: {tuple(tensor.shape)} instead of {tuple(expected[name].shape)}"
        for name, tensor in converted.items()
        if tensor.shape != expected[name].shape
    ]
    problems = {"unknown": unknown, "missing (by our name)": missing, "of another shape": misshapen}
    if any(problems.values()):
        listing = "\n".join(f"{title}: {', '.join(names)}" for title, names in problems.items() if names)
        raise ValueError(f"The checkpoint does not fit the published layout.\n{listing}")
    return converted


def to_published(model: MRAForPreTraining) -> dict[str, torch.Tensor]:
    """Renames the tensors of a model for the published code, its index and mask buffers included."""
    text = model.config.text_config
    has_norm = model.config.projection_type == "part_pooling"
    published = {
        to_published_name(name, text.num_text_layers, has_norm): tensor for name, tensor in model.state_dict().items()
    }
    published["text_encoder.bert.embeddings.position_ids"] = torch.arange(text.max_position_embeddings)[None]
    for name, buffer in model.mra.vision_model.swin.named_buffers():
        if is_derived_buffer(name):
            published[f"vision_encoder.{name}"] = buffer
    return published


def resize_bias_table(table: torch.Tensor, window_size: int) -> torch.Tensor:
    """
    Resizes a relative-position table with a cubic spline over geometrically spaced distances.

    The source distances grow by a ratio found by bisection in 1.01..1.5 so that they span the target (reference file
    `resize_tables.json`), which keeps near positions finer than far ones.

    Args:
        table: `((2 w - 1) ** 2, heads)`.
        window_size: side of the new window.

    Returns:
        `((2 window_size - 1) ** 2, heads)`, the input itself if the size stays.
    """
    source, target = math.isqrt(table.shape[0]), 2 * window_size - 1
    if source == target:
        return table
    low, high = 1.01, 1.5
    while high - low > 1e-6:
        ratio = (low + high) / 2
        reach = (1 - ratio ** (source // 2)) / (1 - ratio)
        low, high = (low, ratio) if reach > target // 2 else (ratio, high)
    distances = np.cumsum(ratio ** np.arange(source // 2))
    grid = np.concatenate([-distances[::-1], [0.0], distances])
    points = np.clip(np.arange(-(target // 2), target // 2 + 1, dtype=np.float64), grid[0], grid[-1])
    values = table.detach().double().cpu().numpy().reshape(source, source, -1)
    resized = [RectBivariateSpline(grid, grid, values[..., head])(points, points) for head in range(values.shape[-1])]
    return torch.from_numpy(np.stack(resized, axis=-1)).reshape(target * target, -1).to(table)
