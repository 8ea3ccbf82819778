"""Encoder of a gallery in onnxruntime, from a folder written by `mra export`.

A search by text imports neither PyTorch nor transformers, which take seconds to import. Images are prepared by the model's
image processor, so that encoding one imports both.
"""

import functools
import json
import logging
import os
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

import numpy as np

from captions_mra import normalize_caption
from mra.common.digests import check_digests
from mra.common.extras import extra_needed
from mra.retrieval.input_checks import require_finite_rows, require_words
from mra.retrieval.retrieval_choice import FILE_NAME, chosen_match_weight, seen_log_odds


if TYPE_CHECKING:
    from processing_mra import MRAProcessor


logger = logging.getLogger(__name__)

FILES = {name: f"{name}.onnx" for name in ("image_encoder", "text_encoder", "matcher")}
DESCRIPTION = "onnx.json"
TOKENIZER = "tokenizer.json"

# Folder of the export inside that of the model.
EXPORT = "onnx"

PAIRS_PER_RUN = 32  # of text and image; small enough for a CPU's cache


@dataclass
class ImageArrays:
    """Encoded images.

    Attributes:
        embeds: features, the mean of both views, `(images, embedding_dim)` float32.
        hidden_states: `(images, views, 1 + patches, hidden)` float32.
    """

    embeds: np.ndarray
    hidden_states: np.ndarray

    def __post_init__(self) -> None:
        require_finite_rows(self.embeds, "image")


@dataclass
class TextArrays:
    """Encoded texts, without padding.

    Attributes:
        embeds: features, `(texts, embedding_dim)` float32.
        hidden_states: `(tokens of all texts, hidden)` float32, texts concatenated.
        lengths: number of tokens of each text, `(texts,)`.
    """

    embeds: np.ndarray
    hidden_states: np.ndarray
    lengths: np.ndarray

    def __post_init__(self) -> None:
        require_finite_rows(self.embeds, "text")


