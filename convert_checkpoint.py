"""Convert a released MRA or APTM checkpoint to a folder for `from_pretrained`, or back.

    python convert_checkpoint.py --checkpoint data/checkpoint/ft_cuhk.pth --output models/mra-cuhk \
        --tokenizer bert-base-uncased
    python convert_checkpoint.py --to_published --checkpoint models/mra-cuhk --output ft_cuhk.pth

The architecture is inferred from the tensors and the stored configuration. The folder contains weights (safetensors),
configuration, code, model card and, with a tokenizer, the processor. Converting back gives the same tensors, bit for bit.
"""

import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mra.common.arguments import parse_arguments
from mra.training.arguments import ConversionArguments, HubArguments


if __name__ == "__main__":
    # Answer --help and report typos before the imports below, which take seconds.
    parse_arguments([ConversionArguments], description=__doc__, config=False)

import numpy as np
import torch
from accelerate import PartialState
from safetensors import SafetensorError
from safetensors.torch import load_file
from transformers import AutoTokenizer

from configuration_mra import MRAConfig
from modeling_mra import MRAForPreTraining
from mra.common.command_line import plain_errors, try_output, writing_to
from mra.common.digests import write_digests
from mra.common.files import whole_file, whole_folder
from mra.common.pretrained import load_pretrained
from mra.common.weight_files import load_tensors
from mra.training.model_card import build_converted_card, push_folder
from mra.training.published_layout import (
    describe_config,
    from_published,
    infer_config,
    refuse_other_layouts,
    to_published,
)
from processing_mra import MRAImageProcessor, MRAProcessor


logger = logging.getLogger(__name__)

PUBLISHED_CONFIG = "published_config.json"
WEIGHTS, WEIGHTS_INDEX = "model.safetensors", "model.safetensors.index.json"
WRAPPERS = ("model", "state_dict", "model_state_dict")  # entries that hold a state dict
PREFIXES = ("module.", "_orig_mod.")  # of DistributedDataParallel and torch.compile


def main(argv: list[str] | None = None, program: str = "convert_checkpoint.py") -> None:
    """Convert a checkpoint between the published layout and folders for `from_pretrained`."""
    (args,) = parse_arguments([ConversionArguments], prog=program, description=__doc__, argv=argv, config=False)
    logging.basicConfig(format="%(levelname)s: %(message)s")
    with plain_errors(program, args.output, (ValueError,)):
        if args.to_published:
            convert_to_published(args.checkpoint, args.output, args.overwrite)
        else:
            convert_to_folder(
                args.checkpoint, args.output, args.image_size, args.tokenizer, args.overwrite, args.push_to_hub,
                args.num_attention_heads,
            )  # fmt: skip
    print(f"wrote {args.output}")
    if args.push_to_hub:
        PartialState()  # required by the logger of the upload
        hub = HubArguments(push_to_hub=True, hub_model_id=args.push_to_hub)
        with plain_errors(program):
            print(f"pushed to {push_folder(args.output, hub, message='Upload converted checkpoint')}")


# ---------------------------------------------------------------- .pth -> folder


def convert_to_folder(
    checkpoint: str | Path,
    output: str | Path,
    image_size: list[int] | None = None,
    tokenizer: str | None = None,
    overwrite: bool = False,
    repository: str | None = None,
    num_attention_heads: int | None = None,
) -> MRAConfig:
    """Write a released checkpoint of MRA or APTM atomically as a folder for `from_pretrained`.

    Args:
        checkpoint: a `.pth` file, see [`read_checkpoint`].
        output: folder to write.
        image_size: height and width in pixels, if the checkpoint does not record them.
        tokenizer: Hub id or folder; without one the folder has no processor.
        overwrite: whether to replace an existing MRA folder.
        repository: Hub id for the model card; None for the folder's name.
        num_attention_heads: heads of each BERT layer, if the checkpoint does not record them.

    Returns:
        The configuration inferred from the checkpoint.

    Raises:
        ValueError: if the checkpoint cannot be read, a tensor is unknown, missing or wrong, the tokenizer does not fit,
            or the output exists.
    """
    checkpoint, output = Path(checkpoint), Path(output)
    _check_folder(output, overwrite)
    try_output(output, "`output`")
    with writing_to(output), whole_folder(output) as folder:
        state_dict, stored = read_checkpoint(checkpoint)
        try:
            config = infer_config(state_dict, stored, image_size, num_attention_heads)
            model = assemble(config, from_published(state_dict, config))
        except ValueError as error:
            raise ValueError(f"{checkpoint}: {error}") from error
        processor = None if tokenizer is None else build_processor(config, stored or {}, tokenizer)
        model.save_pretrained(folder)
        if processor is None:
            logger.warning("no --tokenizer was given: %s contains no processor", output)
        else:
            processor.save_pretrained(folder)
        if stored is not None:
            (folder / PUBLISHED_CONFIG).write_text(json.dumps(stored, indent=2) + "\n", encoding="utf-8")
        card = build_converted_card(
            repository or output.name, checkpoint.name, describe_architecture(config), processor is not None
        )
        (folder / "README.md").write_text(card, encoding="utf-8")
        write_digests(folder)
    return config


