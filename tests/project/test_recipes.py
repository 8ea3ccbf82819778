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
from mra.common.arguments import parse_arguments
from mra.training.model_setup import create_config
from mra.training.optim import create_schedule


ROOT = Path(__file__).resolve().parents[2]
RECIPES = sorted(
    path for path in (ROOT / "recipes").rglob("*.yaml") if path.parent.name != "dad"
)  # test_dad_config.py
ACCELERATE_CONFIGS = sorted((ROOT / "accelerate_configs").glob("*.yaml"))
SCRIPTS = {"pretrain": train_pretrain, "finetune": train_finetune}
FOLDERS = (".", "reproduce", "paper")  # what we recommend, the published code, the paper's text
PAIRS = {"pretrain_sda": 1_217_750, "finetune_cuhk": 68_126, "finetune_icfg": 34_674, "finetune_rstp": 37_010}
NAMES = list(PAIRS)

# What tests/reference/README.md says: first where paper and published code agree, then where each stands alone.
COMMON = {
    "per_device_batch_size": 40,
    "mlm_probability": 0.25,
    "mlm_max_masked": 10,
    "whole_word_masking": True,
    "skipgram_probability": 0.2,
    "skipgram_max_length": 3,
    "weight_decay": 0.01,
    "adam_beta1": 0.9,
    "adam_beta2": 0.98,
    "adam_epsilon": 1e-8,
    "learning_rate_multiplier": 2.0,
    "max_grad_norm": None,
    "gradient_accumulation_steps": 1,
    "sync_batchnorm": False,
    "ema_decay": None,
    "selection_metric": "R1",
    "eval_queries": None,
}
PRETRAIN = {
    "image_size": [224, 224],
    "window_size": [7, 7, 7, 7],
    "drop_rate": 0.1,
    "drop_path_rate": 0.2,
    "projection_type": "part_pooling",
    "projection_dim": 2048,
    "caption_style": "plain",
    "label_smoothing": 0.0,
    "data_fraction": 1.0,
    "erasing_probability": 0.6,
    "learning_rate": 5e-5,
    "schedule": "linear",
    "num_warmup_steps": 2600,
    "multiplied_parts": ["cross_attention"],
    "num_train_epochs": 32,
}
FINETUNE = {
    "image_size": [384, 256],
    "window_size": [8, 8, 8, 4],
    "drop_rate": 0.0,
    "drop_path_rate": 0.1,
    "label_smoothing": 0.2,
    "augmentation_weight": 0.8,
    "num_warmup_steps": 0.1,
    "multiplied_parts": ["late_vision_stages", "late_text_layers", "late_fusion_layers", "mlm_head", "match_head"],
}
POOLED = {"projection_type": "part_pooling", "projection_dim": 2048}
LONG = {"learning_rate": 1e-4, "num_train_epochs": 30, "eval_rerank_k": 512, "erasing_probability": 0.6}
SETS = {
    "finetune_cuhk": {"caption_style": "plain", **POOLED, **LONG},
    "finetune_icfg": {"caption_style": "clean", **POOLED, **LONG},
    "finetune_rstp": {
        "caption_style": "clean",
        "projection_type": "linear",
        "projection_dim": 256,
        "erasing_probability": 0.4,
    },
}
STEPS = {"schedule": "step", "schedule_drops": "warmup", "eda_probability": 1.0, "eda_style": "published"}
CODE = {
    "all": {
        "itc_gradient": "published",
        "mlm_mask_padding": True,
        "eval_score_fusion": "published",
        "image_backend": "pillow",
        "head_initialization": "published",
        "count_dropped_batch": True,
        "mixed_precision": "bf16",
        "eval_dtype": "float32",
    },
    "pretrain_sda": {
        "region_features": "published_code",
        "region_weight": 0.64,
        "final_learning_rate": 0.0,
        "eval_rerank_k": 128,
    },
    "finetune": STEPS,
    "finetune_icfg": STEPS | {"validation_fraction": 0.0},
    "finetune_rstp": STEPS | {"learning_rate": 6e-5, "num_train_epochs": 10, "eval_rerank_k": 1000},
}
PAPER = {
    "all": {
        "itc_gradient": "exact",
        "mlm_mask_padding": False,
        "eval_score_fusion": "single",
        "image_backend": "pillow",
    },
    "pretrain_sda": {"region_features": "paper", "region_weight": 0.8, "final_learning_rate": 5e-6},
    "finetune": {"schedule": "linear", "final_learning_rate": 0.0},
    "finetune_rstp": {"schedule": "linear", "learning_rate": 5e-5, "num_train_epochs": 30, "eval_rerank_k": 512},
}


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


def steps_of(name: str, **arguments) -> int:
    """Optimizer steps of a recipe on the published sizes, the incomplete last batch dropped."""
    return PAIRS[name] // (4 * arguments["per_device_batch_size"]) * arguments["num_train_epochs"]


@pytest.mark.parametrize("name", NAMES)
def test_fidelity_of_the_recipes_values(name):
    everywhere = PRETRAIN if name == "pretrain_sda" else FINETUNE | SETS[name]
    for folder, choices in (("reproduce", CODE), ("paper", PAPER)):
        values, _ = parse(ROOT / "recipes" / folder / f"{name}.yaml")
        expected = COMMON | everywhere | choices["all"] | choices.get(name, choices["finetune"])
        assert {key: values[key] for key in expected} == expected, folder


