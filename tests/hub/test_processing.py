"""Processor: captions as published, images as Pillow resizes them, one length, save and load."""

import json
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import BertTokenizer

import processing_mra
from processing_mra import MRAImageProcessor, MRAProcessor, normalize_caption
from tests.helpers.tiny import tiny_config, tiny_processor


CAPTIONS = json.loads((Path(__file__).resolve().parents[1] / "reference" / "pre_caption.json").read_text())
MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


@pytest.fixture(scope="module")
def processor():
    return tiny_processor()


def random_image(width, height, mode="RGB"):
    pixels = np.random.default_rng(0).integers(0, 256, (height // 4 + 1, width // 4 + 1, 3), dtype=np.uint8)
    return Image.fromarray(pixels).resize((width, height), Image.Resampling.BILINEAR).convert(mode)


def test_fidelity_captions():
    for row in CAPTIONS:
        style = "clean" if row["icfg_rstp"] else "plain"
        if row["in"]:
            assert normalize_caption(row["in"], style, row["max_words"]) == row["out"], row


def test_captions_are_cut_after_56_words_unless_another_number_is_given():
    words = [f"w{number}" for number in range(60)]
    for text, expected in ((" ".join(words), words[:56]), ("  ".join(words[:57]), words[:56])):
        assert normalize_caption(text) == " ".join(expected)
    assert normalize_caption("  ".join(words[:56])) == "  ".join(
        words[:56]
    )  # a caption that is not cut stays as it is
    assert normalize_caption(" ".join(words), max_words=None) == " ".join(words)


@pytest.mark.parametrize(("caption", "style", "named"), [("", "plain", "caption"), ("a man", "tidy", "style")])
def test_caption_errors(caption, style, named):
    with pytest.raises(ValueError, match=f"`{named}`"):
        normalize_caption(caption, style)


@pytest.mark.parametrize("size", [(64, 32), (384, 256)])
@pytest.mark.parametrize("source", [(37, 91), (128, 384), (700, 512)])
def test_images_equal_pillow_bicubic(size, source):
    """Within one grey level; Pillow's fixed-point weights make it two on fewer than one value in a thousand."""
    image = random_image(*source)
    pixels = MRAImageProcessor(size={"height": size[0], "width": size[1]})(image, return_tensors="pt")["pixel_values"]
    resized = np.asarray(image.resize(size[::-1], Image.Resampling.BICUBIC), dtype=np.float32)
    levels = (pixels[0].permute(1, 2, 0).numpy() * STD + MEAN) * 255
    difference = np.abs(levels - resized)
    assert difference.max() < 2.001 and (difference > 1.001).mean() < 1e-3


def test_images_have_the_published_size_unless_another_is_given(processor):
    image = random_image(40, 90)
    assert MRAImageProcessor()(image, return_tensors="pt")["pixel_values"].shape == (1, 3, 384, 256)
    built = MRAProcessor(processor.image_processor, processor.tokenizer)
    assert built.max_text_length == 56 and built.caption_style == "plain"


def test_deep_images_keep_their_range_and_tensors_are_taken(processor):
    """Images of 16 bits are read as in training, where Pillow alone would clip them to white."""
    grey = np.linspace(0, 255, 64, dtype=np.uint8)[:, None].repeat(32, 1)
    expected = processor(images=Image.fromarray(grey))["pixel_values"]
    deep = processor(images=Image.fromarray(grey.astype(np.uint16) * 257))["pixel_values"]
    torch.testing.assert_close(deep, expected)
    rgb = torch.from_numpy(grey).expand(3, -1, -1)
    torch.testing.assert_close(processor(images=rgb)["pixel_values"], expected)


def test_grey_and_transparent_images_become_rgb(processor):
    images = [random_image(40, 90, mode) for mode in ("L", "RGBA", "P", "CMYK")]
    assert processor(images=images)["pixel_values"].shape == (4, 3, 64, 32)


def test_texts_have_one_length(processor):
    long = " ".join(["coat"] * 90)
    features = processor(text=["a man", long, "a woman in a red coat"])
    assert features["input_ids"].shape == features["attention_mask"].shape == (3, 56)
    assert features["attention_mask"][1].all()
    assert features["input_ids"][1, -1] == processor.tokenizer.sep_token_id
    padding = features["attention_mask"] == 0
    assert (features["input_ids"][padding] == processor.tokenizer.pad_token_id).all()
    assert set(features) == {"input_ids", "attention_mask"}


def test_a_text_that_is_cut_is_told(processor, caplog):
    """In training captions are cut without a word; a query that is cut may look for something else."""
    with mock.patch.object(processing_mra.logger, "warning_once") as warned:
        processor(text=["a man", " ".join(["coat"] * 50)])
        assert not warned.called
        processor(text=["a man", " ".join(["coat,"] * 50)])
        assert "a text of more than 56 tokens" in warned.call_args.args[0]


def test_a_tokenizer_without_words_is_refused(processor):
    """transformers builds one where the files are missing."""
    empty = BertTokenizer(
        vocab={token: index for index, token in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"])}
    )
    with pytest.raises(ValueError, match="`tokenizer` holds 5 special tokens and no words"):
        MRAProcessor(processor.image_processor, empty)


def test_a_single_word_is_enough_and_styles_clean(processor):
    assert processor.clean_caption("A man's  coat, RED!") == "A man's  coat, RED!"
    clean = tiny_processor(caption_style="clean")
    assert clean.clean_caption(" ".join(["A-b!"] * 60)) == " ".join(["a b"] * 60) + " "
    assert clean.normalize_caption(" ".join(["A-b!"] * 60)) == " ".join(["a b"] * 28)


def test_images_and_texts_together(processor):
    features = processor(images=random_image(40, 90), text="a man in a black coat")
    assert features["pixel_values"].shape == (1, 3, 64, 32)
    assert features["input_ids"].shape == (1, 56)
    assert set(features) == set(processor.model_input_names)


def test_errors(processor):
    with pytest.raises(ValueError, match="`images`, `text`"):
        processor()
    with pytest.raises(ValueError, match="empty"):
        processor(text=["a man", ""])
    with pytest.raises(ValueError, match="`caption_style`"):
        MRAProcessor(processor.image_processor, processor.tokenizer, caption_style="tidy")


@pytest.mark.parametrize("style", ["plain", "clean"])
def test_save_and_load(style, tmp_path):
    saved = tiny_processor(tiny_config(max_text_length=24), caption_style=style)
    saved.save_pretrained(tmp_path)
    loaded = MRAProcessor.from_pretrained(tmp_path)
    assert (loaded.caption_style, loaded.max_text_length) == (style, 24)
    assert loaded.image_processor.size == {"height": 64, "width": 32}
    stored = json.loads((tmp_path / "processor_config.json").read_text())  # where the Auto classes find the code
    assert stored["auto_map"]["AutoProcessor"] == "processing_mra.MRAProcessor"
    assert stored["image_processor"]["auto_map"]["AutoImageProcessor"] == "processing_mra.MRAImageProcessor"
    image, text = random_image(50, 90), "A man, in a BLACK coat!"
    before, after = saved(images=image, text=text), loaded(images=image, text=text)
    assert all(torch.equal(before[name], after[name]) for name in before)