def read_checkpoint(path: str | Path) -> tuple[dict[str, torch.Tensor], dict | None]:
    """Read the tensors of a released checkpoint and its stored configuration, if it has one.

    The file holds a state dict, bare or as `model`, `state_dict` or `model_state_dict`, optionally with a `config`. Names may
    have the prefix of DistributedDataParallel or torch.compile. Only tensors, plain values and NumPy's numbers and arrays are
    unpickled; tensors are mapped from disk.

    Raises:
        ValueError: if the file is missing, damaged or from another model, or holds other objects or weights that are not
            finite.
    """
    path = Path(path)
    content = load_tensors(path, "checkpoint")
    state_dict, stored = content, None
    wrappers = [name for name in WRAPPERS if name in content] if isinstance(content, Mapping) else []
    if len(wrappers) > 1:
        raise ValueError(f"{path} holds several state dicts ({', '.join(wrappers)}): save only the one to convert")
    if wrappers:
        state_dict, stored = content[wrappers[0]], content.get("config")
        ignored = sorted(str(name) for name in content.keys() - {wrappers[0], "config"})
        if ignored:
            logger.warning("%s: ignoring entries that are not part of a model: %s", path, ", ".join(ignored))
    if stored is not None and not isinstance(stored, Mapping):
        raise ValueError(f"{path}: `config` must be a mapping, got a {type(stored).__name__}")
    if not isinstance(state_dict, Mapping) or not state_dict:
        raise ValueError(
            f"{path} must hold a state dict of tensors, bare or as one of {', '.join(WRAPPERS)}, got a "
            f"{type(state_dict).__name__}{'' if state_dict else ' that is empty'}"
        )
    others = [f"{name!r} ({type(value).__name__})" for name, value in state_dict.items() if not torch.is_tensor(value)]
    if others:
        raise ValueError(
            f"{path} must hold a state dict of tensors, but it also holds {', '.join(others[:5])}; known entries "
            f"for the state dict are {', '.join(WRAPPERS)}"
        )
    state_dict = _strip_prefixes({str(name): tensor for name, tensor in state_dict.items()})
    try:
        refuse_other_layouts(state_dict)
        stored = None if stored is None else _plain(stored, "config")
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    _refuse_infinite(path, state_dict)
    return state_dict, stored