@pytest.mark.parametrize("name", NAMES)
def test_recipes_of_one_name_differ_in_the_listed_settings_alone(name):
    recommended, reproduce, paper = (parse(ROOT / "recipes" / folder / f"{name}.yaml")[0] for folder in FOLDERS)
    places = {"output_dir", "model_name_or_path"}
    for folder, values, choices in (("reproduce", reproduce, CODE), ("paper", paper, PAPER)):
        changed = {key for key in values if values[key] != recommended[key]} - places
        assert changed <= (choices["all"] | choices.get(name, choices["finetune"])).keys(), folder
        assert values["output_dir"] == f"outputs/{folder}/{name}"
        if name != "pretrain_sda":
            assert values["model_name_or_path"] == f"outputs/{folder}/pretrain_sda/final"


@pytest.mark.parametrize("name", ["pretrain_sda", "finetune_cuhk"])
@pytest.mark.parametrize("folder", ["single_12gb", "single_24gb"])
def test_recipes_of_one_card_take_the_same_steps_in_chunks(folder, name):
    single, recommended = (parse(ROOT / "recipes" / place / f"{name}.yaml")[0] for place in (folder, "."))
    changed = {key for key in single if single[key] != recommended[key]}
    places = {"output_dir", "model_name_or_path"} if name != "pretrain_sda" else {"output_dir"}
    assert changed == {"per_device_batch_size", "chunk_size"} | places
    assert single["per_device_batch_size"] == 4 * recommended["per_device_batch_size"] == 160
    assert 1 < single["chunk_size"] < 160 and single["output_dir"] == f"outputs/{folder}/{name}"
    if name != "pretrain_sda":
        assert single["model_name_or_path"] == f"outputs/{folder}/pretrain_sda/final"


@pytest.mark.parametrize("folder", FOLDERS)
@pytest.mark.parametrize("name", NAMES)
def test_recipes_of_four_processes_are_not_cut_into_chunks(folder, name):
    assert parse(ROOT / "recipes" / folder / f"{name}.yaml")[0]["chunk_size"] is None


def test_every_published_run_has_its_recipes():
    for folder in FOLDERS:
        assert sorted(path.stem for path in (ROOT / "recipes" / folder).glob("*.yaml")) == sorted(NAMES)


@pytest.mark.parametrize(
    "name, table",
    [("pretrain_sda", "linear_warmup2600"), ("finetune_cuhk", "step_warmup0.1"), ("finetune_rstp", "step_rstp")],
)
def test_fidelity_of_the_recipes_schedules(name, table):
    expected = json.loads((ROOT / "tests/reference/lr_tables.json").read_text())[table]
    values, themes = parse(ROOT / "recipes/reproduce" / f"{name}.yaml")
    assert values["learning_rate"] == expected["base_lr"]
    assert values["num_train_epochs"] == expected["config"]["epochs"]
    assert values["num_warmup_steps"] == expected["config"]["num_warmup_steps"]
    assert values["schedule"] == expected["config"]["sched"]
    assert -(-PAIRS[name] // (4 * values["per_device_batch_size"])) == expected["config"]["step_per_epoch"]
    schedule = create_schedule(themes[3], expected["num_training_steps"])
    for step, factor in expected["step_factor"]:
        assert schedule(step) == pytest.approx(factor)


@pytest.mark.parametrize("name, warmup, end", [("pretrain_sda", 2600, 5e-6), ("finetune_cuhk", 1275, 0.0)])
def test_the_papers_schedules_are_straight_lines(name, warmup, end):
    values, themes = parse(ROOT / "recipes/paper" / f"{name}.yaml")
    steps, peak = steps_of(name, **values), values["learning_rate"]
    schedule = create_schedule(themes[3], steps)
    rates = [peak * schedule(step) for step in (0, warmup, (warmup + steps) // 2, steps)]
    assert rates == pytest.approx([0.0, peak, (peak + end) / 2, end], rel=1e-4)


@pytest.mark.parametrize("folder", FOLDERS)
def test_published_architecture_of_the_recipes(folder):
    _, themes = parse(ROOT / "recipes" / folder / "pretrain_sda.yaml")
    model_args, objective = themes[:2]
    model_args.tokenizer_name = str(ROOT / "data_scripts/sample/tokenizer")
    config = create_config(model_args, objective.overrides())
    assert config.vision_config.grid_size == (7, 7) and config.vision_config.window_size == [7, 7, 7, 7]
    assert (config.vision_config.drop_rate, config.vision_config.drop_path_rate) == (0.1, 0.2)
    assert (config.projection_type, config.projection_dim) == ("part_pooling", 2048)
    choices = (config.region_features, config.region_weight, config.itc_gradient)
    assert choices == (("published_code", 0.64, "published") if folder == "reproduce" else ("paper", 0.8, "exact"))


def test_every_argument_is_consumed():
    """A setting that nothing reads is refused here, as an unknown one is refused by the parser."""
    sources = [path.read_text() for path in [*(ROOT / "mra/training").glob("*.py"), ROOT / "mra/common/streaming.py"]]
    sources += [(ROOT / f"{script.__name__}.py").read_text() for script in SCRIPTS.values()]
    code = "\n".join(source.split("# ------")[0] if "class RunArguments" in source else source for source in sources)
    known = MRAConfig().to_dict()
    for script in SCRIPTS.values():
        for theme in script.THEMES:
            for field in dataclasses.fields(theme):
                read = re.search(rf"\.{field.name}\b", code) or f'"{field.name}"' in code
                assert read or ("Objective" in theme.__name__ and field.name in known), field.name


def test_nothing_selects_on_the_test_split():
    for path in [*(ROOT / "mra" / "training").glob("*.py"), ROOT / "train_pretrain.py", ROOT / "train_finetune.py"]:
        assert not re.search(r"""["']test["']""", path.read_text()), path
    for path in RECIPES:
        assert "select_on" not in path.read_text()
