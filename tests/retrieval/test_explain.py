"""mra/retrieval/explain.py: attention weights against the layers' own output, words of a caption, phrases."""

import pytest
import torch
from PIL import Image

from modeling_mra import MRAForImageTextRetrieval
from mra.cli import main
from mra.retrieval.encode import encode_images, encode_texts
from mra.retrieval.explain import (
    cross_attention,
    draw_explanation,
    explain_pair,
    phrase_scores,
    scale_heatmap,
    word_positions,
)
from tests.helpers.tiny import tiny_batch, tiny_model, tiny_processor, tiny_tokenizer


TEXT = "A woman wearing a bright-red t-shirt, carrying a zxqwvy."


@pytest.fixture(scope="module")
def model():
    return tiny_model(cls=MRAForImageTextRetrieval, scale=0.3)


@pytest.fixture(scope="module")
def processor():
    return tiny_processor()


@pytest.fixture
def image():
    return Image.effect_noise((40, 90), 60).convert("RGB")


def encoded(model):
    batch = tiny_batch(model.config, size=3)
    with torch.no_grad():
        texts = model.get_text_hidden_states(batch["input_ids"], batch["attention_mask"])
        return texts, batch["attention_mask"], model.get_image_hidden_states(batch["pixel_values"])


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_weights_times_values_are_what_the_layers_compute(implementation):
    model = tiny_model(cls=MRAForImageTextRetrieval, scale=0.3)
    model.set_attn_implementation(implementation)
    texts, mask, images = encoded(model)
    contexts = []
    blocks = [layer.crossattention for layer in model.mra.fusion_layers]
    hooks = [
        block.output.dense.register_forward_hook(lambda _, given, __: contexts.append(given[0])) for block in blocks
    ]
    attention = cross_attention(model.mra, texts, mask, images)
    for hook in hooks:
        hook.remove()
    assert attention.weights.shape == (2, 3, 2, texts.shape[1], images.shape[1])
    torch.testing.assert_close(attention.weights.sum(dim=-1), torch.ones(attention.weights.shape[:-1]))
    for weights, context, (_, values) in zip(
        attention.weights, contexts, model.get_image_keys_values(images), strict=True
    ):
        torch.testing.assert_close((weights @ values).transpose(1, 2).flatten(2).flatten(0, 1), context)
    with torch.no_grad():
        torch.testing.assert_close(attention.logits, model.match_logits(texts, mask, images))


def test_norms_are_lengths_of_what_a_patch_adds(model):
    texts, mask, images = encoded(model)
    norms = cross_attention(model.mra, texts, mask, images).norms
    block = model.mra.fusion_layers[1].crossattention
    size = block.self.attention_head_size
    for head in range(2):
        rows = slice(head * size, (head + 1) * size)
        value = block.self.value(images[2, 2])[rows]
        torch.testing.assert_close(norms[1, 2, head, 2], (block.output.dense.weight[:, rows] @ value).norm())


def test_attention_that_is_known_by_hand(processor, image):
    """Keys that are zero but for one patch, and queries that are constant: every word looks at that patch alone."""
    model = tiny_model(cls=MRAForImageTextRetrieval)
    vision = model.config.vision_config
    tokens = torch.zeros(1 + vision.num_patches, vision.hidden_size)
    tokens[2] = 1.0  # token 0 is the mean, 1 and 2 are the two rows of the grid
    for layer in model.mra.fusion_layers:
        inner = layer.crossattention.self
        with torch.no_grad():
            for linear in (inner.query, inner.key, inner.value):
                linear.weight.zero_()
                linear.bias.fill_(1.0)
            inner.key.weight.fill_(1.0)
    assert vision.grid_size == (2, 1)
    found = explain_pair(model, processor, TEXT, image_hidden_states=tokens)
    for word in found.words:
        assert word.heatmap.argmax() == 1 and word.heatmap[1, 0] > 0.99 and word.global_share < 0.01
    torch.testing.assert_close(found.sentence[1, 0], torch.tensor(1.0), atol=0.01, rtol=0)


def test_explanation_of_a_pair(model, processor, image):
    found = explain_pair(model, processor, TEXT, image)
    assert [word.word for word in found.words] == [
        "A",
        "woman",
        "wearing",
        "a",
        "bright-red",
        "t-shirt",
        "carrying",
        "a",
        "zxqwvy",
    ]
    assert [word.word for word in found.words if not word.is_stop_word] == ["woman", "bright-red", "t-shirt", "zxqwvy"]
    for word in found.words:
        assert word.heatmap.shape == (2, 1) and word.heatmap.min() >= 0
        assert word.heatmap.sum().item() + word.global_share == pytest.approx(1, abs=1e-5)
    shown = [word.heatmap for word in found.words if not word.is_stop_word]
    torch.testing.assert_close(found.sentence, torch.stack(shown).mean(dim=0))
    inputs = processor(images=[image], text=TEXT)
    with torch.no_grad():
        logits = model(**inputs, return_match_logits=True).match_logits[0, 0]
    assert found.match_probability == pytest.approx(logits.softmax(dim=-1)[1].item(), abs=1e-5)

    tokens = encode_images(model, processor, [image], flip=False, keep_hidden_states=True).hidden_states[0, 0]
    again = explain_pair(model.mra, processor, TEXT, image_hidden_states=tokens)
    torch.testing.assert_close(again.sentence, found.sentence)
    assert not torch.equal(explain_pair(model, processor, TEXT, image, num_layers=2).sentence, found.sentence)


