"""The factory's configuration: sections, casts, overrides, and the recipes that ship."""

import dataclasses
import re
from pathlib import Path

import pytest
import yaml

from data_scripts.dad.config import SECTIONS
from mra.common.arguments import parse_arguments
from tests.helpers.dad import load_config


ROOT = Path(__file__).resolve().parents[3]
RECIPES = sorted((ROOT / "recipes" / "dad").glob("*.yaml"))
NEEDED = ["--common.work_dir=work", "--common.dataset=pedes"]


def test_values_are_cast_and_the_command_line_wins(tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text(
        "common: {work_dir: w, dataset: d, image_size: [64, 32]}\n"
        "train: {learning_rate: 1e-4, mixed_precision: no, max_grad_norm: 2}\ngenerate:\n"
    )
    config = load_config(
        str(path), ["--train.learning_rate=2e-4", "--train.max_grad_norm=none", "--generate.batch_size=8"]
    )
    assert config.train.learning_rate == 2e-4 and config.train.max_grad_norm is None
    assert config.train.mixed_precision == "no" and config.generate.batch_size == 8
    assert config.common.image_size == [64, 32]


def test_a_resolved_configuration_reads_as_itself(tmp_path):
    config = load_config(None, [*NEEDED, "--augment.strength=0.25", "--common.condition=none"])
    path = tmp_path / "again.yaml"
    path.write_text(yaml.safe_dump(dataclasses.asdict(config)))
    assert load_config(str(path)) == config


@pytest.mark.parametrize(
    "override, said",
    [
        ("--train.learnin_rate=1", "unknown argument '--train.learnin_rate'; did you mean '--train.learning_rate'?"),
        ("--trian.seed=1", "unknown argument '--trian.seed'; did you mean '--train.resume'?"),
        ("generate.batch_size=1", "did you mean '--generate.batch_size'?"),
        ("--generate.batch_size=many", "must be of type int, got 'many'"),
        ("--generate.batch_size=0", "`generate.batch_size` must be at least 1, got 0"),
        ("--generate.scheduler=best", "must be one of ddim"),
        ("--common.image_size=[384, 250]", "multiples of 8"),
        ("--common.condition=folder", "`common.condition_dir` must be a folder"),
        ("--common.shard=4/4", "index/count with the index from 0"),
        ("--augment.strength=1.5", "from 0 to 1"),
        ("--train.push_to_hub=true", "`train.hub_model_id`"),
        ("--common.dataset=null", "`common.dataset`"),
    ],
)
def test_what_is_wrong_is_named(override, said):
    with pytest.raises(ValueError) as error:
        load_config(None, [*NEEDED, override])
    assert said in str(error.value)


def test_unknown_keys_of_a_file_name_it(tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text("generate: {steps: 3}\n")
    with pytest.raises(ValueError, match=r"config\.yaml, section 'generate': unknown key 'steps'"):
        load_config(str(path))
    path.write_text("generate: [3]\n")
    with pytest.raises(ValueError, match="must be a mapping"):
        load_config(str(path))


def test_arguments_that_decide_a_result():
    config = load_config(None, NEEDED)
    deciding = config.deciding("train")
    assert "learning_rate" in deciding and "per_device_batch_size" in deciding
    assert not {"num_workers", "save_steps", "push_to_hub"} & deciding.keys()
    assert "work_dir" not in config.deciding("common")


@pytest.mark.parametrize("sections", [tuple(SECTIONS), ("common", "generate")])
def test_help_names_every_argument_of_the_sections_that_a_stage_reads(capsys, sections):
    with pytest.raises(SystemExit):
        parse_arguments(SECTIONS, argv=["--help"], shown=sections)
    words = capsys.readouterr().out.split()
    for name, section in SECTIONS.items():
        for item in dataclasses.fields(section):
            assert words.count(f"--{name}.{item.name}") == (name in sections) and item.metadata["help"].strip()


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_recipes_are_read(path):
    config = load_config(str(path))
    assert f"--config recipes/dad/{path.name}" in path.read_text() and config.common.dataset


def test_the_papers_settings():
    """What the paper says of its factory; the rest of the recipe is said to be ours there."""
    config = load_config(str(ROOT / "recipes/dad/cuhk.yaml"))
    assert config.common.image_size == [384, 256] and config.common.condition == "white"
    assert config.train.num_train_epochs == 3 and config.train.max_train_steps is None
    assert config.augment.prompts_per_caption == 20 and config.augment.strength == 0.5
    assert config.caption.prompt == "Describe the image in English"
    assert config.ground.box_threshold == config.ground.text_threshold == 0.35
    assert config.common.base_model is None  # named by the user, who accepts its licence


def test_options_that_the_docs_show_exist():
    text = "".join((ROOT / name).read_text() for name in ("docs/dad.md", "recipes/dad/cuhk.yaml"))
    shown = set(re.findall(r"(?<!\S)`?--(\w+\.\w+) ", text))
    known = {f"{name}.{item.name}" for name, section in SECTIONS.items() for item in dataclasses.fields(section)}
    assert len(shown) > 10 and shown - {"section.key"} <= known
    assert not re.search(rf"(?<![-.\w])({'|'.join(SECTIONS)})\.\w+=", text)  # `section.key=value` is not read
