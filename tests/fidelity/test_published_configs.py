"""Every key of the published configuration files against `recipes/reproduce/`, and every value of these recipes."""

import copy
import functools
import json
import math
import random
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml
from transformers import BertTokenizer

import train_finetune
import train_pretrain
from mra.common.arguments import parse_arguments, resolved_recipe
from mra.training import model_setup
from mra.training.augmentation import STOP_WORDS, create_augmenter
from mra.training.optim import create_optimizer
from tests.helpers.tiny import tiny_model
from tests.training.test_augmentation import write_wordnet


ROOT = Path(__file__).resolve().parents[2]
FIDELITY = (ROOT / "docs/fidelity.md").read_text()
PUBLISHED = json.loads((ROOT / "tests/reference/published_configs.json").read_text())
RECIPES = {
    name: ROOT / f"recipes/reproduce/{stage}.yaml"
    for name, stage in {
        "sda": "pretrain_sda",
        "cuhk": "finetune_cuhk",
        "icfg": "finetune_icfg",
        "rstp": "finetune_rstp",
    }.items()
}
FINETUNED = ["cuhk", "icfg", "rstp"]
SECTIONS = {  # section of the reference file -> the recipes that it describes
    **{name: [name] for name in RECIPES},
    "config_bert": list(RECIPES),
    "config_swinB_224x224": ["sda"],
    "config_swinB_384x256": FINETUNED,
    "eda_call": FINETUNED,
}
VOCABULARIES = {"bert-base-uncased": 30_522}  # words of the tokenizers that a recipe may name


# ---------------------------------------------------------------- resolving a recipe


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tokenizer of the size of BERT's under its name, and a WordNet of a few words."""
    folder = tmp_path_factory.mktemp("published")
    for name, size in VOCABULARIES.items():
        vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *map(str, range(size - 5))]
        BertTokenizer(vocab={word: index for index, word in enumerate(vocabulary)}).save_pretrained(folder / name)
    write_wordnet(folder / "nltk" / "corpora" / "wordnet")
    return folder


@pytest.fixture
def resolve(folder, monkeypatch):
    """Parse a recipe as its script does and resolve the model that it describes; a changed copy may be given."""
    import nltk

    monkeypatch.setattr(nltk.data, "path", [str(folder / "nltk")])
    tokenizer = functools.lru_cache(model_setup.AutoTokenizer.from_pretrained)
    monkeypatch.setattr(model_setup.AutoTokenizer, "from_pretrained", tokenizer)

    @functools.lru_cache
    def start(place):
        """The pretraining whose result fine-tuning starts from, saved where `create_config` reads it."""
        recipe = run("sda", yaml.safe_load(RECIPES["sda"].read_text()))
        assert place == f"{recipe.output_dir}/final", f"{place} is not what recipes/reproduce/pretrain_sda.yaml gives"
        recipe.config.save_pretrained(folder / "start")
        return recipe

    def run(name, values):
        path = folder / "recipe.yaml"
        path.write_text(yaml.safe_dump(values))
        themes = parse_arguments(
            (train_pretrain if name == "sda" else train_finetune).THEMES, argv=["--config", str(path)]
        )
        model, objective, data, optim = themes[:4]
        recipe = SimpleNamespace(**resolved_recipe(*themes), themes=themes, data=data, optim=optim)
        recipe.start = recipe
        arguments = copy.copy(model)
        if model.model_name_or_path is None:
            arguments.tokenizer_name = str(folder / model.tokenizer_name)
        else:
            recipe.start = start(model.model_name_or_path)
            arguments.model_name_or_path = str(folder / "start")
        recipe.config = model_setup.create_config(arguments, objective.overrides())
        return recipe

    return run


# ---------------------------------------------------------------- what each published key is here


class Ledger(str):
    """A difference that docs/fidelity.md names: the first cell of its row."""


FILES = Ledger("configuration files name images and annotations by their paths")
EVALUATION_BATCHES = Ledger("evaluation encodes 40 images and 200 captions at a time")
ON_TEST = Ledger("the best checkpoint is chosen on the test split each epoch; pretraining reports on it")
NO_LR_X = Ledger("`lr_x` never applies: the projections train at the plain rate")
TRACKER = Ledger("the SDA configuration has a `project` name")
MODEL_CLASS = Ledger("the text encoder is a `BertForMaskedLM` of type `bert`")

LATE = {"late_vision_stages", "late_text_layers", "late_fusion_layers", "mlm_head", "match_head"}


