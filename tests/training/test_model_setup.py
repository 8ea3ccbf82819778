import json

import pytest
import torch
from torch._dynamo.testing import CompileCounter

from batching_mra import TextLengths
from layers_mra import MRAFusionLayer, MRASwinBlock, MRATextLayer
from mra.training.arguments import ModelArguments, PretrainObjectiveArguments
from mra.training.model_setup import (
    compile_layers,
    create_config,
    create_model,
    create_processor,
    set_gradient_checkpointing,
)
from processing_mra import MRAImageProcessor
from tests.helpers.runs import PRETRAIN
from tests.helpers.tiny import tiny_batch, tiny_config, tiny_model
from tests.helpers.training import make_tokenizer


SHAPE = {name: PRETRAIN[name] for name in ("image_size", "window_size", "projection_dim", "model_config")}


@pytest.fixture
def tokenizer(tmp_path):
    make_tokenizer().save_pretrained(tmp_path / "tokenizer")
    return str(tmp_path / "tokenizer")


def checkpointed_layers(model):
    return {type(module) for module in model.modules() if getattr(module, "gradient_checkpointing", False)}


def setup(objective=None, max_grad_norm=None, **arguments):
    args = ModelArguments(**arguments)
    config = create_config(args, objective or PretrainObjectiveArguments().overrides())
    return config, create_processor(args, config), create_model(args, config, max_grad_norm)


def test_new_model_takes_shape_and_objective(tokenizer):
    objective = PretrainObjectiveArguments(region_weight=0.4, label_smoothing=0.1).overrides()
    config, processor, model = setup(objective, tokenizer_name=tokenizer, attn_implementation="eager", **SHAPE)
    assert (config.region_weight, config.label_smoothing, config.projection_dim) == (0.4, 0.1, 16)
    assert config.text_config.vocab_size == len(processor.tokenizer) and config.max_text_length == 24
    encoded = processor(images=torch.zeros(3, 90, 40, dtype=torch.uint8), text="a man")
    assert encoded["pixel_values"].shape == (1, 3, 64, 32) and encoded["input_ids"].shape == (1, 24)
    assert model.config.vision_config.window_size == [2, 2, 2, 1]
    assert model.config._attn_implementation == "eager"


def test_starting_model_is_resized_and_kept(tokenizer, tmp_path):
    shape = SHAPE | {"window_size": [4, 4, 2, 1]}
    _, processor, model = setup(tokenizer_name=tokenizer, caption_style="clean", **shape)
    model.save_pretrained(tmp_path / "start")
    processor.save_pretrained(tmp_path / "start")
    config, processor, larger = setup(
        model_name_or_path=str(tmp_path / "start"),
        image_size=[128, 64],
        window_size=[8, 4, 2, 1],
        gradient_checkpointing="all",
    )
    assert processor.caption_style == "clean" and processor.image_processor.size["height"] == 128
    assert processor.max_text_length == 24 and len(processor.tokenizer) == config.text_config.vocab_size
    before, after = model.state_dict(), larger.state_dict()
    assert before.keys() == after.keys()
    for name in before:
        if "layers.0" not in name or "relative_position_bias_table" not in name:
            assert torch.equal(before[name], after[name]), name
    assert after["mra.vision_model.swin.layers.0.blocks.0.attn.relative_position_bias_table"].shape[0] == 225
    assert checkpointed_layers(larger) == {MRASwinBlock, MRATextLayer, MRAFusionLayer}
    assert larger.chunk_size is None
    _, _, chunked = setup(model_name_or_path=str(tmp_path / "start"), chunk_size=3)
    assert chunked.chunk_size == 3


@pytest.mark.parametrize(
    "kind, layers, keeps_products",
    [
        ("none", set(), False),
        ("vision", {MRASwinBlock}, False),
        ("all", {MRASwinBlock, MRATextLayer, MRAFusionLayer}, False),
        ("selective", {MRASwinBlock, MRATextLayer, MRAFusionLayer}, True),
    ],
)
def test_gradient_checkpointing(kind, layers, keeps_products):
    model = tiny_model()
    for before in ("selective", "all", kind):
        set_gradient_checkpointing(model, before)
    assert checkpointed_layers(model) == layers
    functions = [layer._gradient_checkpointing_func for layer in model.modules() if type(layer) in layers]
    assert {"context_fn" in function.keywords for function in functions} == ({keeps_products} if layers else set())
    assert not any(function.keywords["use_reentrant"] for function in functions)


