"""Configuration: borders, round trip, what follows from the fields."""

import json

import pytest

from configuration_mra import MRAConfig, MRATextConfig, MRAVisionConfig
from tests.helpers.tiny import tiny_config


def test_defaults_are_the_published_model():
    config = MRAConfig()
    vision, text = config.vision_config, config.text_config
    assert (vision.hidden_size, vision.grid_size, vision.num_patches) == (1024, (12, 8), 96)
    assert (text.num_text_layers, text.num_fusion_layers, text.hidden_size) == (6, 6, 768)
    assert (config.projection_type, config.projection_dim, config.max_text_length) == ("part_pooling", 2048, 56)
    assert (config.region_features, config.itc_gradient) == ("paper", "exact")
    assert (config.augmentation_weight, config.region_weight, config.temperature) == (0.8, 0.8, 0.07)


@pytest.mark.parametrize(
    ("image_size", "window", "expected"),
    [((384, 256), [8, 8, 8, 4], [8, 8, 8, 4]), ((224, 224), [7] * 4, [7] * 4), ((128, 64), [8] * 4, [8, 8, 4, 2])],
)
def test_windows_are_cut_to_the_stage(image_size, window, expected):
    vision = MRAVisionConfig(image_size=image_size, window_size=window)
    assert vision.effective_window_size == expected
    assert vision.num_patches == image_size[0] * image_size[1] // 32**2


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"projection_type": "mean"}, "projection_type"),
        ({"temperature": float("nan")}, "temperature"),
        ({"itm_weight": float("inf")}, "itm_weight"),
        ({"label_smoothing": float("nan")}, "label_smoothing"),
        ({"vision_config": {"drop_path_rate": float("nan")}}, "drop_path_rate"),
        ({"text_config": {"hidden_dropout_prob": float("nan")}}, "hidden_dropout_prob"),
        ({"region_features": "Paper"}, "region_features"),
        ({"itc_gradient": "half"}, "itc_gradient"),
        ({"itm_negatives": "some"}, "itm_negatives"),
        ({"itc_chunk_size": 0}, "itc_chunk_size"),
        ({"region_weight": -0.1}, "region_weight"),
        ({"mlm_weight": -1}, "mlm_weight"),
        ({"temperature": 0.0}, "temperature"),
        ({"max_text_length": 600}, "max_text_length"),
        ({"vision_config": {"image_size": [384, 250]}}, "image_size"),
        ({"vision_config": {"image_size": [384]}}, "image_size"),
        ({"vision_config": {"num_heads": [4, 8]}}, "num_heads"),
        ({"vision_config": {"window_size": [8]}}, "window_size"),
        ({"text_config": {"num_fusion_layers": 12}}, "num_fusion_layers"),
        ({"text_config": {"num_fusion_layers": 0}}, "num_fusion_layers"),
    ],
)
def test_an_error_names_the_field(fields, named):
    with pytest.raises(ValueError, match=f"`{named}`"):
        MRAConfig(**fields)


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"projection_dim": "wide"}, "projection_dim"),
        ({"vision_config": {"depths": 2}}, "depths"),
        ({"text_config": {"num_fusion_layers": 1.5}}, "num_fusion_layers"),
    ],
)
def test_a_value_of_another_type_is_refused(fields, named):
    with pytest.raises(Exception, match=named):
        MRAConfig(**fields)


def test_round_trip(tmp_path):
    config = tiny_config(region_features="published_code", label_smoothing=0.2, projection_type="linear")
    assert MRAConfig.from_dict(config.to_dict()).to_dict() == config.to_dict()
    config.save_pretrained(tmp_path)
    loaded = MRAConfig.from_pretrained(tmp_path)
    assert isinstance(loaded.vision_config, MRAVisionConfig) and isinstance(loaded.text_config, MRATextConfig)
    assert loaded.vision_config.depths == config.vision_config.depths
    assert loaded.to_dict() | {"architectures": None} == config.to_dict() | {"architectures": None}


def test_saved_configuration_holds_architecture_alone(tmp_path):
    tiny_config().save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())
    assert saved["model_type"] == "mra_retrieval"
    assert not any("learning_rate" in name or "path" in name.replace("drop_path", "") for name in saved)
    assert {"AutoConfig", "AutoModel", "AutoModelForPreTraining"} <= saved["auto_map"].keys()
