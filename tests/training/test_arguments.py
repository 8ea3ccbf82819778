import dataclasses
import json

import pytest

from mra.common.arguments import parse_arguments, resolved_recipe
from mra.common.recipes import format_recipe
from mra.training.arguments import (
    DataArguments,
    ModelArguments,
    ObjectiveArguments,
    OptimizationArguments,
    PretrainDataArguments,
    RunArguments,
)


THEMES = (ModelArguments, ObjectiveArguments, DataArguments, OptimizationArguments, RunArguments)
NEEDED = {"tokenizer_name": "words", "dataset": "data/x", "output_dir": "runs/x"}


def parse(tmp_path, recipe="", *argv):
    path = tmp_path / "recipe.yaml"
    needed = [f"{name}: {value}\n" for name, value in NEEDED.items() if f"{name}:" not in recipe]
    path.write_text("".join(needed) + recipe)
    return parse_arguments(THEMES, argv=["--config", str(path), *argv])


def refuse(capsys, tmp_path, recipe="", *argv):
    with pytest.raises(SystemExit) as stopped:
        parse(tmp_path, recipe, *argv)
    assert stopped.value.code == 2
    return " ".join(capsys.readouterr().err.split())


def test_none_on_the_command_line_clears_a_recipe(tmp_path):
    recipe = "model_name_or_path: some/model\n"
    assert parse(tmp_path, recipe)[0].model_name_or_path == "some/model"
    new = ("--model_name_or_path", "none", "--vision_weights", "timm", "--text_weights", "bert")
    model = parse(tmp_path, recipe, *new)[0]
    assert (model.model_name_or_path, model.vision_weights, model.text_weights) == (None, "timm", "bert")
    recipe = "max_grad_norm: 2.0\nsave_steps: 5\n"
    optim, run = parse(tmp_path, recipe, "--max_grad_norm", "none", "--save_steps=none")[3:]
    assert optim.max_grad_norm is None and run.save_steps is None


def test_a_wrong_optional_number_is_named(capsys, tmp_path):
    assert "`--max_grad_norm` must be a finite number, got 'much'" in refuse(
        capsys, tmp_path, "", "--max_grad_norm", "much"
    )


def test_recipe_sets_values_and_command_line_wins(tmp_path):
    model, objective, data, optim, run = parse(
        tmp_path,
        "learning_rate: 1e-4\nimage_size: [128, 64]\nmlm_mask_padding: true\nseed: 7\nmixed_precision: no\n",
        "--seed=8",
        "--window_size",
        "4",
        "2",
        "--label_smoothing",
        "2e-1",
    )
    assert optim.learning_rate == 1e-4 and isinstance(optim.learning_rate, float)
    assert (model.image_size, model.window_size) == ([128, 64], [4, 2])
    assert data.mlm_mask_padding is True and run.seed == 8 and run.mixed_precision == "no"
    assert objective.label_smoothing == 0.2
    assert parse(tmp_path, "mlm_mask_padding: true\n", "--mlm_mask_padding", "false")[2].mlm_mask_padding is False
    assert parse(tmp_path, "", "--no_whole_word_masking")[2].whole_word_masking is False


@pytest.mark.parametrize(
    "recipe, argv, words",
    [
        ("learnin_rate: 1\n", (), ["recipe.yaml", "'learnin_rate'", "'learning_rate'"]),
        ("", ("--learnin_rate", "1"), ["'--learnin_rate'", "'--learning_rate'"]),
        ("", ("--learning", "1"), ["'--learning'"]),
        ("select_on: test\n", (), ["'select_on'"]),
        ("seed: 1.5\n", (), ["`seed`", "int", "1.5"]),
        ("seed: true\n", (), ["`seed`", "int"]),
        ("learning_rate: fast\n", (), ["`learning_rate`", "finite number", "'fast'"]),
        ("schedule: cosine\n", (), ["`schedule`", "linear", "'cosine'"]),
        ("image_size: 128\n", (), ["`image_size`", "list"]),
        ("image_backend: opencv\n", (), ["`image_backend`", "tensor, pillow", "'opencv'"]),
        ("chunk_size: 0\n", (), ["`chunk_size`", "at least 1, or left out", "0"]),
        ("", ("--chunk_size", "-4"), ["`chunk_size`", "at least 1, or left out", "-4"]),
        ("streaming_lanes: 0\n", (), ["`streaming_lanes`", "at least 1"]),
        ("torch_compile: 1\n", (), ["`torch_compile`", "true or false"]),
        ("multiplied_parts: [head]\n", (), ["`multiplied_parts`", "match_head", "head"]),
        ("num_warmup_steps: 1.5\n", (), ["`num_warmup_steps`"]),
        ("schedule: step\nfinal_learning_rate: 1e-6\n", (), ["`final_learning_rate`"]),
        ("schedule: step\nschedule_drops: warmup\nnum_warmup_steps: 0\n", (), ["`num_warmup_steps`", "more than 0"]),
        ("output_dir: null\n", (), ["`output_dir`", "--output_dir"]),
        ("model_name_or_path: m\nvision_weights: timm\n", (), ["`vision_weights`", "`model_name_or_path`"]),
        ("model_config: nowhere.json\n", (), ["`model_config`", "nowhere.json"]),
    ],
)
def test_wrong_values_are_named(capsys, tmp_path, recipe, argv, words):
    message = refuse(capsys, tmp_path, recipe, *argv)
    assert all(word in message for word in words), message


@pytest.mark.parametrize("values, name", [({"data_fraction": 0.5}, "data_fraction"), ({}, "num_train_pairs")])
def test_a_number_of_pairs_stands_for_itself(values, name):
    pairs = 10 if values else 0
    with pytest.raises(ValueError, match=f"`{name}` must be"):
        PretrainDataArguments(dataset="data/x", num_train_pairs=pairs, **values)


def test_missing_recipe(capsys):
    with pytest.raises(SystemExit):
        parse_arguments(THEMES, argv=["--config", "nowhere.yaml"])
    assert "nowhere.yaml" in capsys.readouterr().err


def test_model_config_as_mapping_json_or_file(tmp_path):
    mapping = "model_config:\n  projection_dim: 64\n  vision_config: {embed_dim: 8}\n"
    expected = {"projection_dim": 64, "vision_config": {"embed_dim": 8}}
    assert parse(tmp_path, mapping)[0].model_config == expected
    assert parse(tmp_path, "", "--model_config", json.dumps(expected))[0].model_config == expected
    (tmp_path / "config.json").write_text(json.dumps(expected))
    assert parse(tmp_path, "", "--model_config", str(tmp_path / "config.json"))[0].model_config == expected


def test_resolved_recipe_reads_back(tmp_path):
    themes = parse(tmp_path, "model_config: {projection_dim: 64}\nlearning_rate: 3e-5\nmultiplied_parts: [mlm_head]\n")
    (tmp_path / "resolved.yaml").write_text(format_recipe(resolved_recipe(*themes)))
    again = parse_arguments(THEMES, argv=["--config", str(tmp_path / "resolved.yaml")])
    assert [dataclasses.asdict(theme) for theme in again] == [dataclasses.asdict(theme) for theme in themes]


def test_help_groups_themes_and_shows_each_option_once(capsys):
    with pytest.raises(SystemExit) as stopped:
        parse_arguments(THEMES, description="Trains.", argv=["--help"])
    shown = capsys.readouterr().out
    assert stopped.value.code == 0
    assert shown.split("optimisation:")[1].count("--learning_rate LEARNING_RATE") == 1
    assert "--learning-rate" not in shown and "--whole_word_masking [true|false], --no_whole_word_masking" in shown
