"""Loading of models and processors from a folder or the Hub, with clear errors."""

import torch
from safetensors import SafetensorError
from transformers import AutoConfig, AutoImageProcessor, PreTrainedConfig, PreTrainedTokenizerBase

from configuration_mra import MRAConfig
from modeling_mra import MRAForImageTextRetrieval
from mra.common.digests import check_digests
from processing_mra import MRAImageProcessor, MRAProcessor


VOCABULARY_PADDING = 128  # embeddings may be padded to a multiple of at most this, for speed

# The project's own files are used, not the copies in a checkpoint, so no code from a folder is ever run.
AutoConfig.register(MRAConfig.model_type, MRAConfig, exist_ok=True)
AutoImageProcessor.register(MRAConfig, image_processor_classes={"torchvision": MRAImageProcessor}, exist_ok=True)


def load_model(
    path: str, attn_implementation: str = "sdpa", dtype: torch.dtype = torch.float32
) -> MRAForImageTextRetrieval:
    """Load a model in eval mode from any MRA folder or Hub id, including pretraining models.

    Raises:
        ValueError: if there is no such model, it is not an MRA model, a file of it is damaged, or weights are missing.
    """
    check_digests(path)
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
        ValueError: if there is none, it cannot be loaded, or its tokenizer is not the model's.
    """
    check_digests(path)
    try:
        processor = MRAProcessor.from_pretrained(path)
        config = MRAConfig.from_pretrained(path)
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise ValueError(
            f"model {path} has no MRA processor that can be loaded ({error}): "
            "save one beside the weights with MRAProcessor(...).save_pretrained(folder)"
        ) from error
    check_vocabulary(processor.tokenizer, config, f"model {path}")
    return processor


def check_vocabulary(tokenizer: PreTrainedTokenizerBase, config: MRAConfig, where: str) -> None:
    """Check that a tokenizer is as large as the model's vocabulary, but for padding of the embeddings.

    Args:
        tokenizer: to use with the model.
        config: of the model.
        where: starts the message, as `model FOLDER`.

    Raises:
        ValueError: if the tokenizer has more words than the model, or too few to be the model's.
    """
    words, vocab_size = max(tokenizer.get_vocab().values()) + 1, config.text_config.vocab_size
    if not vocab_size - VOCABULARY_PADDING < words <= vocab_size:
        raise ValueError(
            f"{where}: the tokenizer has {words} tokens, but the model has {vocab_size} (`text_config.vocab_size`): use the "
            "tokenizer that the model was trained with, and save it beside the weights with "
            "MRAProcessor(...).save_pretrained(folder)"
        )
