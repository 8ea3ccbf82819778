"""The image encoder in int8 against float32: calibration, accuracy, outliers, and the errors."""

import logging
import threading

import pytest
import torch
import torch.nn.functional as F

from mra.common.private_interfaces import has_int8_products
from mra.retrieval import quantized
from mra.retrieval.encode import encode_images
from mra.retrieval.matching import PairMatcher
from mra.retrieval.packed import PackedBlock, PackedVision
from mra.retrieval.quantized import CALIBRATION_IMAGES, QuantizedVision
from mra.retrieval.towers import Towers
from tests.helpers.retrieval import tiny_dataset, tiny_model, tiny_processor
from tests.retrieval.test_packed import BLOCKS, WINDOWS, vision_model


needs_int8 = pytest.mark.skipif(not has_int8_products(), reason="this CPU has no instructions for int8")


def wide_model(case="shifted"):
    """A tower wide enough, and with weights small enough, that rounding errors average out."""
    model = vision_model(**WINDOWS[case], embed_dim=32)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter /= 2
        for module in model.modules():
            if isinstance(module, torch.nn.Linear) and module.bias is not None:
                torch.nn.init.normal_(module.bias, std=0.3)
    return model


def images(model, count):
    return torch.randn(count, *model.input_shape)


def least_cosine(model, vision, count=6):
    pixels = images(model, count)
    with torch.no_grad():
        return F.cosine_similarity(vision(pixels)[:, 0], model(pixels)[:, 0]).min().item()


def kinds(vision):
    return [isinstance(step, PackedBlock) for step in vision.packed.steps if "Block" in type(step).__name__]


@needs_int8
@pytest.mark.parametrize("case", WINDOWS)
@torch.no_grad()
def test_first_images_are_in_float32_and_the_next_close_to_it(case, caplog):
    model = wide_model(case)
    vision, exact = QuantizedVision(model), PackedVision(model, torch.float32)
    first = images(model, CALIBRATION_IMAGES - 1)
    assert torch.equal(vision(first), exact(first))
    with caplog.at_level(logging.INFO):
        last = images(model, 1)
        assert torch.equal(vision(last), exact(last))
    assert kinds(vision) == [False] * sum(BLOCKS["depths"])
    assert "int8: 9 of 9 blocks of the image encoder, calibrated on the first 32 images" in caplog.text
    pixels = images(model, 5)
    assert not torch.equal(vision(pixels), exact(pixels))
    assert least_cosine(model, vision) > 0.9994


@needs_int8
def test_channels_of_very_different_range_lose_little():
    model = wide_model()
    with torch.no_grad():
        for block in (block for stage in model.swin.layers for block in stage.blocks):
            for norm, linear in ((block.norm1, block.attn.qkv), (block.norm2, block.mlp.fc1)):
                norm.weight[0] *= 300  # the function stays as it was
                norm.bias[0] *= 300
                linear.weight[:, 0] /= 300
    vision = QuantizedVision(model)
    vision(images(model, CALIBRATION_IMAGES))
    assert kinds(vision) == [False] * sum(BLOCKS["depths"])
    assert least_cosine(model, vision) > 0.9994


@needs_int8
def test_a_block_that_int8_changes_too_much_stays_in_float32(caplog):
    model = wide_model()
    block = model.swin.layers[2].blocks[0]
    with torch.no_grad():  # a hidden unit of 1e5 that nothing reads takes the range of all others
        block.mlp.fc1.bias[0] = 1e5
        block.mlp.fc2.weight[:, 0] = 0
        for linear in (block.attn.proj, block.mlp.fc2):  # little beside its input, but all that the block does
            linear.weight /= 100
            linear.bias /= 100
    vision = QuantizedVision(model)
    with caplog.at_level(logging.INFO):
        vision(images(model, CALIBRATION_IMAGES))
    assert kinds(vision) == [False] * 4 + [True] + [False] * 4
    assert "int8: 8 of 9 blocks" in caplog.text
    assert least_cosine(model, vision) > 0.9994


@needs_int8
def test_embeddings_that_change_too_much_are_an_error(monkeypatch):
    model = wide_model()
    monkeypatch.setattr(quantized, "LEAST_COSINE", 0.999999)
    vision = QuantizedVision(model)
    for count in (CALIBRATION_IMAGES, 2):  # not only the first time, for a server that goes on
        with pytest.raises(ValueError, match=r"cosine [01]\.\d+ to float32\): use --dtype auto"):
            vision(images(model, count))


@needs_int8
def test_values_outside_of_the_ranges_seen_are_cut():
    model = wide_model()
    vision = QuantizedVision(model)
    vision(images(model, CALIBRATION_IMAGES))
    assert vision(100 * images(model, 2)).isfinite().all()


@needs_int8
def test_threads_calibrate_once(caplog):
    model = wide_model()
    vision = QuantizedVision(model)
    with caplog.at_level(logging.INFO):
        threads = [threading.Thread(target=vision, args=(images(model, CALIBRATION_IMAGES),)) for _ in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert caplog.text.count("calibrated on") == caplog.text.count("on 4 of them") == 1


@needs_int8
def test_only_the_image_encoder_is_int8():
    model, processor = tiny_model(), tiny_processor()
    towers = Towers(model, torch.int8)
    assert towers.dtype == PairMatcher(model, torch.int8).dtype == torch.float32
    encoded = encode_images(towers, processor, tiny_dataset(), keep_hidden_states=True)
    assert encoded.hidden_states.dtype == torch.float32


def test_a_cpu_without_the_instructions_is_refused(monkeypatch):
    monkeypatch.setattr(quantized, "has_int8_products", lambda: False)
    with pytest.raises(ValueError, match=r"int8 needs VNNI or AMX instructions, which this CPU \(.*\) lacks"):
        QuantizedVision(vision_model())


def test_weights_of_another_dtype_are_refused():
    with pytest.raises(ValueError, match="int8 runs on a CPU with float32 weights"):
        Towers(tiny_model().half(), torch.int8)
