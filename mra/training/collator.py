"""Collation: examples of a training set become the keyword arguments of `MRAForPreTraining.forward`."""

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from mra.training.masking import TokenMasker


class TrainingCollator:
    """
    Stacks images, tokenises texts and masks captions; runs in the workers of the data loader.

    The masks of an example depend on its `mask_seed` alone, so neither batch size nor the number of workers or
    processes changes them.

    Args:
        tokenizer: a BERT tokenizer.
        max_text_length: tokens to which every text is padded and cut.
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
    ):
        if max_text_length < 3:
            raise ValueError(f"`max_text_length` must leave room for [CLS], a word and [SEP], got {max_text_length}.")
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

    def __call__(self, examples: list[dict]) -> dict[str, torch.Tensor]:
        """
        Collates a batch.

        Args:
            examples: items of a [`~mra.training.data.TrainingDataset`], all with the same fields.

        Returns:
            `pixel_values` `(batch, 3, height, width)` float32; `input_ids`, `attention_mask`, `mlm_input_ids`, `labels`
            `(batch, max_text_length)` int64; `identity_ids` `(batch,)` int64; `caption_lengths`, a list of
            the captions' tokens; `mlm_lengths`, the same, unless padding may be masked; `max_masked`, the most labels of
            a row. With augmented captions also `augmented_input_ids`, `augmented_attention_mask` and
            `augmented_lengths`; with regions also `phrase_input_ids`, `phrase_attention_mask`, `phrase_lengths`,
            `region_attention_mask` `(batch, 1 + patches)` and `phrase_ids` `(batch,)`.

        Raises:
            ValueError: if the batch is empty or its examples differ in fields.
        """
        if not examples:
            raise ValueError("The batch is empty: the collator needs at least one example.")
        fields = set(examples[0])
        for example in examples:
            if set(example) != fields:
                raise ValueError(
                    f"Examples of a batch must have the same fields, got {sorted(fields)} and {sorted(example)}: "
                    "do not mix training sets with and without regions or augmented captions."
                )
        kinds = {"caption": ""}
        if "augmented_caption" in fields:
            kinds["augmented_caption"] = "augmented_"
        if "phrase" in fields:
            kinds["phrase"] = "phrase_"

        batch = {"pixel_values": _stack([example["pixel_values"] for example in examples])}
        for field, prefix in kinds.items():
            batch.update(self._encode([example[field] for example in examples], prefix))
        seeds = np.array([example["mask_seed"] for example in examples], dtype=np.uint64)
        masked, labels = self.masker(batch["input_ids"].numpy(), seeds)
        batch["mlm_input_ids"], batch["labels"] = torch.from_numpy(masked), torch.from_numpy(labels)
        batch["identity_ids"] = torch.tensor([example["identity_id"] for example in examples])
        for prefix in kinds.values():
            batch[f"{prefix or 'caption_'}lengths"] = batch[f"{prefix}attention_mask"].sum(dim=1).tolist()
        batch["max_masked"] = self.masker.max_masked
        if not self.masker.mask_padding:
            batch["mlm_lengths"] = batch["caption_lengths"]
        if "phrase" in fields:
            batch["region_attention_mask"] = torch.stack([example["region_attention_mask"] for example in examples])
            batch["phrase_ids"] = torch.tensor([example["phrase_id"] for example in examples])
        return batch

    def _encode(self, texts: list[str], prefix: str) -> dict[str, torch.Tensor]:
        encoded = self.tokenizer(
            texts,
            padding="max_length",
            truncation=True,
            max_length=self.max_text_length,
            return_token_type_ids=False,
            return_tensors="pt",
        )
        return {f"{prefix}{name}": encoded[name] for name in ("input_ids", "attention_mask")}


def _stack(images: list[torch.Tensor]) -> torch.Tensor:
    """Stacks images; those that were written side by side (`TrainingDataset.__getitems__`) are taken as they lie."""
    base = images[0]._base
    if (
        base is None
        or base.shape != (len(images), *images[0].shape)
        or any(image._base is not base for image in images)
    ):
        return torch.stack(images)
    in_order = all(image.data_ptr() == row.data_ptr() for image, row in zip(images, base, strict=True))
    return base if in_order else torch.stack(images)
