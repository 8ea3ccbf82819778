"""Full-size models, one step of each recipe at batch 2: minutes and gigabytes."""

import shutil
from pathlib import Path

import pytest
import yaml
from transformers import AutoConfig, AutoModel, BertTokenizer

from tests.helpers.runs import read_metrics, run_forked, write_sets
from tests.helpers.training import PIECES, WORDS


ROOT = Path(__file__).resolve().parents[2]
SMALL = {
    "per_device_batch_size": 2,
    "num_workers": 0,
    "max_train_steps": 1,
    "eval_rerank_k": 2,
    "eval_flip": False,
    "save_minutes": None,
}

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """Tiny sets, a tokenizer as large as BERT's and what one full-size pretraining step gave."""
    root = tmp_path_factory.mktemp("full")
    write_sets(root)
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS, *PIECES, "."]
    words += [f"word{index}" for index in range(30_522 - len(words))]
    BertTokenizer(vocab={word: index for index, word in enumerate(words)}).save_pretrained(root / "bert")
    return root


def take_step(root: Path, name: str, **changes) -> Path:
    """Runs a recipe of the repository for one step and returns the model's folder."""
    recipe = yaml.safe_load((ROOT / "recipes" / f"{name}.yaml").read_text()) | SMALL
    recipe |= {"output_dir": str(root / name), **changes}
    path = root / f"{name.replace('/', '_')}.yaml"
    path.write_text(yaml.safe_dump(recipe))
    assert run_forked(f"train_{Path(name).name.split('_')[0]}", "--config", path) == [0]
    return root / name / "final"


def pretrain(root: Path, name: str) -> Path:
    """One step of a pretraining recipe from random weights."""
    weights = {"vision_weights": None, "text_weights": None, "tokenizer_name": str(root / "bert")}
    return take_step(root, name, dataset=str(root / "sda"), **weights)


@pytest.fixture(scope="module")
def pretrained(root):
    return pretrain(root, "pretrain_sda")


def test_pretraining_recipe(root, pretrained):
    model = AutoModel.from_pretrained(pretrained, trust_remote_code=True)
    assert model.config.vision_config.image_size == [224, 224] and model.config.projection_dim == 2048
    assert sum(parameter.numel() for parameter in model.parameters()) > 220e6
    record = read_metrics(root / "pretrain_sda")[0]
    assert record["learning_rate"] == 0 and record["region_itc_loss"] > 0


@pytest.mark.parametrize("folder", ["reproduce", "paper"])
def test_other_pretraining_recipes(root, folder):
    config = AutoConfig.from_pretrained(pretrain(root, f"{folder}/pretrain_sda"), trust_remote_code=True)
    assert config.region_features == {"reproduce": "published_code", "paper": "paper"}[folder]
    assert config.itc_gradient == {"reproduce": "published", "paper": "exact"}[folder]
    assert read_metrics(root / folder / "pretrain_sda")[0]["region_itc_loss"] > 0
    shutil.rmtree(root / folder)


@pytest.mark.parametrize("name", ["finetune_cuhk", "finetune_icfg", "finetune_rstp"])
@pytest.mark.parametrize("folder", [".", "reproduce", "paper"])
def test_finetuning_recipes(root, pretrained, folder, name):
    changes = {"model_name_or_path": str(pretrained), "dataset": str(root / "pedes")}
    changes["eda_operations"] = ["random_swap", "random_deletion"]  # WordNet may not be here
    if name == "finetune_icfg":
        changes |= {"dataset": str(root / "icfg"), "validation_fraction": 0.3}
    final = take_step(root, f"{folder}/{name}", **changes)
    config = AutoConfig.from_pretrained(final, trust_remote_code=True)
    assert config.vision_config.image_size == [384, 256] and config.vision_config.window_size == [8, 8, 8, 4]
    assert config.projection_type == ("linear" if name == "finetune_rstp" else "part_pooling")
    assert "validation" in read_metrics(root / folder / name)[-1]
    shutil.rmtree(root / folder / name)
