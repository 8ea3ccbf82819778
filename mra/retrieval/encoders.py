"""Models behind a gallery: embeddings and tokens of images, encodings of texts, matching scores of pairs."""

import hashlib
import json
from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
import torch
from transformers import PreTrainedModel

from mra.common.loading import load_model, load_processor
from mra.retrieval.encode import ImageEncodings, TextEncodings, encode_images, encode_texts
from mra.retrieval.matching import PairMatcher
from mra.retrieval.precision import resolve_dtype
from mra.retrieval.reranking import rerank
from mra.retrieval.retrieval_choice import chosen_match_weight, seen_log_odds
from mra.retrieval.towers import Towers, inner_model
from processing_mra import MRAProcessor


class Encodings(Protocol):
    """Encoded images or texts: arrays, or tensors on the CPU, which `numpy.asarray` reads without a copy.

    Attributes:
        embeds: features, `(images or texts, embedding_dim)` float32.
        hidden_states: of images `(images, views, 1 + patches, hidden)`; of texts `(tokens of all texts, hidden)`, and
            `lengths` holds the number of tokens of each.
    """

    embeds: Any
    hidden_states: Any


class Encoder(Protocol):
    """A model behind a gallery. `TorchEncoder` and `OnnxEncoder` implement it; other runtimes provide the same members.

    A gallery works on NumPy arrays, and imports PyTorch only with an encoder that does.

    Attributes:
        name: folder or Hub id of the model, shown in messages and stored in galleries.
        fingerprint: hash of weights and image preprocessing (`model_fingerprint`); a gallery accepts no other.
        embedding_dim: width of the embeddings.
        token_shape: shape of one image's tokens, `(views, 1 + patches, hidden)`.
        temperature: learned temperature of the contrastive loss, for fused rankings.
        backend: name of the runtime, shown with results.
    """

    backend: str
    name: str
    fingerprint: str
    embedding_dim: int
    token_shape: tuple[int, int, int]
    temperature: float

    @property
    def match_weight(self) -> float | None:
        """Weight of the matching log-odds in fused rankings, chosen on validation; None if none was."""
        ...

    @property
    def largest_log_odds(self) -> dict[int, float]:
        """Largest log-odds of a match seen on validation, by the number of views averaged; empty if unknown."""
        ...

    def encode_images(self, images: Sequence, flip: bool = True) -> Encodings:
        """Encode PIL images, or rows with an "image", and with `flip` their mirror images; keep hidden states of all."""
        ...

    def encode_texts(self, texts: Sequence[str]) -> Encodings:
        """Encode texts, including hidden states."""
        ...

    def match(self, texts: Any, image_tokens: np.ndarray) -> Any:
        """Match every text with every image.

        Args:
            texts: result of `encode_texts`.
            image_tokens: hidden states, `(images, views, 1 + patches, hidden)` float32.

        Returns:
            Log-odds of "match", `(views, texts, images)` float32.
        """
        ...


