"""Encoder of a gallery in onnxruntime, from a folder written by `mra export`."""

import json
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

import torch

from mra.common.digests import check_digests
from mra.common.extras import extra_needed
from mra.common.loading import load_processor
from mra.common.sharding import cut_batches
from mra.retrieval.encode import ImageEncodings, TextEncodings, read_row, undecoded
from mra.retrieval.encoders import chosen_match_weight, seen_log_odds


FILES = {name: f"{name}.onnx" for name in ("image_encoder", "text_encoder", "matcher")}
DESCRIPTION = "onnx.json"
PAIRS_PER_RUN = 32  # of text and image; small enough for a CPU's cache


class OnnxEncoder:
    """A model in onnxruntime; see `mra.retrieval.encoders.Encoder` for its members.

    It runs on the GPU if onnxruntime was built with CUDA, else on the CPU with as many threads as PyTorch.

    Args:
        folder: folder written by `mra export`.
        device: "cuda" or "cpu"; None for the GPU if there is one.
        batch_size: images or texts per run.

    Raises:
        ValueError: if the folder is not an export, or onnxruntime is not installed or cannot load it.
    """

    def __init__(self, folder: str | Path, device: str | torch.device | None = None, batch_size: int = 32) -> None:
        onnxruntime = import_onnxruntime()
        folder = Path(folder)
        missing = [name for name in (DESCRIPTION, *FILES.values()) if not (folder / name).is_file()]
        if missing:
            raise ValueError(
                f"model {folder} is not an ONNX export, it lacks {', '.join(missing)}: make one with "
                "`mra export --model MODEL --output FOLDER`"
            )
        check_digests(folder)
        description = json.loads((folder / DESCRIPTION).read_text(encoding="utf-8"))
        self.folder = folder
        self.name = description["name"]
        self.fingerprint = description["fingerprint"]
        self.embedding_dim = description["embedding_dim"]
        self.token_shape = tuple(description["token_shape"])
        self.temperature = description["temperature"]
        self.batch_size = batch_size
        self.processor = load_processor(str(folder))
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        providers = _providers(onnxruntime, device)
        self.device = torch.device("cpu" if len(providers) == 1 else "cuda")
        try:
            self._sessions = {
                name: onnxruntime.InferenceSession(str(folder / file), options, providers=providers)
                for name, file in FILES.items()
            }
        except Exception as error:  # onnxruntime has its own exception types
            raise ValueError(f"model {folder}: onnxruntime cannot load it ({error})") from error

    @property
    def match_weight(self) -> float | None:
        """Weight chosen on validation; see `TorchEncoder.match_weight`."""
        return chosen_match_weight(str(self.folder))

    @property
    def largest_log_odds(self) -> dict[int, float]:
        """Bounds seen on validation; see `TorchEncoder.largest_log_odds`."""
        return seen_log_odds(str(self.folder))

    def encode_images(self, images: Sequence, flip: bool = True) -> ImageEncodings:
        """Encode PIL images, or rows with an "image", and with `flip` their mirror images; keep hidden states of all.

        Raises:
            ValueError: if there are no images, or one cannot be read (the message gives its row).
        """
        if len(images) == 0:
            raise ValueError("images is empty: expected at least one image")
        images, batches = undecoded(images), cut_batches(len(images), self.batch_size)
        embeds, tokens = [], []
        for batch in batches:
            pictures = [read_row(images, row) for row in batch]
            pixel_values = self.processor(images=pictures)["pixel_values"]
            pixels = (pixel_values, pixel_values.flip(-1)) if flip else (pixel_values,)
            views = [self._run("image_encoder", pixel_values=view) for view in pixels]
            tokens.append(torch.stack([hidden_states for hidden_states, _ in views], dim=1))
            embeds.append(torch.stack([embedded for _, embedded in views]).mean(dim=0))
        return ImageEncodings(torch.cat(embeds), torch.cat(tokens), torch.arange(len(images)), batches)

    def encode_texts(self, texts: Sequence[str]) -> TextEncodings:
        """Encode texts, including hidden states.

        Raises:
            ValueError: if there are no texts, or one has no word.
        """
        if len(texts) == 0:
            raise ValueError("texts is empty: expected at least one caption")
        for row, text in enumerate(texts):
            if not isinstance(text, str) or not text.strip():
                raise ValueError(f"caption {row} must be a text with at least one word, got {text!r}")
        embeds, tokens, lengths = [], [], []
        for batch in cut_batches(len(texts), self.batch_size):
            inputs = self.processor(text=[texts[row] for row in batch])
            mask = inputs["attention_mask"]
            states, embedded = self._run("text_encoder", input_ids=inputs["input_ids"], attention_mask=mask)
            embeds.append(embedded)
            tokens.append(states[mask.bool()])
            lengths.append(mask.sum(dim=1))
        return TextEncodings(torch.cat(embeds), torch.cat(tokens), torch.cat(lengths))

    def match(self, texts: TextEncodings, image_tokens: torch.Tensor) -> torch.Tensor:
        """Match every text with every image, `(images, views, 1 + patches, hidden)`: log-odds `(views, texts, images)`."""
        num_texts, num_images = len(texts.lengths), len(image_tokens)
        scores = torch.empty(image_tokens.shape[1], num_texts, num_images)
        for row in range(num_texts):
            states, mask = texts.padded(torch.tensor([row]))
            for start in range(0, num_images, PAIRS_PER_RUN):
                images = image_tokens[start : start + PAIRS_PER_RUN].float()
                inputs = {"text_hidden_states": states, "attention_mask": mask}
                inputs["text_index"] = torch.zeros(len(images), dtype=torch.long)
                inputs["image_index"] = torch.arange(len(images))
                for view in range(len(scores)):
                    (logits,) = self._run("matcher", **inputs, image_hidden_states=images[:, view].contiguous())
                    scores[view, row, start : start + len(images)] = logits[:, 1] - logits[:, 0]
        return scores

    def _run(self, name: str, **inputs: torch.Tensor) -> list[torch.Tensor]:
        arrays = self._sessions[name].run(None, {key: value.numpy() for key, value in inputs.items()})
        return [torch.from_numpy(array) for array in arrays]


def import_onnxruntime() -> ModuleType:
    """Import onnxruntime.

    Raises:
        ValueError: if it cannot be imported.
    """
    try:
        import onnxruntime
    except ImportError as error:
        raise extra_needed("ONNX", "search", error) from error
    return onnxruntime


def _providers(onnxruntime: ModuleType, device: str | torch.device | None) -> list[str]:
    has_cuda = "CUDAExecutionProvider" in onnxruntime.get_available_providers()
    kind = torch.device(device or ("cuda" if has_cuda else "cpu")).type
    if kind not in ("cpu", "cuda") or (kind == "cuda" and not has_cuda):
        raise ValueError(
            f"device {device}: this onnxruntime runs on {'cuda and cpu' if has_cuda else 'cpu only'}; for an NVIDIA GPU "
            "install onnxruntime-gpu instead of onnxruntime"
        )
    return ["CUDAExecutionProvider", "CPUExecutionProvider"] if kind == "cuda" else ["CPUExecutionProvider"]
