"""Export a model to ONNX: image encoder, text encoder and matcher, checked against PyTorch before they are saved."""

import contextlib
import importlib.metadata
import json
import logging
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from batching_mra import FusionRows
from modeling_mra import MRAModel
from mra.common.command_line import try_output
from mra.common.digests import write_digests
from mra.common.files import whole_folder
from mra.common.loading import load_model, load_processor
from mra.retrieval.arguments import ExportArguments
from mra.retrieval.encoders import model_fingerprint
from mra.retrieval.onnx_encoder import DESCRIPTION, EXPORT, FILES, import_onnxruntime
from mra.retrieval.retrieval_choice import RetrievalChoice


TOLERANCE = 1e-3  # largest difference from PyTorch, of hidden states, embeddings and logits alike
BATCH_SIZES = (1, 2, 5)
LONGEST = 1 << 30
MATCHES = ((1, 1, 1, 3), (1, 4, 4, LONGEST), (3, 2, 6, 17))  # texts, images, pairs, length
VERSIONS_OF = ("torch", "onnx", "onnxruntime", "onnxscript", "timm", "transformers")


class ImageEncoder(nn.Module):
    """Pixels `(batch, 3, height, width)` -> hidden states `(batch, 1 + patches, hidden)` and embeddings."""

    def __init__(self, model: MRAModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, pixel_values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Encode images."""
        hidden_states = self.model.get_image_hidden_states(pixel_values)
        return hidden_states, self.model.project_image(hidden_states)


class TextEncoder(nn.Module):
    """Tokens and mask `(batch, max_text_length)` -> hidden states `(batch, max_text_length, hidden)` and embeddings."""

    def __init__(self, model: MRAModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Encode texts."""
        hidden_states = self.model.get_text_hidden_states(input_ids, attention_mask)
        return hidden_states, self.model.project_text(hidden_states)


class Matcher(nn.Module):
    """Hidden states of texts (with mask) and images, and text and image of each pair -> logits `(pairs, 2)`."""

    def __init__(self, model: MRAModel) -> None:
        super().__init__()
        self.model = model

    def forward(
        self,
        text_hidden_states: torch.Tensor,
        attention_mask: torch.Tensor,
        image_hidden_states: torch.Tensor,
        text_index: torch.Tensor,
        image_index: torch.Tensor,
    ) -> torch.Tensor:
        """Return the logits of the pairs."""
        # `match_logits` would select [CLS] with `take_along_dim`, and tracing that fixes every size: select it afterwards.
        rows = FusionRows(text_index, image_index)
        fused = self.model.fuse(text_hidden_states, attention_mask, image_hidden_states, rows=rows)
        return self.model.match_head(fused[:, 0])


@dataclass(frozen=True)
class Graph:
    """One of the three exported graphs.

    Attributes:
        name: key of `FILES`.
        module: module to export.
        inputs: names of the inputs and their dynamic dimensions.
        outputs: names of the outputs.
    """

    name: str
    module: nn.Module
    inputs: dict[str, tuple[str, ...]]
    outputs: tuple[str, ...]


def export_model(
    model: str, output: str | Path | None = None, opset: int | None = None, overwrite: bool = False
) -> dict[str, float]:
    """Write a model atomically as ONNX with its configuration and processor.

    Args:
        model: folder or Hub id of any MRA model.
        output: folder to write; None for `onnx` inside the model's folder, where searches find it.
        opset: version of the ONNX operators; None for PyTorch's default.
        overwrite: whether to replace an earlier export at `output`.

    Returns:
        The largest difference from PyTorch of each graph, over all inputs tried.

    Raises:
        ValueError: if the model cannot be loaded or exported, a graph differs from PyTorch by more than `TOLERANCE`, the
            output exists, or the extra `[search]` is not installed.
    """
    import_onnxruntime()
    output = find_output(model, output)
    with _unfinished(output, overwrite) as folder:
        # The exporter cannot handle the memory layout of sdpa's result: use plain products instead.
        loaded, processor = load_model(model, attn_implementation="eager"), load_processor(model)
        graphs = list(make_graphs(loaded.mra))
        versions = [write_graph(graph, loaded.mra, folder, opset) for graph in graphs]
        loaded.set_attn_implementation("sdpa")  # the default at inference
        differences = {graph.name: check_graph(graph, loaded.mra, folder / FILES[graph.name]) for graph in graphs}
        vision = loaded.config.vision_config
        description = {
            "name": str(model),
            "fingerprint": model_fingerprint(loaded, processor),
            "embedding_dim": loaded.config.projection_dim,
            "token_shape": [2, 1 + vision.num_patches, vision.hidden_size],
            "temperature": loaded.temperature.item(),
            "captions": {
                "style": processor.caption_style,
                "max_length": processor.max_text_length,
                "pad_token": processor.tokenizer.pad_token,
            },
            "opset": versions[0],
            "differences": differences,
            "versions": {name: importlib.metadata.version(name) for name in VERSIONS_OF},
        }
        loaded.config.save_pretrained(folder)
        processor.save_pretrained(folder)
        if (choice := RetrievalChoice.load(str(model))) is not None:
            replace(choice, model=None).save(folder)  # tied to the graphs, not to the original weights
        (folder / DESCRIPTION).write_text(json.dumps(description, indent=2) + "\n", encoding="utf-8")
        write_digests(folder)
    return differences


def find_output(model: str, output: str | Path | None) -> Path:
    """Return the folder to write an export to.

    Raises:
        ValueError: if it is not given and the model is not a local folder.
    """
    if output is None and not Path(model).is_dir():
        raise ValueError(f"--output is missing: model {model} is not a local folder, so pass the folder to write")
    return Path(model) / EXPORT if output is None else Path(output)


def make_graphs(model: MRAModel) -> Iterator[Graph]:
    """Yield the three graphs of an MRAModel."""
    yield Graph("image_encoder", ImageEncoder(model), {"pixel_values": ("images",)}, ("hidden_states", "embeds"))
    texts = {"input_ids": ("texts",), "attention_mask": ("texts",)}
    yield Graph("text_encoder", TextEncoder(model), texts, ("hidden_states", "embeds"))
    pairs = {
        "text_hidden_states": ("texts", "length"),
        "attention_mask": ("texts", "length"),
        "image_hidden_states": ("images",),
        "text_index": ("pairs",),
        "image_index": ("pairs",),
    }
    yield Graph("matcher", Matcher(model), pairs, ("logits",))


def write_graph(graph: Graph, model: MRAModel, folder: Path, opset: int | None) -> int:
    """Export a graph with dynamic dimensions.

    Returns:
        The opset of the file.

    Raises:
        ValueError: if the export fails.
    """
    dynamic = [dict.fromkeys(range(len(names)), torch.export.Dim.DYNAMIC) for names in graph.inputs.values()]
    example = example_inputs(graph.name, model, *((3, 2, 6, 17) if graph.name == "matcher" else (2,)))
    # It warns of each operator that it cannot compute beforehand; the finished graph is compared with PyTorch instead.
    logging.getLogger("onnxscript.optimizer").setLevel(logging.ERROR)
    try:
        program: Any = torch.onnx.export(
            graph.module.eval(),
            example,
            dynamo=True,
            dynamic_shapes=tuple(dynamic),
            input_names=list(graph.inputs),
            output_names=list(graph.outputs),
            opset_version=opset,
            verbose=False,
        )
    except Exception as error:  # of any type, with a page of advice for PyTorch developers
        raise ValueError(
            f"{graph.name} cannot be exported with opset {opset or 'default'}: {str(error).strip().splitlines()[-1]}; "
            "try another --opset, or another version of torch and onnxscript"
        ) from error
    for value, names in zip(program.model.graph.inputs, graph.inputs.values(), strict=True):
        for axis, name in enumerate(names):
            value.shape[axis] = name
    program.save(str(folder / FILES[graph.name]), external_data=False)
    return program.model.opset_imports[""]


def check_graph(graph: Graph, model: MRAModel, path: Path) -> float:
    """Compare a file with PyTorch at several batch sizes and lengths.

    Returns:
        The largest difference.

    Raises:
        ValueError: if it is more than `TOLERANCE`, or onnxruntime refuses the file.
    """
    onnxruntime = import_onnxruntime()
    largest = 0.0
    for sizes in MATCHES if graph.name == "matcher" else [(size,) for size in BATCH_SIZES]:
        inputs = example_inputs(graph.name, model, *sizes)
        with torch.no_grad():
            expected = graph.module(*inputs)
        try:
            session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
            arrays = {name: value.numpy() for name, value in zip(graph.inputs, inputs, strict=True)}
            found = session.run(list(graph.outputs), arrays)
        except Exception as error:  # onnxruntime has its own exception types
            raise ValueError(
                f"{graph.name}: onnxruntime cannot run the export with sizes {sizes} ({error})"
            ) from error
        for name, array, tensor in zip(
            graph.outputs, found, expected if len(graph.outputs) > 1 else [expected], strict=True
        ):
            difference = (torch.from_numpy(array) - tensor).abs().max().item()
            if not difference <= TOLERANCE:  # true for NaN too
                raise ValueError(
                    f"{graph.name}: {name} differs from PyTorch by {difference:.2g} with sizes {sizes}, expected at most "
                    f"{TOLERANCE:g}; nothing was written; try another --opset, or another version of torch and onnxscript"
                )
            largest = max(largest, difference)
    return largest


def example_inputs(name: str, model: MRAModel, *sizes: int) -> tuple[torch.Tensor, ...]:
    """Build random inputs of a graph, with texts of different lengths.

    Args:
        name: name of the graph.
        model: the MRAModel.
        sizes: number of images or texts; for the matcher texts, images, pairs and length.
    """
    generator = torch.Generator().manual_seed(sum(size for size in sizes if size != LONGEST))
    config = model.config
    if name == "image_encoder":
        return (torch.randn(sizes[0], 3, *config.vision_config.image_size, generator=generator),)
    texts, length = sizes[0], config.max_text_length
    if name == "matcher":
        length = min(sizes[3], length)
    lengths = torch.randint(2, length + 1, (texts, 1), generator=generator)
    lengths[0] = length
    attention_mask = (torch.arange(length) < lengths).long()
    if name == "text_encoder":
        words = torch.randint(1, config.text_config.vocab_size, (texts, length), generator=generator)
        return words * attention_mask, attention_mask
    _, images, pairs, _ = sizes
    vision = config.vision_config
    return (
        torch.randn(texts, length, config.text_config.hidden_size, generator=generator),
        attention_mask,
        torch.randn(images, 1 + vision.num_patches, vision.hidden_size, generator=generator),
        torch.randint(texts, (pairs,), generator=generator),
        torch.randint(images, (pairs,), generator=generator),
    )


@contextlib.contextmanager
def _unfinished(output: Path, overwrite: bool) -> Iterator[Path]:
    """Yield a temporary folder that is renamed to the output at the end; replace only an earlier export."""
    exists = output.exists() and not (output.is_dir() and not any(output.iterdir()))
    if exists and not overwrite:
        raise ValueError(f"--output {output} exists: pass --overwrite, or another folder")
    if exists and not (output / DESCRIPTION).is_file():
        raise ValueError(f"--output {output} is not an earlier export, so it is not replaced: give another folder")
    try_output(output, "--output")
    output.parent.mkdir(parents=True, exist_ok=True)
    with whole_folder(output) as folder:
        yield folder


def export(arguments: ExportArguments) -> None:
    """Export a model and print sizes and differences."""
    output = find_output(arguments.model, arguments.output)
    differences = export_model(arguments.model, output, arguments.opset, arguments.overwrite)
    for name, difference in differences.items():
        size = (output / FILES[name]).stat().st_size / 2**20
        print(f"{name}: {size:,.1f} MiB, at most {difference:.1g} from PyTorch")
    print(f"wrote {output}")
