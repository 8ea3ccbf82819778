"""Collation of training examples into the keyword arguments of `MRAForPreTraining.forward`."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from batching_mra import TEXT_ARGUMENTS, TextLengths
from mra.common.workers import share_batch
from mra.training.data import ExampleBatch
from mra.training.masking import TokenMasker


FIELDS = {
    "caption": "caption",
    "augmented": "augmented_caption",
    "phrase": "phrase",
}  # kind of text -> field of an example


class TrainingCollator:
    """Collator that stacks images, tokenises texts and masks captions; it runs in the data-loading workers.

    The masks of an example depend only on its `mask_seed`, not on the batch size or the number of workers or processes.

    Args:
        tokenizer: a BERT tokenizer.
        max_text_length: number of tokens to which every text is padded or truncated.
        mlm_probability, mlm_max_masked, mlm_mask_padding, whole_word_masking, skipgram_probability,
            skipgram_max_length: see [`TokenMasker`].

    Raises:
        ValueError: if an argument is out of range.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        max_text_length: int,
        mlm_probability: float = 0.25,
        mlm_max_masked: int = 10,
        mlm_mask_padding: bool = False,
        whole_word_masking: bool = True,
        skipgram_probability: float = 0.2,
        skipgram_max_length: int = 3,
    ) -> None:
        if max_text_length < 3:
            raise ValueError(f"`max_text_length` must leave room for [CLS], a word and [SEP], got {max_text_length}")
        self.tokenizer = tokenizer
        self.max_text_length = max_text_length
        self.masker = TokenMasker(
            tokenizer,
            mlm_probability,
            mlm_max_masked,
            mlm_mask_padding,
            whole_word_masking,
            skipgram_probability,
            skipgram_max_length,
        )

    def __call__(self, examples: Sequence[dict]) -> dict[str, torch.Tensor | TextLengths]:
        """Collate a batch.

        Args:
            examples: items of a [`~mra.training.data.TrainingDataset`], all with the same fields. The images
                of an [`~mra.training.data.ExampleBatch`] are already stacked.

        Returns:
            `pixel_values` `(batch, 3, height, width)` float32; `input_ids`, `attention_mask`, `mlm_input_ids`, `labels`
            `(batch, max_text_length)` int64; `identity_ids` `(batch,)` int64; `lengths`, a `TextLengths` (without
            masked captions if padding may be masked). With augmented captions also `augmented_input_ids` and
            `augmented_attention_mask`; with regions also `phrase_input_ids`, `phrase_attention_mask`,
            `region_attention_mask` `(batch, 1 + patches)` and `phrase_ids` `(batch,)`.

        Raises:
            ValueError: if the batch is empty or its examples differ in fields.
        """
        if not examples:
            raise ValueError("the batch is empty: the collator needs at least one example")
        fields = set(examples[0])
        for example in examples:
            if set(example) != fields:
                raise ValueError(
                    f"examples of a batch must have the same fields, got {sorted(fields)} and {sorted(example)}: "
                    "do not mix training sets with and without regions or augmented captions"
                )
        batch: dict[str, Any] = {"pixel_values": _stack(examples)}
        lengths: dict[str, Any] = {"max_masked": self.masker.max_masked}
        for kind, field in FIELDS.items():
            if field in fields:
                encoded, lengths[kind] = self._encode([example[field] for example in examples], kind)
                batch.update(encoded)
        if not self.masker.mask_padding:
            lengths["masked"] = lengths["caption"]
        batch["lengths"] = TextLengths(**lengths)
        seeds = np.array([example["mask_seed"] for example in examples], dtype=np.uint64)
        masked, labels = self.masker(batch["input_ids"].numpy(), seeds)
        batch["mlm_input_ids"], batch["labels"] = torch.from_numpy(masked), torch.from_numpy(labels)
        batch["identity_ids"] = torch.tensor([example["identity_id"] for example in examples])
        if "phrase" in fields:
            batch["region_attention_mask"] = torch.stack([example["region_attention_mask"] for example in examples])
            batch["phrase_ids"] = torch.tensor([example["phrase_id"] for example in examples])
        return share_batch(batch)

    def _encode(self, texts: list[str], kind: str) -> tuple[dict[str, torch.Tensor], list[int]]:
        """Tokenise one kind of text; return its arguments of `forward` and the number of tokens of each row."""
        encoded = self.tokenizer(
            texts,
            padding="max_length",
            truncation=True,
            max_length=self.max_text_length,
            return_token_type_ids=False,
            return_tensors="pt",
        )
        names, mask = TEXT_ARGUMENTS[kind], encoded["attention_mask"]
        return {names.input_ids: encoded["input_ids"], names.attention_mask: mask}, mask.sum(dim=1).tolist()


def _stack(examples: Sequence[dict]) -> torch.Tensor:
    """Return the images of a batch as one tensor; an `ExampleBatch` already has it."""
    if isinstance(examples, ExampleBatch):
        return examples.pixel_values
    return torch.stack([example["pixel_values"] for example in examples])
