"""mra/retrieval/packed.py and towers.py against the towers themselves."""

import pytest
import torch
from peft import LoraConfig, get_peft_model

from layers_mra import MRAVisionModel
from mra.retrieval.encode import encode_images, encode_texts
from mra.retrieval.matching import PairMatcher
from mra.retrieval.packed import PackedText, PackedVision, can_pack
from mra.retrieval.towers import Towers, forward_context
from tests.helpers.retrieval import tiny_dataset, tiny_processor
from tests.helpers.tiny import tiny_config, tiny_model


WINDOWS = {
    "shifted": {"image_size": [128, 64], "window_size": [4, 4, 4, 2]},
    "of another side in each stage": {"image_size": [128, 64], "window_size": [8, 4, 2, 2]},
    "as high as the grid is wide": {"image_size": [64, 64], "window_size": [2, 8, 4, 2]},
    "default": {"image_size": [64, 32]},
}
BLOCKS = {"depths": [2, 2, 3, 2], "embed_dim": 8, "num_heads": [1, 2, 2, 4]}


def vision_model(**changes):
    """A tower whose position bias and weights are large enough that a wrong order of tokens shows."""
    torch.manual_seed(0)
    model = MRAVisionModel(tiny_config(vision_config={**BLOCKS, **changes}).vision_config).eval()
    for parameter in model.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=2 * parameter.shape[-1] ** -0.5)
    for module in model.modules():
        if isinstance(module, torch.nn.LayerNorm):
            torch.nn.init.normal_(module.weight, mean=1, std=0.1)
            torch.nn.init.normal_(module.bias, std=0.1)
    return model


@pytest.mark.parametrize("case", WINDOWS)
@pytest.mark.parametrize("images", [1, 5])
@torch.no_grad()
def test_vision_tower(case, images):
    model = vision_model(**WINDOWS[case])
    pixels = torch.randn(images, *model.input_shape)
    assert can_pack(model)
    torch.testing.assert_close(PackedVision(model, torch.float32)(pixels), model(pixels), rtol=1e-4, atol=1e-4)


def test_shifted_windows_are_among_the_cases():
    model = vision_model(**WINDOWS["shifted"])
    assert [block.shift_size for block in model.swin.layers[0].blocks] == [(0, 0), (2, 2)]


@torch.no_grad()
def test_vision_tower_in_bfloat16():
    model = vision_model(**WINDOWS["shifted"])
    pixels = torch.randn(3, *model.input_shape)
    got, expected = PackedVision(model, torch.bfloat16)(pixels), model(pixels)
    assert got.dtype == torch.float32
    assert torch.nn.functional.cosine_similarity(got, expected, dim=-1).min() > 0.995
    wrong = expected.roll(1, dims=1)  # what a wrong order of the tokens would give
    assert torch.nn.functional.cosine_similarity(got, wrong, dim=-1).mean() < 0.95


@torch.no_grad()
def test_windows_that_overhang_the_grid():
    model = tiny_model(
        tiny_config(vision_config={**BLOCKS, "image_size": [96, 96], "window_size": [7, 7, 6, 3]})
    ).eval()
    assert not can_pack(model.mra.vision_model)
    pixels = torch.randn(2, 3, 96, 96)
    assert torch.equal(Towers(model).image_hidden_states(pixels), model.get_image_hidden_states(pixels))


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.bfloat16, 5e-2)])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@torch.no_grad()
def test_text_tower(dtype, tolerance, attention):
    model = tiny_model(scale=0.3)
    model.set_attn_implementation(attention)
    lengths, longest = torch.tensor([3, 9, 1]), 9
    mask = (torch.arange(longest) < lengths[:, None]).long()
    tokens = torch.randint(5, model.config.text_config.vocab_size, (3, longest)) * mask
    got = PackedText(model.mra.text_model, dtype)(tokens, mask)
    expected = model.get_text_hidden_states(tokens, mask)
    assert got.dtype == dtype
    torch.testing.assert_close(got.float(), expected, rtol=tolerance, atol=tolerance)


def test_towers_are_kept_between_calls():
    model, processor, dataset = tiny_model(), tiny_processor(), tiny_dataset()
    towers = Towers(model)
    first = encode_images(towers, processor, dataset)
    assert torch.equal(encode_images(towers, processor, dataset).embeds, first.embeds)
    assert torch.equal(encode_images(model, processor, dataset).embeds, first.embeds)
    assert "_vision" in vars(towers)
    with pytest.raises(ValueError, match=r"the towers run in torch\.float32, got dtype torch\.bfloat16"):
        encode_texts(towers, processor, ["a coat"], dtype=torch.bfloat16)


def test_towers_on_half_weights():
    model = tiny_model().bfloat16()
    towers = Towers(model)
    assert towers.dtype == torch.bfloat16
    encodings = encode_images(towers, tiny_processor(), tiny_dataset(), keep_hidden_states=True)
    assert encodings.hidden_states.dtype == torch.bfloat16 and encodings.embeds.dtype == torch.float32


@pytest.mark.parametrize(
    "layers, use",
    [
        (["qkv"], lambda model: PackedVision(model.mra.vision_model, torch.float32)),
        (["query"], lambda model: PackedText(model.mra.text_model, torch.float32)),
        (["query"], PairMatcher),
    ],
)
def test_an_adapter_is_refused_and_counts_once_merged(layers, use):
    """An adapter's layer has the plain weight besides its own two factors, which would be left out."""
    model = get_peft_model(tiny_model(), LoraConfig(r=2, target_modules=layers)).eval()
    with pytest.raises(ValueError, match="is a Linear, expected a plain linear layer: merge adapters"):
        use(model.base_model.model)
    use(model.merge_and_unload())


def test_autocast_around_does_not_reach_packed_layers():
    model = vision_model(**WINDOWS["default"])
    pixels = torch.randn(1, *model.input_shape)
    packed = PackedVision(model, torch.float32)
    with forward_context(model, torch.bfloat16):
        inside = packed(pixels)
    assert torch.equal(inside, packed(pixels))
