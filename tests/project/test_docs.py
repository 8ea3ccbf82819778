"""Commands and flags that docs/reproduction.md shows are those that the scripts read."""

import argparse
import re
import shlex
from pathlib import Path

import pytest

from benchmarks import paired_runs
from data_scripts.preparation import parse_arguments as parse_preparation
from mra.common.arguments import init_fields, parse_arguments
from mra.retrieval.arguments import RetrievalArguments
from mra.training.arguments import FINETUNING, PRETRAINING, ConversionArguments


ROOT = Path(__file__).resolve().parents[2]
TEXT = (ROOT / "docs/reproduction.md").read_text()


def shown_commands() -> list[str]:
    """Lines of the bash blocks, joined where they continue, with the first set in place of a loop's variable."""
    blocks = "".join(re.findall(r"```bash\n(.*?)```", TEXT, flags=re.DOTALL)).replace("\\\n", " ")
    return [
        line.strip().replace("$set", "cuhk")
        for line in blocks.splitlines()
        if re.match(r" *(python|accelerate) ", line)
    ]


def prepare(argv):
    parser = argparse.ArgumentParser()
    if "--dataset" in argv:
        parser.add_argument("--dataset", required=True, choices=("cuhk", "icfg", "rstp"))
    return parse_preparation(parser, argv, "")


PARSERS = {
    "train_pretrain.py": lambda argv: parse_arguments(PRETRAINING, argv=argv),
    "train_finetune.py": lambda argv: parse_arguments(FINETUNING, argv=argv),
    "eval_retrieval.py": lambda argv: parse_arguments([RetrievalArguments], argv=argv),
    "convert_checkpoint.py": lambda argv: parse_arguments([ConversionArguments], argv=argv, config=False),
    "benchmarks/paired_runs.py": lambda argv: parse_arguments(
        [paired_runs.PairedRunsArguments], argv=argv, config=False
    ),
    "data_scripts.prepare_sda": prepare,
    "data_scripts.prepare_pedes": prepare,
}


@pytest.mark.parametrize("command", shown_commands())
def test_shown_command_is_read(command, monkeypatch):
    monkeypatch.chdir(ROOT)
    words = shlex.split(command, comments=True)
    script = next(word for word in words if word in PARSERS)
    config = re.search(r"--config_file (\S+)", command)
    assert config is None or Path(config[1]).is_file()
    assert PARSERS[script](words[words.index(script) + 1 :])


def test_no_pretraining_starts_from_swin_and_bert():
    command = next(command for command in shown_commands() if "--model_name_or_path none" in command)
    words = shlex.split(command)
    model = parse_arguments(FINETUNING, argv=words[words.index("train_finetune.py") + 1 :])[0]
    assert model.model_name_or_path is None and model.vision_weights.endswith("22k.pth")
    assert model.text_weights == model.tokenizer_name == "bert-base-uncased"


def test_flags_in_the_text_exist():
    themes = [*PRETRAINING, *FINETUNING, RetrievalArguments, ConversionArguments, paired_runs.PairedRunsArguments]
    known = {f"--{prefix}{item.name}" for theme in themes for item in init_fields(theme) for prefix in ("", "no_")}
    known |= {"--config"}
    shown = {flag for code in re.findall(r"`([^`\n]+)`", TEXT) for flag in re.findall(r"(?<!\S)--\w+", code)}
    assert len(shown) > 20 and shown <= known, shown - known