@pytest.mark.parametrize(
    "model_config, words",
    [
        ({"projection_width": 3}, "projection_width"),
        ({"vision_config": {"width": 3}}, "vision_config.width"),
        ({"region_weight": 0.5}, "set `region_weight`"),
        ({"projection_dim": 8}, "set `projection_dim`"),
        ({"vision_config": {"image_size": [64, 32]}}, "set `image_size`"),
    ],
)
def test_fields_are_set_once_and_exist(tokenizer, model_config, words):
    arguments = SHAPE | {"model_config": json.dumps(model_config)}
    with pytest.raises(ValueError, match=words):
        setup(tokenizer_name=tokenizer, **arguments)


def test_a_learned_temperature_is_not_set_again(tmp_path):
    with pytest.raises(ValueError, match="learned temperature"):
        setup(model_name_or_path=str(tmp_path), model_config={"temperature": 0.1})


def test_the_published_start_of_the_projections_is_not_clipped(tokenizer, tmp_path):
    _, processor, model = setup(tokenizer_name=tokenizer, head_initialization="published", **SHAPE)
    assert model.config.head_initialization == "published"
    with pytest.raises(
        ValueError, match=r"`max_grad_norm` is 1\.0, but vision_projection .* set `head_initialization"
    ):
        setup(tokenizer_name=tokenizer, head_initialization="published", max_grad_norm=1.0, **SHAPE)
    setup(tokenizer_name=tokenizer, max_grad_norm=1.0, **SHAPE)
    # Trained projections may be clipped; those that fine-tuning begins may not.
    for projection in (model.mra.vision_projection, model.mra.text_projection):
        torch.nn.init.normal_(projection.linear.weight, std=0.01)
    model.save_pretrained(tmp_path / "start")
    processor.save_pretrained(tmp_path / "start")
    start = {"model_name_or_path": str(tmp_path / "start"), "max_grad_norm": 1.0}
    setup(**start)
    with pytest.raises(ValueError, match="vision_projection"):
        setup(**start, projection_dim=8)
    setup(**start, projection_dim=8, head_initialization="bert")
    setup(**start, projection_dim=8, projection_type="linear")


def test_tokenizer_must_fit(tokenizer, tmp_path):
    shape = json.loads(json.dumps(SHAPE))
    shape["model_config"]["text_config"]["vocab_size"] = 20
    with pytest.raises(ValueError, match="the tokenizer has 51 tokens, but the model has 20"):
        setup(tokenizer_name=tokenizer, **shape)
    setup(tokenizer_name=tokenizer, **SHAPE)[2].save_pretrained(tmp_path / "start")  # no tokenizer beside it
    MRAImageProcessor().save_pretrained(tmp_path / "start")
    with pytest.raises(ValueError, match="`tokenizer` holds 5 special tokens and no words"):
        setup(model_name_or_path=str(tmp_path / "start"))


@pytest.mark.slow
def test_compiled_layers_settle_after_two_batches():
    """Texts of any length: the second batch makes lengths dynamic, and nothing is compiled after it."""
    counter = CompileCounter()
    model = tiny_model(tiny_config())
    batch = tiny_batch(model.config)
    generator, graphs = torch.Generator().manual_seed(0), []

    def loss():
        return model(**batch, lengths=lengths, generator=torch.Generator().manual_seed(0)).loss

    with torch.no_grad():
        for _ in range(4):
            caption, augmented, phrase = (torch.randint(12, 56, (4,), generator=generator).tolist() for _ in range(3))
            lengths = TextLengths(caption, augmented, phrase, masked=caption, max_masked=10)
            plain = loss()
            compile_layers(model, backend=counter)
            torch.testing.assert_close(loss(), plain)
            graphs.append(counter.frame_count)
            for module in model.modules():
                module._compiled_call_impl = None
    assert graphs[0] > 0 and graphs[1] == graphs[3], graphs