def of_set(split):
    """Name of a file of the processed annotations, by the name of the recipe's set."""
    return lambda recipe: f"data/finetune/{Path(recipe.dataset).name}_{split}.json"


def window(recipe):
    """The published side, halved in stages that it does not divide."""
    vision = recipe.config.vision_config
    side = vision.window_size[0]
    stages = range(len(vision.depths))
    grids = [[length // vision.patch_size // 2**stage for length in vision.image_size] for stage in stages]
    published = [side if all(length % side == 0 for length in grid) else side // 2 for grid in grids]
    return side if published == vision.window_size == vision.effective_window_size else vision.window_size


@functools.cache
def tiny():
    return tiny_model()


def optimizer(recipe):
    return create_optimizer(tiny(), recipe.optim)


def rates(recipe):
    """Peak learning rates of the groups: the plain one, then the multiplied one."""
    return sorted({group["lr"] for group in optimizer(recipe).param_groups})


RUN = {
    "region": lambda r: round(math.sqrt(r.region_weight), 9) if hasattr(r, "region_weight") else 0,  # model x loop
    "vision_config": lambda r: "configs/config_swinB_{}x{}.json".format(*r.config.vision_config.image_size),
    "patch_size": lambda r: r.config.vision_config.stride,
    "image_res": lambda r: r.config.vision_config.image_size[0],
    "h": lambda r: r.config.vision_config.image_size[0],
    "w": lambda r: r.config.vision_config.image_size[1],
    "text_config": lambda r: f"configs/config_{r.start.text_weights.split('-')[0]}.json",
    "text_encoder": lambda r: (
        f"data/{r.start.text_weights}" if r.start.text_weights == r.start.tokenizer_name else None
    ),
    "load_pretrained": lambda r: r.model_name_or_path is not None,
    "load_params": lambda r: None not in (r.vision_weights, r.text_weights),
    "lr_2": lambda r: set(r.multiplied_parts) == LATE,
    "embed_dim": lambda r: r.config.projection_dim if r.config.projection_type == kind(r.config) else None,
    "LabelSmooth": lambda r: r.config.label_smoothing,
    "temp": lambda r: r.config.temperature,
    "max_tokens": lambda r: r.config.max_text_length,
    "max_words": lambda r: r.config.max_text_length,
    "icfg_rstp": lambda r: r.caption_style == "clean",
    "eda": lambda r: hasattr(r, "eda_style") and r.augmentation_weight == 0.8,
    "erasing_p": lambda r: r.erasing_probability,
    "mask_prob": lambda r: r.mlm_probability,
    "max_masks": lambda r: r.mlm_max_masked,
    "skipgram_prb": lambda r: r.skipgram_probability,
    "skipgram_size": lambda r: r.skipgram_max_length,
    "mask_whole_word": lambda r: r.whole_word_masking,
    "batch_size_train": lambda r: r.per_device_batch_size,
    "batch_size_test": EVALUATION_BATCHES,
    "batch_size_test_text": EVALUATION_BATCHES,
    "k_test": lambda r: r.eval_rerank_k,
    "optimizer.opt": lambda r: type(optimizer(r)).__name__[0].lower() + type(optimizer(r)).__name__[1:],
    "optimizer.lr": lambda r: rates(r)[0],
    "optimizer.weight_decay": lambda r: max(group["weight_decay"] for group in optimizer(r).param_groups),
    "optimizer.lr_mult": lambda r: rates(r)[-1] / rates(r)[0],
    "optimizer.lr_x": NO_LR_X,
    "schedular.sched": lambda r: r.schedule,
    "schedular.lr": lambda r: r.learning_rate,
    "schedular.epochs": lambda r: r.num_train_epochs,
    "schedular.num_warmup_steps": lambda r: r.num_warmup_steps,
    "image_root": FILES,
}
PRETRAINING = RUN | {
    "image_root_test": FILES,
    "test_file": ON_TEST,
    "val_file": ON_TEST,
    "init_cross": lambda r: r.multiplied_parts == ["cross_attention"],
    "itc_dop": lambda r: r.config.projection_dropout,
    "project": TRACKER,
}
FINETUNING = RUN | {
    "train_file": lambda r: [of_set("train")(r)],
    "val_file": of_set("val"),
    "test_file": of_set("test"),
    "window_size": window,
    "itc_dop": lambda r: r.config.projection_dropout,
    "test_hflip": lambda r: r.eval_flip,
}
SWIN = {
    "ckpt": lambda r: r.start.vision_weights,
    "vision_width": lambda r: r.config.vision_config.hidden_size,
    "image_res": RUN["image_res"],
    "h": RUN["h"],
    "w": RUN["w"],
    "window_size": window,
    "embed_dim": lambda r: r.config.vision_config.embed_dim,
    "depths": lambda r: r.config.vision_config.depths,
    "num_heads": lambda r: r.config.vision_config.num_heads,
    "drop_rate": lambda r: r.config.vision_config.drop_rate,
    "drop_path_rate": lambda r: r.config.vision_config.drop_path_rate,
}
BERT_FIELDS = (
    "attention_probs_dropout_prob", "hidden_act", "hidden_dropout_prob", "hidden_size", "initializer_range",
    "intermediate_size", "layer_norm_eps", "max_position_embeddings", "num_attention_heads", "num_hidden_layers",
    "pad_token_id", "type_vocab_size", "vocab_size",
)  # fmt: skip
BERT = {
    **{name: lambda r, name=name: getattr(r.config.text_config, name) for name in BERT_FIELDS},
    "architectures": MODEL_CLASS,
    "model_type": MODEL_CLASS,
    "fusion_layer": lambda r: r.config.text_config.num_text_layers,
    "encoder_width": lambda r: r.config.vision_config.hidden_size,
}


def kind(config):
    """The projection that goes with a width, as the published code switches."""
    return "linear" if config.projection_dim == 256 else "part_pooling"


# What is written in words holds where the augmenter of the recipe does it; tests/training/test_augmentation.py measures
# how often.
LONG = " ".join(f"{letter}word" for letter in "abcdefghijklm" * 5)  # 65 words, more than a caption keeps


def texts(recipe, caption, operation=None, seeds=150):
    """What the recipe's augmenter makes of a caption, by the operation alone if the recipe has it."""
    data = copy.copy(recipe.data)
    data.eda_operations = [name for name in data.eda_operations if operation in (None, name)]
    augmenter = create_augmenter(data)
    return {augmenter(caption, random.Random(seed)) for seed in range(seeds)}


def takes_one_of_four(recipe):
    four = {"synonym_replacement", "random_insertion", "random_swap", "random_deletion"}
    return recipe.eda_probability == 1 and set(recipe.eda_operations) == four and len(recipe.eda_operations) == 4


def reads_before_the_cut(recipe):
    return any(len(text.split()) == 65 for text in texts(recipe, LONG, "random_swap"))


def is_letters_alone(recipe):
    return texts(recipe, "A man's RED-ish 2 Bags", "random_swap") <= {
        " ".join(words) for words in swapped(["a", "mans", "red", "ish", "bags"])
    }


def swapped(words):
    yield words
    for i in range(len(words)):
        for j in range(i):
            other = list(words)
            other[i], other[j] = other[j], other[i]
            yield other


def replaces_everywhere(recipe):
    made = texts(recipe, "two red shoes on two red shoes", "synonym_replacement")
    wanted = {f"{a} red shoes on {a} red shoes".strip() for a in ("ii", "tv")} | {"red shoes on red shoes"}
    wanted |= {f"two {a} shoes on two {a} shoes" for a in ("reddish", "ruby red")}
    wanted |= {f"two red {a} on two red {a}" for a in ("shoe", "trainer")}
    return made == wanted


def inserts_the_first_before_the_last_word(recipe):
    return texts(recipe, "big red", "random_insertion") == {
        "large big red", "big large red", "reddish big red", "big reddish red"
    }  # fmt: skip


def swaps_two(recipe):
    made = texts(recipe, "a b c d", "random_swap")
    return {" ".join(words) for words in swapped(["a", "b", "c", "d"])} == made  # an empty draw leaves the text


def deletes_a_tenth(recipe):
    kept = sum(len(text.split()) for text in texts(recipe, LONG, "random_deletion"))
    return texts(recipe, "red", "random_deletion") == {"red"} and abs(kept / 150 / 65 - 0.9) < 0.02


EDA_TEXTS = {
    "taken": (takes_one_of_four, "first of the four shuffled"),
    "order": (reads_before_the_cut, "caption cleaning (icfg_rstp only), then eda, then cut to max_words"),
    "text_of_the_augmented_caption": (is_letters_alone, "lower case, letters a-z and single spaces only"),
    "synonym_replacement": (
        replaces_everywhere,
        "n = max(1, int(0.1 * words)) distinct non-stop-words, each replaced",
    ),
    "random_insertion": (inserts_the_first_before_the_last_word, "n insertions, each of the first synonym listed"),
    "random_swap": (swaps_two, "n swaps of two random places"),
    "random_deletion": (deletes_a_tenth, "each word with probability 0.1; one word is never deleted"),
}
EDA = {
    "alpha_sr": lambda r: r.eda_synonym_strength,
    "alpha_ri": lambda r: r.eda_insertion_strength,
    "alpha_rs": lambda r: r.eda_swap_strength,
    "p_rd": lambda r: r.eda_deletion_probability,
    "num_aug": lambda r: r.eda_probability,  # one text a caption, always
    **{
        name: lambda r, check=check, start=start, name=name: (
            PUBLISHED["eda_call"][name]
            if check(r) and PUBLISHED["eda_call"][name].startswith(start)
            else f"not as {check.__name__} expects"
        )
        for name, (check, start) in EDA_TEXTS.items()
    },
}
MAPPINGS = {
    "sda": PRETRAINING,
    **dict.fromkeys(FINETUNED, FINETUNING),
    "config_bert": BERT,
    "config_swinB_224x224": SWIN,
    "config_swinB_384x256": SWIN,
    "eda_call": EDA,
}

# What the files do not hold: facts of tests/reference/README.md, and what only this project has.
FACTS = {
    "itc_gradient": "published",
    "mlm_mask_padding": True,
    "image_backend": "pillow",
    "head_initialization": "published",
    "adam_beta1": 0.9,
    "adam_beta2": 0.98,
    "adam_epsilon": 1e-8,
    "max_grad_norm": None,
    "gradient_accumulation_steps": 1,
    "flip_probability": 0.5,
    "itm_weight": 1.0,
    "mlm_weight": 1.0,
    "itm_negatives": "local",
    "itc_chunk_size": None,
    "mixed_precision": "bf16",
    "count_dropped_batch": True,
    "final_learning_rate": 0.0,
    "eval_dtype": "float32",
    "eval_score_fusion": "published",
    "eval_flip": True,
    "seed": 42,
    "num_workers": 4,
    "logging_steps": 50,
    "save_minutes": 30.0,
    "save_total_limit": 2,
    "max_train_steps": None,
    "model_config": {},
}
FACTS_OF = {
    "sda": {
        "region_features": "published_code",
        "data_fraction": 1.0,
        "num_train_pairs": None,
        "dataset": "data/arrow/sda",
        "output_dir": "outputs/reproduce/pretrain_sda",
        "caption_style": "plain",
    },
    **{
        name: {
            "augmentation_weight": 0.8,
            "schedule_drops": "warmup",
            "eda_style": "published",
            "validation_fraction": 0.0,
            "dataset": f"data/arrow/{name}",
            "output_dir": f"outputs/reproduce/finetune_{name}",
        }
        for name in FINETUNED
    },
}


# ---------------------------------------------------------------- the check


def flat(section):
    """Keys of a section, those of its inner mappings joined by a point."""
    for key, value in section.items():
        if isinstance(value, dict):
            yield from ((f"{key}.{inner}", item) for inner, item in value.items())
        else:
            yield key, value


def problems(published, resolve, changed=None):
    """
    Where the published files and the recipes differ, one line each.

    Args:
        published: the reference file.
        resolve: the fixture.
        changed: name of a recipe -> values in place of those of its file; other recipes are then left out.
    """
    found = []
    names = changed or RECIPES
    recipes = {}
    for name in names:
        try:
            recipes[name] = resolve(name, changed[name] if changed else yaml.safe_load(RECIPES[name].read_text()))
        except (ValueError, OSError, AssertionError, SystemExit) as error:
            found.append(f"{name}: {error}")
    for section, described in SECTIONS.items():
        keys = dict(flat(published[section]))
        for key, value in keys.items():
            ours = MAPPINGS[section].get(key)
            if ours is None:
                found.append(f"{section}.{key}: neither a recipe's key nor an exception")
            elif isinstance(ours, Ledger):
                if f"\n| {ours} |" not in FIDELITY:
                    found.append(f"{section}.{key}: docs/fidelity.md has no row {ours!r}")
            else:
                for name in set(described) & set(recipes):
                    try:
                        got = ours(recipes[name])
                    except ValueError as error:
                        got = error
                    if not agree(got, value):
                        found.append(f"{section}.{key}: {value!r} published, {got!r} in {RECIPES[name].name}")
    for name, recipe in recipes.items():
        for key, value in (FACTS | FACTS_OF[name]).items():
            if getattr(recipe, key) != value:
                found.append(f"{RECIPES[name].name}: `{key}` is {getattr(recipe, key)!r}, not {value!r}")
    return found


def agree(ours, published):
    """Equal, and a truth value equal to a truth value alone; floats to rounding."""
    if isinstance(ours, bool) != isinstance(published, bool):
        return False
    return ours == published or (isinstance(published, float) and ours == pytest.approx(published, rel=1e-9))


def test_every_key_is_reproduced_or_named(resolve):
    assert problems(PUBLISHED, resolve) == []
    assert set(PUBLISHED) == set(SECTIONS)


def test_no_mapping_is_left_over():
    for section, described in SECTIONS.items():
        keys = {key for name in (FINETUNED if section in FINETUNED else [section]) for key, _ in flat(PUBLISHED[name])}
        assert set(MAPPINGS[section]) <= keys and described, section


@pytest.mark.parametrize("section", SECTIONS)
def test_a_new_key_is_reported(section, resolve):
    published = copy.deepcopy(PUBLISHED)
    published[section]["new_key"] = 1
    assert any(f"{section}.new_key" in line for line in problems(published, resolve))


def other(value):
    """A value of the same kind that differs."""
    if isinstance(value, bool):
        return not value
    if isinstance(value, (int, float)):
        return value * 2 + 1
    if isinstance(value, list):
        return [*value[:-1], other(value[-1])] if value else ["other"]
    return f"other-{value}"


@pytest.mark.parametrize("section", SECTIONS)
def test_a_changed_published_value_is_reported(section, resolve):
    """No mapping is vacuous: each published value but those of the ledger's exceptions counts."""
    recipes = {name: resolve(name, yaml.safe_load(RECIPES[name].read_text())) for name in SECTIONS[section]}
    for key, value in flat(PUBLISHED[section]):
        ours = MAPPINGS[section][key]
        if isinstance(ours, Ledger) or key in EDA_TEXTS:
            continue
        for recipe in recipes.values():
            assert agree(ours(recipe), value) and not agree(ours(recipe), other(value)), key


CHOICES = {  # another valid value, where a number, a list or a word cannot simply be changed
    "image_size": [256, 256],
    "window_size": [8, 8, 8, 8],
    "projection_type": {"part_pooling": "linear", "linear": "part_pooling"},
    "head_initialization": "bert",
    "caption_style": {"plain": "clean", "clean": "plain"},
    "itc_gradient": "exact",
    "region_features": "paper",
    "image_backend": "tensor",
    "schedule": {"step": "linear", "linear": "step"},
    "schedule_drops": "run",
    "mixed_precision": "no",
    "eval_dtype": "training",
    "eval_score_fusion": "single",
    "eda_style": "content_words",
    "eda_probability": 0.5,
    "eda_operations": ["random_swap", "random_deletion"],
    "multiplied_parts": ["match_head"],
    "data_fraction": 0.05,
    "num_warmup_steps": 0.2,
}


@pytest.mark.parametrize("name", RECIPES)
def test_every_changed_value_of_a_recipe_is_reported(name, resolve):
    recipe = yaml.safe_load(RECIPES[name].read_text())
    for key, value in recipe.items():
        changed = CHOICES.get(key)
        if isinstance(changed, dict):
            changed = changed[value]
        if changed is None:
            number = isinstance(value, (int, float)) and not isinstance(value, bool)
            changed = value / 2 + 0.01 if isinstance(value, float) else value + 1 if number else other(value)
        assert problems(PUBLISHED, resolve, {name: recipe | {key: changed}}), f"{key}: {value!r} -> {changed!r}"


def test_every_left_out_value_of_a_recipe_is_reported_or_the_default(resolve):
    """A key taken out falls back to its default, which counts like a value."""
    for name in ("sda", "rstp"):
        recipe = yaml.safe_load(RECIPES[name].read_text())
        for key in (
            "head_initialization",
            "count_dropped_batch",
            "eval_dtype",
            "mixed_precision",
            "erasing_probability",
        ):
            left = {other: value for other, value in recipe.items() if other != key}
            is_default = (name, key) == ("sda", "erasing_probability")
            assert is_default or problems(PUBLISHED, resolve, {name: left}), key


def test_stop_words_are_function_words():
    assert len(STOP_WORDS) == 127 and not STOP_WORDS & {"red", "man", "wearing", "shoes", "black"}