class TorchEncoder:
    """An MRA model in PyTorch; see `Encoder` for its members.

    Args:
        model: folder or Hub id.
        device: device to run on; None for the GPU if there is one.
        dtype: dtype of the forward passes, "auto" for the faster one on this device (see [`resolve_dtype`]); None for that of
            the weights.
        batch_size: images or texts per forward pass.

    Raises:
        ValueError: if the model or its processor cannot be loaded, or it has no learned temperature.
    """

    backend = "torch"

    def __init__(
        self,
        model: str,
        device: str | torch.device | None = None,
        dtype: torch.dtype | str | None = None,
        batch_size: int = 32,
    ) -> None:
        self.name = str(model)
        self.device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        self.batch_size = batch_size
        self.model = load_model(self.name).to(self.device)  # pyright: ignore[reportArgumentType]  # a decorator hides `self`
        self.dtype = resolve_dtype(self.model, dtype)
        self.processor = load_processor(self.name)
        self.fingerprint = model_fingerprint(self.model, self.processor)
        config = self.model.config
        self.embedding_dim = config.projection_dim
        vision = config.vision_config
        self.token_shape: tuple[int, int, int] = (2, 1 + vision.num_patches, vision.hidden_size)
        self.temperature = self.model.temperature.item()
        self._towers, self._matcher = Towers(self.model, self.dtype), PairMatcher(self.model, self.dtype)

    @property
    def match_weight(self) -> float | None:
        """Weight chosen on validation; read when used, since the first time hashes the weights."""
        return chosen_match_weight(self.name)

    @property
    def largest_log_odds(self) -> dict[int, float]:
        """Bounds seen on validation; see [`Encoder`]."""
        return seen_log_odds(self.name)

    def encode_images(self, images: Sequence, flip: bool = True) -> ImageEncodings:
        """Encode images; see [`Encoder`]."""
        return encode_images(
            self._towers,
            self.processor,
            images,
            flip=flip,
            keep_hidden_states=True,
            batch_size=self.batch_size,
            hidden_states_dtype=torch.float32,
        )

    def encode_texts(self, texts: Sequence[str]) -> TextEncodings:
        """Encode texts; see [`Encoder`]."""
        return encode_texts(
            self._towers,
            self.processor,
            texts,
            keep_hidden_states=True,
            batch_size=self.batch_size,
            hidden_states_dtype=torch.float32,
        )

    def match(self, texts: TextEncodings, image_tokens: np.ndarray | torch.Tensor) -> torch.Tensor:
        """Match every text with every image; see [`Encoder`]."""
        image_tokens = torch.as_tensor(image_tokens)
        num_texts, num_images = len(texts.lengths), len(image_tokens)
        by_length = texts.lengths.argsort(stable=True)
        pair_texts = by_length.repeat_interleave(num_images)
        pair_images = torch.arange(num_images).repeat(num_texts)
        scores = self._matcher.match(texts, image_tokens, pair_texts, pair_images, log_odds=True)
        in_order = torch.empty(len(scores), num_texts, num_images)
        in_order[:, by_length] = scores.view(-1, num_texts, num_images)
        return in_order

    def match_nearest(self, texts: TextEncodings, images: ImageEncodings, nearest: torch.Tensor) -> torch.Tensor:
        """Match every text with its own images, `(texts, k)`: log-odds `(views, texts, k)`, batched as by `rerank`."""
        return rerank(self.model, texts, images, nearest, dtype=self.dtype, log_odds=True)


def match_nearest(encoder: Encoder, texts: Any, images: Any, nearest: torch.Tensor) -> torch.Tensor:
    """Match every text with its own images, text by text if the encoder has no faster way.

    Args:
        encoder: the encoder of both texts and images.
        texts: result of `encode_texts`.
        images: result of `encode_images`.
        nearest: images of each text, `(texts, k)`.

    Returns:
        Log-odds of "match", `(views, texts, k)` float32.
    """
    if isinstance(encoder, TorchEncoder):
        return encoder.match_nearest(texts, images, nearest)
    embeds, states, lengths = map(torch.as_tensor, (texts.embeds, texts.hidden_states, texts.lengths))
    each = zip(embeds.split(1), states.split(lengths.tolist()), lengths.split(1), strict=True)
    tokens, scores = np.asarray(images.hidden_states), []
    for text, rows in zip(each, nearest.numpy(), strict=True):
        matched = encoder.match(TextEncodings(*text), tokens[rows].astype(np.float32, copy=False))
        scores.append(torch.as_tensor(matched)[:, 0])
    return torch.stack(scores, dim=1)


def model_fingerprint(model: PreTrainedModel, processor: MRAProcessor) -> str:
    """Hash all that a gallery's numbers depend on: architecture, weights, image preprocessing and vocabulary.

    Folders with the same weights have the same fingerprint; another revision of a model has a different one.

    Returns:
        32 hexadecimal digits.
    """
    digest = hashlib.blake2b(digest_size=16)
    mra = inner_model(model)
    image_processor = processor.image_processor
    settings = {
        "vision": mra.config.vision_config.to_dict(),
        "text": mra.config.text_config.to_dict(),
        "projection": [mra.config.projection_type, mra.config.projection_dim],
        "images": {
            name: str(getattr(image_processor, name)) for name in ("size", "resample", "image_mean", "image_std")
        },
        "captions": [processor.caption_style, processor.max_text_length],
        "vocabulary": processor.tokenizer.get_vocab(),
    }
    volatile = ("transformers_version", "_name_or_path", "dtype", "torch_dtype")
    for part in ("vision", "text"):
        settings[part] = {name: value for name, value in settings[part].items() if name not in volatile}
    digest.update(json.dumps(settings, sort_keys=True, default=str).encode())
    for name, weight in sorted(mra.state_dict().items()):
        digest.update(f"{name}{tuple(weight.shape)}".encode())
        digest.update(weight.detach().cpu().float().contiguous().numpy().tobytes())
    return digest.hexdigest()