def test_a_word_is_the_mean_of_its_pieces(model, processor, image):
    tokens = encode_images(model, processor, [image], flip=False, keep_hidden_states=True).hidden_states[:, 0]
    texts = encode_texts(model, processor, [TEXT], keep_hidden_states=True)
    attention = cross_attention(model.mra, *texts.padded(torch.tensor([0])), tokens)
    positions = dict(word_positions(processor.tokenizer, TEXT, 56))["t-shirt"]
    assert len(positions) >= 3
    read = (attention.weights[1, 0] * attention.norms[1, 0, :, None]).mean(dim=0)  # text tokens, image tokens
    expected = torch.stack([read[position] / read[position].sum() for position in positions]).mean(dim=0)
    word = next(word for word in explain_pair(model, processor, TEXT, image).words if word.word == "t-shirt")
    torch.testing.assert_close(word.heatmap.flatten(), expected[1:])
    assert word.global_share == pytest.approx(expected[0].item(), abs=1e-6)


def test_words_that_are_cut_off_are_left_out():
    tokenizer = tiny_tokenizer()
    words = word_positions(tokenizer, "red coat, blue [SEP] shoes", 64)
    tokens = tokenizer("red coat, blue [SEP] shoes")["input_ids"]
    assert {word: tokenizer.convert_ids_to_tokens([tokens[p] for p in where]) for word, where in words} == {
        "red": ["red"], "coat": ["coat"], "blue": ["blue"], "shoes": ["shoes"]
    }  # fmt: skip
    assert [word for word, _ in word_positions(tokenizer, "red coat, blue shoes", 4)] == ["red", "coat"]


def test_phrases_are_scored_as_the_matching_head_does(model, processor, image):
    phrases = ["black backpack", "a woman in a long red coat", "shoes"]
    scores = phrase_scores(model, processor, phrases, image)
    assert [score.phrase for score in scores] == phrases
    probabilities = torch.zeros(3)
    for view in (image, image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)):
        inputs = processor(images=[view], text=phrases)
        with torch.no_grad():
            logits = model(**inputs, return_match_logits=True).match_logits[:, 0]
        probabilities += logits.softmax(dim=-1)[:, 1] / 2
    assert [score.match_probability for score in scores] == pytest.approx(probabilities.tolist(), abs=1e-3)
    tokens = encode_images(model, processor, [image], keep_hidden_states=True).hidden_states[0]
    again = phrase_scores(model, processor, phrases, image_hidden_states=tokens)
    assert [score.match_probability for score in again] == pytest.approx(
        [score.match_probability for score in scores], abs=1e-6
    )


def test_arguments_are_checked(model, processor, image):
    tokens = torch.zeros(3, 64)
    with pytest.raises(ValueError, match="exactly one of `image` and `image_hidden_states`"):
        explain_pair(model, processor, TEXT)
    with pytest.raises(ValueError, match="exactly one of `image` and `image_hidden_states`"):
        phrase_scores(model, processor, ["red"], image, image_hidden_states=tokens)
    with pytest.raises(ValueError, match=r"must be \(3, 64\) or \(views, 3, 64\), got \(4, 64\)"):
        explain_pair(model, processor, TEXT, image_hidden_states=torch.zeros(4, 64))
    with pytest.raises(ValueError, match="num_layers must be from 1 to 2, the model's fusion layers, got 3"):
        explain_pair(model, processor, TEXT, image, num_layers=3)
    with pytest.raises(ValueError, match="must have a letter or digit"):
        explain_pair(model, processor, "?!", image)
    with pytest.raises(ValueError, match="caption 1 must be a text with at least one word"):
        phrase_scores(model, processor, ["red", " "], image)


def test_heatmaps_are_stretched_over_the_even_share():
    sharp = torch.tensor([[0.7, 0.1], [0.1, 0.1]])
    torch.testing.assert_close(
        scale_heatmap(sharp), torch.tensor([[0.6, 0.0], [0.0, 0.0]])
    )  # (0.7 - 0.25) / (1 - 0.25)
    assert scale_heatmap(torch.full((2, 2), 0.25)).abs().max() < 1e-6
    many = torch.full((4, 4), 0.02)
    many[1, 1] = 0.7
    assert scale_heatmap(many)[1, 1] == pytest.approx(1)


def test_the_picture_has_a_tile_for_every_word(model, processor, image):
    found = explain_pair(model, processor, "a red coat", image)
    narrow, wide = draw_explanation(image, found, columns=2), draw_explanation(image, found, columns=5)
    assert narrow.height > 2 * wide.height - 100 and wide.width > narrow.width


def test_the_command_writes_a_picture(tmp_path, model, processor, image, capsys):
    model.save_pretrained(tmp_path / "model")
    processor.save_pretrained(tmp_path / "model")
    image.save(tmp_path / "crop.png")
    arguments = ["--model", str(tmp_path / "model"), "--text", "a red coat", "--output", str(tmp_path / "out.png")]
    main(["explain", *arguments, "--image", str(tmp_path / "crop.png"), "--phrases", "black backpack", "coat"])
    printed = capsys.readouterr().out
    expected = phrase_scores(model, processor, ["black backpack", "coat"], image)
    for score in expected:
        assert f"{score.match_probability:6.1%}  {score.phrase}\n" in printed
    assert Image.open(tmp_path / "out.png").width > 200
    with pytest.raises(SystemExit, match=r"mra explain: .*nowhere.png"):
        main(["explain", *arguments, "--image", str(tmp_path / "nowhere.png")])


def test_the_model_is_left_as_it_was(model, processor, image):
    explain_pair(model, processor, TEXT, image)
    assert not any(module._forward_hooks for module in model.modules())
