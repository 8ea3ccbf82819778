import dataclasses
import json
import re
from pathlib import Path

import pytest
import yaml
from accelerate.commands.config.config_args import load_config_from_file

import train_finetune
import train_pretrain
from configuration_mra import MRAConfig
from mra_training.arguments import parse_arguments
from mra_training.model_setup import create_config
from mra_training.optim import create_schedule


ROOT = Path(__file__).resolve().parent.parent
RECIPES = sorted((ROOT / "recipes").rglob("*.yaml"))
ACCELERATE_CONFIGS = sorted((ROOT / "accelerate_configs").glob("*.yaml"))
SCRIPTS = {"pretrain": train_pretrain, "finetune": train_finetune}


def parse(path: Path):
    script = SCRIPTS["pretrain" if path.stem.startswith("pretrain") else "finetune"]
    themes = parse_arguments(script.THEMES, argv=["--config", str(path)])
    return {field.name: getattr(theme, field.name) for theme in themes for field in dataclasses.fields(theme)}, themes


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_recipe_is_read_and_launched_as_it_says(path):
    values, _ = parse(path)
    recipe = yaml.safe_load(path.read_text())
    assert recipe.keys() <= values.keys()
    commands = re.findall(r"accelerate launch (?:--config_file (\S+) )?(\S+\.py) --config (\S+)", path.read_text())
    assert commands, "the recipe shows its launch line"
    for config, script, shown in commands:
        assert (ROOT / shown) == path and (ROOT / script).is_file() and (not config or (ROOT / config).is_file())


@pytest.mark.parametrize("path", ACCELERATE_CONFIGS, ids=lambda path: path.stem)
def test_accelerate_config_is_read(path):
    config = load_config_from_file(str(path))
    assert "gradient_accumulation_steps" not in (config.deepspeed_config or {})
    assert config.num_machines in (1, 2) and config.mixed_precision in ("no", "bf16")


def test_the_accelerate_configs_are_complete():
    expected = {"cpu", "single_gpu", "ddp_4x3090", "zero2_4xa100", "zero3_offload", "multi_node_2x4"}
    assert expected <= {path.stem for path in ACCELERATE_CONFIGS}


@pytest.mark.parametrize(
    "name, table, pairs",
    [
        ("pretrain_sda", "linear_warmup2600", 1_217_750),
        ("finetune_cuhk", "step_warmup0.1", 68_126),
        ("finetune_rstp", "step_rstp", 37_010),
    ],
)
def test_fidelity_of_the_recipes_schedules(name, table, pairs):
    expected = json.loads((ROOT / "tests/reference/lr_tables.json").read_text())[table]
    values, themes = parse(ROOT / "recipes" / f"{name}.yaml")
    assert values["learning_rate"] == expected["base_lr"]
    assert values["num_train_epochs"] == expected["config"]["epochs"]
    assert values["num_warmup_steps"] == expected["config"]["num_warmup_steps"]
    assert values["schedule"] == expected["config"]["sched"]
    batch = 4 * values["per_device_batch_size"]
    assert -(-pairs // batch) == expected["config"]["step_per_epoch"]
    schedule = create_schedule(themes[3], expected["num_training_steps"])
    for step, factor in expected["step_factor"][:4]:
        assert schedule(step) == pytest.approx(factor)


def test_published_architecture_of_the_recipes():
    values, themes = parse(ROOT / "recipes/pretrain_sda.yaml")
    model_args, objective = themes[:2]
    model_args.tokenizer_name = str(ROOT / "data_scripts/sample_tokenizer")
    config = create_config(model_args, objective.overrides())
    assert config.vision_config.grid_size == (7, 7) and config.vision_config.window_size == [7, 7, 7, 7]
    assert (config.vision_config.drop_rate, config.vision_config.drop_path_rate) == (0.1, 0.2)
    assert (config.projection_type, config.projection_dim, config.region_weight) == ("part_pooling", 2048, 0.8)
    assert config.region_features == "paper" and config.itc_gradient == "exact"
    assert values["final_learning_rate"] == 5e-6 and not values["mlm_mask_padding"]


def test_every_argument_is_consumed():
    """A setting that nothing reads is refused here, as an unknown one is refused by the parser."""
    sources = [path.read_text() for path in (ROOT / "mra_training").glob("*.py")]
    sources += [(ROOT / f"{script.__name__}.py").read_text() for script in SCRIPTS.values()]
    code = "\n".join(source.split("# ------")[0] if "_argument_group_name" in source else source for source in sources)
    known = MRAConfig().to_dict()
    for script in SCRIPTS.values():
        for theme in script.THEMES:
            for field in dataclasses.fields(theme):
                read = re.search(rf"\.{field.name}\b", code) or f'"{field.name}"' in code
                assert read or ("Objective" in theme.__name__ and field.name in known), field.name


def test_nothing_selects_on_the_test_split():
    for path in [*(ROOT / "mra_training").glob("*.py"), ROOT / "train_pretrain.py", ROOT / "train_finetune.py"]:
        assert not re.search(r"""["']test["']""", path.read_text()), path
    for path in RECIPES:
        assert "select_on" not in path.read_text()