class CaptionTokenizer:
    """Tokenizer of an export that gives what its `MRAProcessor` gives, without transformers.

    Args:
        folder: folder written by `mra export`.
        style: style of `normalize_caption`.
        max_length: number of tokens that every text is padded and cut to.
        pad_token: token that texts are padded with.

    Raises:
        ValueError: if the folder has no tokenizer that can be read.
    """

    def __init__(self, folder: Path, style: str, max_length: int, pad_token: str) -> None:
        from tokenizers import Tokenizer

        self.style, self.max_length = style, max_length
        try:
            self._tokenizer = Tokenizer.from_file(str(folder / TOKENIZER))
        except Exception as error:  # tokenizers raises the type Exception itself
            raise ValueError(
                f"model {folder}: {TOKENIZER} cannot be read ({error}): export the model again"
            ) from error
        self._tokenizer.enable_truncation(max_length)
        self._tokenizer.enable_padding(
            length=max_length, pad_id=self._tokenizer.token_to_id(pad_token), pad_token=pad_token
        )

    def __call__(self, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """Return ids and mask `(texts, max_length)` int64; the first text that is cut is logged."""
        encoded = self._tokenizer.encode_batch(
            [normalize_caption(text, self.style, self.max_length) for text in texts]
        )
        if any(encoding.overflowing for encoding in encoded):
            _warn_of_cut_text(self.max_length)
        ids = np.array([encoding.ids for encoding in encoded], np.int64)
        return ids, np.array([encoding.attention_mask for encoding in encoded], np.int64)


@functools.cache
def _warn_of_cut_text(max_length: int) -> None:
    logger.warning(
        "a text of more than %d tokens was cut, and the words after them are not searched; this is logged once",
        max_length,
    )


class OnnxEncoder:
    """A model in onnxruntime; see `mra.retrieval.encoders.Encoder` for its members.

    It runs on the GPU if onnxruntime was built with CUDA, else on the CPU with OMP_NUM_THREADS threads, or one for each core.
    A graph is loaded on first use.

    Args:
        folder: folder written by `mra export`.
        device: "cuda" or "cpu"; None for the GPU if there is one.
        batch_size: images or texts per run.

    Raises:
        ValueError: if the folder is not an export of this version, or onnxruntime is not installed.
    """

    backend = "onnx"

    def __init__(self, folder: str | Path, device: Any = None, batch_size: int = 32) -> None:
        onnxruntime = import_onnxruntime()
        folder = Path(folder)
        missing = [name for name in (DESCRIPTION, TOKENIZER, *FILES.values()) if not (folder / name).is_file()]
        if missing:
            raise ValueError(
                f"model {folder} is not an ONNX export, it lacks {', '.join(missing)}: make one with "
                "`mra export --model MODEL`"
            )
        check_digests(folder)
        description = read_description(folder)
        self.folder = folder
        self.name = description["name"]
        self.fingerprint = description["fingerprint"]
        self.embedding_dim = description["embedding_dim"]
        self.token_shape = tuple(description["token_shape"])
        self.temperature = description["temperature"]
        self.batch_size = batch_size
        self.tokenizer = CaptionTokenizer(folder, **description["captions"])
        self._options = onnxruntime.SessionOptions()
        threads = os.environ.get("OMP_NUM_THREADS", "").partition(",")[0]
        self._options.intra_op_num_threads = int(threads) if threads.isdecimal() else 0
        self._providers = _providers(onnxruntime, device)
        self.device = "cpu" if len(self._providers) == 1 else "cuda"
        self._sessions: dict[str, Any] = {}
        self._lock = threading.Lock()

    @property
    def match_weight(self) -> float | None:
        """Weight chosen on validation; see `TorchEncoder.match_weight`."""
        return chosen_match_weight(str(self._choice_folder))

    @property
    def largest_log_odds(self) -> dict[int, float]:
        """Bounds seen on validation; see `TorchEncoder.largest_log_odds`."""
        return seen_log_odds(str(self._choice_folder))

    @property
    def _choice_folder(self) -> Path:
        """Folder of the validation's choice: that of the model, which may be newer, if it holds this export, else the copy."""
        model = self.folder.parent
        return model if self.folder.name == EXPORT and (model / FILE_NAME).is_file() else self.folder

    @functools.cached_property
    def processor(self) -> "MRAProcessor":
        """Processor of the export, loaded on first use; it prepares images with PyTorch."""
        from mra.common.loading import load_processor

        return load_processor(str(self.folder))

    def encode_images(self, images: Sequence, flip: bool = True) -> ImageArrays:
        """Encode PIL images, or rows with an "image", and with `flip` their mirror images; keep hidden states of all.

        Raises:
            ValueError: if there are no images, one cannot be read (the message gives its row), or the graph cannot be loaded.
        """
        from mra.retrieval.encode import read_row, undecoded

        if len(images) == 0:
            raise ValueError("images is empty: expected at least one image")
        images, embeds, tokens = undecoded(images), [], []
        for start in range(0, len(images), self.batch_size):
            pictures = [read_row(images, row) for row in range(start, min(start + self.batch_size, len(images)))]
            pixels = self.processor(images=pictures)["pixel_values"].numpy()
            views = [pixels, np.ascontiguousarray(pixels[..., ::-1])] if flip else [pixels]
            encoded = [self._run("image_encoder", pixel_values=view) for view in views]
            tokens.append(np.stack([hidden_states for hidden_states, _ in encoded], axis=1))
            embeds.append(np.stack([embedded for _, embedded in encoded]).mean(axis=0))
        return ImageArrays(np.concatenate(embeds), np.concatenate(tokens))

    def encode_texts(self, texts: Sequence[str]) -> TextArrays:
        """Encode texts, including hidden states.

        Raises:
            ValueError: if there are no texts, one cannot be tokenized, or the graph cannot be loaded.
        """
        if len(texts) == 0:
            raise ValueError("texts is empty: expected at least one caption")
        require_words(texts)
        embeds, tokens, lengths = [], [], []
        for start in range(0, len(texts), self.batch_size):
            ids, mask = self.tokenizer(texts[start : start + self.batch_size])
            states, embedded = self._run("text_encoder", input_ids=ids, attention_mask=mask)
            embeds.append(embedded)
            tokens.append(states[mask.astype(bool)])
            lengths.append(mask.sum(axis=1))
        return TextArrays(np.concatenate(embeds), np.concatenate(tokens), np.concatenate(lengths))

    def match(self, texts: Any, image_tokens: np.ndarray) -> np.ndarray:
        """Match every text with every image, `(images, views, 1 + patches, hidden)`: log-odds `(views, texts, images)`."""
        hidden_states, lengths = np.asarray(texts.hidden_states), np.asarray(texts.lengths)
        num_images, num_views = image_tokens.shape[:2]
        scores = np.empty((num_views, len(lengths), num_images), np.float32)
        for row, states in enumerate(np.split(hidden_states, lengths.cumsum()[:-1])):
            text = {"text_hidden_states": states[None], "attention_mask": np.ones((1, len(states)), np.int64)}
            for start in range(0, num_images, PAIRS_PER_RUN):
                images = image_tokens[start : start + PAIRS_PER_RUN]
                pairs = {
                    "text_index": np.zeros(len(images), np.int64),
                    "image_index": np.arange(len(images), dtype=np.int64),
                }
                for view in range(num_views):
                    tokens = np.ascontiguousarray(images[:, view], np.float32)
                    (logits,) = self._run("matcher", **text, **pairs, image_hidden_states=tokens)
                    scores[view, row, start : start + len(images)] = logits[:, 1] - logits[:, 0]
        return scores

    def _run(self, name: str, **inputs: np.ndarray) -> list[np.ndarray]:
        with self._lock:
            if name not in self._sessions:
                self._sessions[name] = self._load(name)
        return self._sessions[name].run(None, inputs)

    def _load(self, name: str) -> Any:
        try:
            return import_onnxruntime().InferenceSession(
                str(self.folder / FILES[name]), self._options, providers=self._providers
            )
        except Exception as error:  # onnxruntime has its own exception types
            raise ValueError(f"model {self.folder}: onnxruntime cannot load {FILES[name]} ({error})") from error


def find_export(model: str | Path) -> Path | None:
    """Return the folder of a model's export: the model's own if it is one, else its folder `onnx`; None without one."""
    folders = (Path(model), Path(model) / EXPORT)
    return next((folder for folder in folders if (folder / DESCRIPTION).is_file()), None)


def read_description(folder: Path) -> dict[str, Any]:
    """Read what `mra export` wrote about an export.

    Raises:
        ValueError: if it cannot be read, or a different version wrote it.
    """
    path = folder / DESCRIPTION
    again = "export the model again with `mra export --model MODEL --overwrite`"
    try:
        description = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} cannot be read ({error}): {again}") from error
    needed = ("name", "fingerprint", "embedding_dim", "token_shape", "temperature", "captions")
    missing = [name for name in needed if name not in description]
    if missing:
        raise ValueError(f"{path} lacks {', '.join(missing)}, as if an earlier version had written it: {again}")
    return description


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


def _providers(onnxruntime: ModuleType, device: Any) -> list[str]:
    has_cuda = "CUDAExecutionProvider" in onnxruntime.get_available_providers()
    kind = str(device or ("cuda" if has_cuda else "cpu")).partition(":")[0]
    if kind not in ("cpu", "cuda") or (kind == "cuda" and not has_cuda):
        raise ValueError(
            f"device {device}: this onnxruntime runs on {'cuda and cpu' if has_cuda else 'cpu only'}; for an NVIDIA GPU "
            "install onnxruntime-gpu instead of onnxruntime"
        )
    return ["CUDAExecutionProvider", "CPUExecutionProvider"] if kind == "cuda" else ["CPUExecutionProvider"]
