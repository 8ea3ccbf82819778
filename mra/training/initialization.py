"""Initial weights of a run: official Swin and BERT weights, or a pretrained MRA at another image size."""

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import timm
import torch
from timm.models import load_state_dict_from_hf

from configuration_mra import MRAConfig
from modeling_mra import MRAForPreTraining
from mra.common.pretrained import load_pretrained
from mra.common.weight_files import load_tensors
from mra.training.published_layout import BIAS_TABLE, is_derived_buffer, resize_bias_table, shift_downsample


logger = logging.getLogger(__name__)

TIMM_SWIN = "swin_base_patch4_window7_224.ms_in22k"


def load_swin_weights(model: MRAForPreTraining, source: str) -> None:
    """Load the official Swin weights into the vision encoder, with bias tables resized to the model's windows.

    Args:
        model: the model, changed in place.
        source: path of `swin_base_patch4_window7_224_22k.pth`, or `timm` for the same weights from timm's Hub copy.

    Raises:
        ValueError: if the file is missing or does not fit the encoder.
    """
    if source == "timm":
        state_dict = load_state_dict_from_hf(cast(Any, timm.get_pretrained_cfg(TIMM_SWIN)).hf_hub_id)
    else:
        if not Path(source).is_file():
            raise ValueError(
                f"`vision_weights`: {source!r} does not exist; give the path of swin_base_patch4_window7_224_22k.pth, or "
                "`timm` to take the same weights from the Hub"
            )
        state_dict = load_tensors(Path(source), "vision_weights")
        if not isinstance(state_dict, Mapping):
            raise ValueError(f"`vision_weights`: {source!r} must hold a state dict, got a {type(state_dict).__name__}")
        state_dict = {shift_downsample(k, 1): v for k, v in state_dict.get("model", state_dict).items()}
    weights = {k: v for k, v in state_dict.items() if not k.startswith("head.") and not is_derived_buffer(k)}
    _load_part(model.mra.vision_model.swin, _fit_bias_tables(weights, model.config), source)


def load_bert_weights(model: MRAForPreTraining, source: str) -> None:
    """Load BERT weights into the text layers, fusion layers and masked-language head.

    The cross-attention of the fusion layers has no counterpart in BERT and keeps its initialisation.

    Args:
        model: the model, changed in place.
        source: folder or Hub id of a BERT; the published runs use `bert-base-uncased`.

    Raises:
        ValueError: if the weights do not fit the layers.
    """
    from transformers import AutoModelForMaskedLM

    bert, report = load_pretrained(AutoModelForMaskedLM, source, "`text_weights`", output_loading_info=True)
    if report["missing_keys"]:
        logger.warning(f"{source} lacks {', '.join(sorted(report['missing_keys']))}: newly initialised")
    state_dict = bert.state_dict()
    first_fusion = model.config.text_config.num_text_layers
    text, fusion = {}, {}
    for name, tensor in state_dict.items():
        if not name.startswith("bert.") or name.startswith("bert.pooler."):
            continue
        name = name.removeprefix("bert.")
        if name.startswith("encoder.layer."):
            index, rest = name.removeprefix("encoder.layer.").split(".", 1)
            if int(index) >= first_fusion:
                fusion[f"{int(index) - first_fusion}.{rest}"] = tensor
                continue
        text[name] = tensor
    head = {k.removeprefix("cls.predictions."): v for k, v in state_dict.items() if k.startswith("cls.predictions.")}
    head.pop("decoder.bias", None)  # the same as `bias`
    _load_part(model.mra.text_model, text, source)
    _load_part(model.mra.fusion_layers, fusion, source, may_lack="crossattention.")
    _load_part(model.mlm_head, head, source)
    model.tie_weights()


def load_for_finetuning(source: str, **overrides: Any) -> MRAForPreTraining:
    """Load a pretrained MRA with a changed configuration, its bias tables resized to the new windows.

    Args:
        source: folder or Hub id that `from_pretrained` takes.
        overrides: fields of `MRAConfig`; `vision_config` and `text_config` are dicts of the fields to change.

    Returns:
        The model. Projections that differ from the source's in kind or width are newly initialised, as in the
        published fine-tuning on RSTPReid.
    """
    pretrained = load_pretrained(MRAForPreTraining, source, "`model_name_or_path`")
    fields = pretrained.config.to_dict()
    for name, value in overrides.items():
        fields[name] = {**fields[name], **value} if isinstance(value, Mapping) else value
    config = MRAConfig.from_dict(fields)
    model = MRAForPreTraining(config)
    state_dict = _fit_bias_tables(pretrained.state_dict(), config)
    target = model.state_dict()
    for name in [name for name in target if "_projection." in name]:
        if name not in state_dict or state_dict[name].shape != target[name].shape:
            logger.warning(f"{name} is newly initialised: {source} has no weights of this shape")
            state_dict[name] = target[name]
    state_dict = {k: v for k, v in state_dict.items() if k in target or "_projection." not in k}
    _load_part(model, state_dict, source)
    return model


def _fit_bias_tables(state_dict: Mapping[str, torch.Tensor], config: MRAConfig) -> dict[str, torch.Tensor]:
    """Resize every bias table to the window of the stage in its name."""
    fitted = dict(state_dict)
    for name, tensor in state_dict.items():
        if name.endswith(BIAS_TABLE):
            stage = int(name.split("layers.")[1].split(".")[0])
            fitted[name] = resize_bias_table(tensor, config.vision_config.effective_window_size[stage])
    return fitted


def _load_part(
    module: torch.nn.Module, state_dict: Mapping[str, torch.Tensor], source: str, may_lack: str | None = None
) -> None:
    expected = module.state_dict()
    missing = [name for name in expected if name not in state_dict and not (may_lack and may_lack in name)]
    unknown = [name for name in state_dict if name not in expected]
    misshapen = [
        f"{name} {tuple(state_dict[name].shape)} instead of {tuple(expected[name].shape)}"
        for name in expected
        if name in state_dict and state_dict[name].shape != expected[name].shape
    ]
    if missing or unknown or misshapen:
        raise ValueError(
            f"the weights of {source!r} do not fit {type(module).__name__}: missing {missing}, unknown {unknown}, "
            f"of another shape {misshapen}; check depths, widths and vocabulary in the configuration"
        )
    module.load_state_dict(state_dict, strict=not may_lack)
