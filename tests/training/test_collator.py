"""Collation: names, shapes and contents of a batch."""

import inspect

import pytest
import torch

from modeling_mra import MRAForPreTraining
from mra.training.augmentation import CaptionAugmenter
from mra.training.collator import TrainingCollator
from mra.training.data import build_finetuning_dataset, build_pretraining_dataset, phrase_to_id
from tests.helpers.training import GRID, SIZE, make_pedes, make_processor, make_sda


PLAIN = {
    "pixel_values",
    "input_ids",
    "attention_mask",
    "mlm_input_ids",
    "labels",
    "identity_ids",
    "lengths",
}
AUGMENTED = {"augmented_input_ids", "augmented_attention_mask"}
REGION = {"phrase_input_ids", "phrase_attention_mask", "region_attention_mask", "phrase_ids"}


@pytest.fixture(scope="module")
def processor():
    return make_processor()


def make_examples(processor, regions=True, augment=False):
    augmenter = CaptionAugmenter(operations=("random_swap", "random_deletion")) if augment else None
    dataset = build_pretraining_dataset(
        make_sda(), processor, grid_size=GRID, seed=0, regions=regions, augmenter=augmenter
    )
    return [dataset[(0, row)] for row in range(8)]


@pytest.mark.parametrize("regions", [False, True])
@pytest.mark.parametrize("augment", [False, True])
def test_names_are_those_of_forward(processor, regions, augment):
    batch = TrainingCollator(processor.tokenizer, 56)(make_examples(processor, regions, augment))
    assert set(batch) == PLAIN | (AUGMENTED if augment else set()) | (REGION if regions else set())
    assert set(batch) <= set(inspect.signature(MRAForPreTraining.forward).parameters)


def test_contents(processor):
    examples = make_examples(processor, augment=True)
    batch = TrainingCollator(processor.tokenizer, 56)(examples)
    assert batch["pixel_values"].shape == (8, 3, *SIZE) and batch["pixel_values"].dtype == torch.float32
    assert batch["region_attention_mask"].shape == (8, 1 + GRID[0] * GRID[1])
    for name, value in batch.items():
        if torch.is_tensor(value) and name != "pixel_values":
            assert value.dtype == torch.int64, name
        if name in ("input_ids", "augmented_input_ids", "phrase_input_ids") or name in (
            "attention_mask",
            "phrase_attention_mask",
        ):
            assert value.shape == (8, 56), name
    for prefix, field in (("", "caption"), ("augmented_", "augmented_caption"), ("phrase_", "phrase")):
        expected = processor(text=[example[field] for example in examples])
        assert torch.equal(batch[f"{prefix}input_ids"], expected["input_ids"])
        assert torch.equal(batch[f"{prefix}attention_mask"], expected["attention_mask"])
    assert batch["identity_ids"].tolist() == list(range(1000, 1008))
    assert batch["phrase_ids"].tolist() == [phrase_to_id(example["phrase"]) for example in examples]
    assert (batch["phrase_ids"] >= 0).all()


def test_labels_restore_the_caption(processor):
    examples = make_examples(processor)
    batch = TrainingCollator(processor.tokenizer, 56)(examples)
    chosen = batch["labels"] != -100
    restored = torch.where(chosen, batch["labels"], batch["mlm_input_ids"])
    assert torch.equal(restored, batch["input_ids"])
    assert (chosen.sum(1) > 0).all() and not (chosen & (batch["attention_mask"] == 0)).any()


def test_lengths_hold_every_token(processor):
    examples = make_examples(processor, augment=True)
    batch = TrainingCollator(processor.tokenizer, 56)(examples)
    for prefix, kind in (("", "caption"), ("augmented_", "augmented"), ("phrase_", "phrase")):
        mask, lengths = batch[f"{prefix}attention_mask"], getattr(batch["lengths"], kind)
        assert len(lengths) == len(examples)
        for row, length in zip(mask.tolist(), lengths, strict=True):
            assert all(row[:length]) and not any(row[length:])
    assert batch["lengths"].masked == batch["lengths"].caption and batch["lengths"].max_masked == 10


def test_published_masking(processor):
    batch = TrainingCollator(processor.tokenizer, 56, mlm_mask_padding=True)(make_examples(processor))
    chosen = batch["labels"] != -100
    assert chosen.shape == (8, 56)
    assert batch["lengths"].masked is None  # labels lie in the padding too
    assert (chosen.sum(1) == 10).all() and (chosen & (batch["attention_mask"] == 0)).any()


def test_a_quarter_of_the_tokens_is_masked_and_ten_at_most(processor):
    """Unless the recipe says otherwise; [CLS] and [SEP] are not counted."""
    example = make_examples(processor)[0]
    captions = [" ".join(["man"] * count) for count in (1, 4, 12, 26, 40, 50)]
    batch = TrainingCollator(processor.tokenizer, 56)([example | {"caption": caption} for caption in captions])
    assert (batch["labels"] != -100).sum(1).tolist() == [1, 1, 3, 6, 10, 10]
    assert batch["lengths"].masked == [3, 6, 14, 28, 42, 52]


def test_masks_do_not_depend_on_the_batch(processor):
    collate, examples = TrainingCollator(processor.tokenizer, 56), make_examples(processor)
    whole = collate(examples)
    parts = [collate(examples[start : start + 2]) for start in (0, 2, 4, 6)]
    for name, value in whole.items():
        if name != "lengths":
            assert torch.equal(value, torch.cat([part[name] for part in parts])), name
    for kind in ("caption", "phrase", "masked"):
        cut = [getattr(part["lengths"], kind) for part in parts]
        assert getattr(whole["lengths"], kind) == [length for part in cut for length in part], kind
    assert whole["lengths"].augmented is None


def test_images_side_by_side_are_taken_as_they_lie(processor):
    dataset = build_pretraining_dataset(make_sda(), processor, grid_size=GRID, seed=0)
    collate = TrainingCollator(processor.tokenizer, 56)
    examples = dataset.__getitems__([(0, row) for row in range(6)])
    stacked = collate(examples)["pixel_values"]
    assert stacked is examples.pixel_values and stacked.shape == (6, 3, *SIZE)
    alone = torch.stack([dataset[(0, row)]["pixel_values"] for row in range(6)])
    assert torch.equal(stacked, alone)
    assert torch.equal(collate(examples[:2])["pixel_values"], alone[:2])  # a slice is a plain list
    for order in ([1, 0, 2, 3, 4, 5], [0, 1, 2], [0, 0, 2, 3, 4, 5]):
        moved = collate([examples[row] for row in order])["pixel_values"]
        assert torch.equal(moved, alone[order]) and moved.data_ptr() != stacked.data_ptr()


def test_long_captions_are_cut():
    processor = make_processor(max_text_length=8)
    dataset = build_finetuning_dataset(make_pedes(), processor, seed=0)
    batch = TrainingCollator(processor.tokenizer, 8)([dataset[(0, row)] for row in range(4)])
    assert batch["input_ids"].shape == (4, 8)
    assert (batch["input_ids"][:, -1] == processor.tokenizer.sep_token_id).all()


def test_errors(processor):
    collate = TrainingCollator(processor.tokenizer, 56)
    with pytest.raises(ValueError, match="batch is empty"):
        collate([])
    with pytest.raises(ValueError, match="same fields"):
        collate([make_examples(processor)[0], make_examples(processor, regions=False)[1]])
    with pytest.raises(ValueError, match="`max_text_length`"):
        TrainingCollator(processor.tokenizer, 2)
