"""Loading of models and processors from a folder or the Hub, with clear errors."""

import torch
from safetensors import SafetensorError
from transformers import AutoConfig, AutoImageProcessor, PreTrainedConfig

from configuration_mra import MRAConfig
from modeling_mra import MRAForImageTextRetrieval
from processing_mra import MRAImageProcessor, MRAProcessor


# The project's own files are used, not the copies in a checkpoint, so no code from a folder is ever run.
AutoConfig.register(MRAConfig.model_type, MRAConfig, exist_ok=True)
AutoImageProcessor.register(MRAConfig, image_processor_classes={"torchvision": MRAImageProcessor}, exist_ok=True)


def load_model(
    path: str, attn_implementation: str = "sdpa", dtype: torch.dtype = torch.float32
) -> MRAForImageTextRetrieval:
    """Load a model in eval mode from any MRA folder or Hub id, including pretraining models.

    Raises:
        ValueError: if there is no such model, it is not an MRA model, or weights are missing.
    """
    try:
        config, _ = PreTrainedConfig.get_config_dict(path)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"model {path} is neither a folder with a config.json nor a model on the Hub that can be reached ({error})"
        ) from error
    if config.get("model_type") != MRAConfig.model_type:
        raise ValueError(
            f"model {path} is of model_type {config.get('model_type')!r}, expected {MRAConfig.model_type!r}: "
            "convert a published checkpoint with `mra convert` first"
        )
    try:
        model, loading = MRAForImageTextRetrieval.from_pretrained(  # pyright: ignore[reportGeneralTypeIssues]  # with info
            path, dtype=dtype, attn_implementation=attn_implementation, output_loading_info=True
        )
    except (OSError, SafetensorError, RuntimeError) as error:
        raise ValueError(
            f"model {path} has no readable weights ({error}): a weight file is missing, truncated or of another kind; "
            "download or save the model again"
        ) from error
    if loading["missing_keys"]:
        names = sorted(loading["missing_keys"])
        raise ValueError(
            f"model {path} lacks {len(names)} weights, including {', '.join(names[:5])}: save it again with save_pretrained"
        )
    return model.eval()


def load_processor(path: str) -> MRAProcessor:
    """Load the processor stored with a model, in a folder or on the Hub.

    Raises:
        ValueError: if there is none or it cannot be loaded.
    """
    try:
        processor = MRAProcessor.from_pretrained(path)
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise ValueError(
            f"model {path} has no MRA processor that can be loaded ({error}): "
            "save one beside the weights with MRAProcessor(...).save_pretrained(folder)"
        ) from error
    if getattr(processor, "tokenizer", None) is None:
        raise ValueError(
            f"model {path} has a processor without a tokenizer: save it with MRAProcessor.save_pretrained"
        )
    return processor