def _strip_prefixes(state_dict: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    while prefix := next((p for p in PREFIXES if all(name.startswith(p) for name in state_dict)), None):
        state_dict = {name.removeprefix(prefix): tensor for name, tensor in state_dict.items()}
    return state_dict


def _plain(value: Any, name: str) -> Any:
    """Convert NumPy's and torch's numbers, arrays and dtypes in a stored configuration to JSON values.

    Raises:
        ValueError: if an entry is of another type; the message names it.
    """
    if isinstance(value, Mapping):
        return {str(key): _plain(inner, f"{name}.{key}") for key, inner in value.items()}
    if isinstance(value, (np.ndarray, np.generic, torch.Tensor)):
        value = value.tolist()
    if isinstance(value, (list, tuple, set)):
        return [_plain(inner, f"{name}[{position}]") for position, inner in enumerate(value)]
    if isinstance(value, (np.dtype, torch.dtype, torch.device)):
        return str(value)
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    raise ValueError(f"`{name}` must be a plain value, got a {type(value).__name__}: save the checkpoint without it")


def _refuse_infinite(path: Path, state_dict: Mapping[str, torch.Tensor]) -> None:
    diverged = [name for name, tensor in state_dict.items() if not torch.isfinite(tensor).all()]
    if diverged:
        raise ValueError(
            f"{path} holds NaN or infinite values in {len(diverged)} of {len(state_dict)} tensors "
            f"({', '.join(diverged[:5])}): its training diverged or the file is damaged; take an earlier "
            "checkpoint or download it again"
        )


def assemble(config: MRAConfig, state_dict: Mapping[str, torch.Tensor]) -> MRAForPreTraining:
    """Build a model from existing tensors, in their precision and without copies.

    The model can be saved but not run: non-persistent buffers have no data.
    """
    with torch.device("meta"):
        model = MRAForPreTraining(config)
    model.load_state_dict(state_dict, assign=True)
    model.tie_weights()
    return model


def build_processor(config: MRAConfig, stored: Mapping, tokenizer: str) -> MRAProcessor:
    """Build the processor of a converted model.

    Args:
        config: the model's configuration.
        stored: the checkpoint's configuration; `icfg_rstp` chooses the caption style.
        tokenizer: Hub id or folder.

    Raises:
        ValueError: if the tokenizer cannot be loaded or has more tokens than the model.
    """
    loaded = load_pretrained(AutoTokenizer, tokenizer, "`tokenizer`")
    words = config.text_config.vocab_size
    if len(loaded) > words:
        raise ValueError(
            f"`tokenizer`: {tokenizer!r} has {len(loaded)} tokens, but the checkpoint has {words}: give the one it was "
            "trained with (bert-base-uncased for the released checkpoints)"
        )
    if len(loaded) < words:
        logger.warning(
            "%s has %d tokens, but the checkpoint has %d: is it the right tokenizer?", tokenizer, len(loaded), words
        )
    height, width = config.vision_config.image_size
    return MRAProcessor(
        MRAImageProcessor(size={"height": height, "width": width}),
        loaded,
        max_text_length=config.max_text_length,
        caption_style="clean" if stored.get("icfg_rstp") else "plain",
    )


def describe_architecture(config: MRAConfig) -> dict[str, str]:
    """Return facts about the architecture for the model card."""
    vision, text = config.vision_config, config.text_config
    return {
        "image size": f"{vision.image_size[0]} x {vision.image_size[1]} pixels (height x width)",
        "image encoder": f"Swin, width {vision.embed_dim}, depths {vision.depths}, windows {vision.window_size}",
        "text encoder": f"{text.num_text_layers} BERT layers, then {text.num_fusion_layers} that attend to the image",
        "shared space": f"{config.projection_dim} wide ({config.projection_type})",
    }


# ---------------------------------------------------------------- folder -> .pth


def convert_to_published(folder: str | Path, output: str | Path, overwrite: bool = False) -> None:
    """Write a model folder atomically as a `.pth` file in the published layout.

    Args:
        folder: folder of a converted or trained `MRAForPreTraining`.
        output: file to write.
        overwrite: whether to replace an existing file.

    Raises:
        ValueError: if the folder does not hold such a model or the output exists.
    """
    folder, output = Path(folder), Path(output)
    if output.is_dir() or (output.exists() and not overwrite):
        fix = "give a file name" if output.is_dir() else "pass --overwrite or another name"
        raise ValueError(f"`output`: {str(output)!r} exists: {fix}")
    if not (folder / "config.json").is_file():
        raise ValueError(f"`checkpoint`: {str(folder)!r} is not a folder with a config.json")
    try_output(output, "`output`")
    with writing_to(output), whole_file(output) as unfinished:
        config = load_pretrained(MRAConfig, str(folder), "`checkpoint`")
        published = folder / PUBLISHED_CONFIG
        stored = json.loads(published.read_text(encoding="utf-8")) if published.is_file() else describe_config(config)
        model = assemble(config, _complete(read_folder(folder), config, folder))
        torch.save({"model": to_published(model), "config": stored}, unfinished)


def read_folder(folder: Path) -> dict[str, torch.Tensor]:
    """Read the safetensors of a folder, in one or several files, each tensor in its saved precision.

    Raises:
        ValueError: if there are none, or a file cannot be read.
    """
    if (folder / WEIGHTS_INDEX).is_file():
        try:
            index = json.loads((folder / WEIGHTS_INDEX).read_text(encoding="utf-8"))
            files = sorted(set(index["weight_map"].values()))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(
                f"`checkpoint`: {folder / WEIGHTS_INDEX} is damaged ({error!r}); save or copy it again"
            ) from error
    else:
        files = [WEIGHTS]
    state_dict = {}
    for name in files:
        if not (folder / name).is_file():
            raise ValueError(f"`checkpoint`: {str(folder)!r} has no {name}: save the model with save_pretrained")
        try:
            state_dict |= load_file(folder / name)
        except (OSError, SafetensorError) as error:
            raise ValueError(
                f"`checkpoint`: {folder / name} cannot be read ({error}); save or copy it again"
            ) from error
    return state_dict


def _complete(state_dict: dict[str, torch.Tensor], config: MRAConfig, folder: Path) -> dict[str, torch.Tensor]:
    """Add the tied tensors, which safetensors store once, and check that no tensor is missing."""
    for target, source in MRAForPreTraining._tied_weights_keys.items():
        if source in state_dict:
            state_dict.setdefault(target, state_dict[source])
        elif target in state_dict:
            state_dict[source] = state_dict[target]
    with torch.device("meta"):
        expected = MRAForPreTraining(config).state_dict()
    missing = [name for name in expected if name not in state_dict]
    unknown = [name for name in state_dict if name not in expected]
    misshapen = [name for name in expected if name in state_dict and state_dict[name].shape != expected[name].shape]
    if missing or unknown or misshapen:
        raise ValueError(
            f"`checkpoint`: {str(folder)!r} is not a complete MRAForPreTraining: missing {missing}, unknown {unknown}, of "
            f"another shape {misshapen}; folders of a bare MRAModel lack what the published layout needs"
        )
    return state_dict


# ---------------------------------------------------------------- output


def _check_folder(output: Path, overwrite: bool) -> None:
    """Allow an existing output only with `--overwrite`, and only if it is an MRA folder."""
    if not output.exists() or (output.is_dir() and not any(output.iterdir())):
        return
    if not overwrite:
        raise ValueError(f"`output`: {str(output)!r} exists: pass --overwrite or another name")
    config = output / "config.json"
    known = config.is_file() and json.loads(config.read_text(encoding="utf-8")).get("model_type")
    if known != MRAConfig.model_type:
        raise ValueError(f"`output`: {str(output)!r} is not an MRA folder, so it is not replaced: give another name")


if __name__ == "__main__":
    main()
