"""Commands and flags of the documentation are those that the code reads; links, site and constraints hold."""

import configparser
import importlib.util
import re
import shlex
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement

from benchmarks import paired_runs
from mra.cli import VERBS
from mra.common.arguments import init_fields, parse_arguments
from mra.retrieval.arguments import RetrievalArguments
from mra.training.arguments import FINETUNING, PRETRAINING, ConversionArguments


ROOT = Path(__file__).resolve().parents[2]
TEXT = (ROOT / "docs/reproduction.md").read_text()
PAGES = sorted([ROOT / "README.md", *(ROOT / "docs").glob("*.md"), *(ROOT / "recipes").rglob("*.sh")])


def bash_lines(text: str) -> list[str]:
    """Lines of the bash blocks, joined where they continue, with the first set in place of a loop's variable."""
    blocks = "".join(re.findall(r"```bash\n(.*?)```", text, flags=re.DOTALL)).replace("\\\n", " ")
    return [line.strip().replace("$set", "cuhk") for line in blocks.splitlines()]


def shown_commands() -> list[str]:
    """Commands of docs/reproduction.md."""
    return [line for line in bash_lines(TEXT) if re.match(r"(python|accelerate|mra) ", line)]


def shown_verbs() -> list[str]:
    """`mra` commands of the pages and of the demos."""
    lines = []
    for path in PAGES:
        text = path.read_text(encoding="utf-8")
        text = text if path.suffix == ".md" else f"```bash\n{text}```"
        lines += [line for line in bash_lines(text) if re.match(r"(step )?mra ", line)]
    return lines


def read_verb(words: list[str]):
    """Read the words after `mra`."""
    name = " ".join(words[:2]) if " ".join(words[:2]) in VERBS else words[0]
    verb = VERBS[name]
    return parse_arguments(verb.themes, argv=words[len(name.split()) :], config=getattr(verb, "config", False))


PARSERS = {
    "mra": read_verb,
    "train_pretrain.py": lambda argv: parse_arguments(PRETRAINING, argv=argv),
    "train_finetune.py": lambda argv: parse_arguments(FINETUNING, argv=argv),
    "eval_retrieval.py": lambda argv: parse_arguments([RetrievalArguments], argv=argv),
    "benchmarks/paired_runs.py": lambda argv: parse_arguments(
        [paired_runs.PairedRunsArguments], argv=argv, config=False
    ),
}


@pytest.mark.parametrize("command", shown_commands())
def test_shown_command_is_read(command, monkeypatch):
    monkeypatch.chdir(ROOT)
    words = shlex.split(command, comments=True)
    script = next(word for word in words if word in PARSERS)
    config = re.search(r"--config_file (\S+)", command)
    assert config is None or Path(config[1]).is_file()
    assert PARSERS[script](words[words.index(script) + 1 :])


def test_shown_verbs_are_read():
    commands = shown_verbs()
    assert len(commands) > 30
    for command in commands:
        words = shlex.split(command.removeprefix("step "), comments=True)
        assert read_verb(words[1:]), command


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


PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])


def list_pages(navigation) -> list[str]:
    """Return the pages of a `nav` of mkdocs.yml."""
    if isinstance(navigation, str):
        return [navigation]
    parts = navigation.values() if isinstance(navigation, dict) else navigation
    return [page for part in parts for page in list_pages(part)]


def list_anchors(page: Path) -> set[str]:
    """Return the anchors that GitHub and mkdocs give to the headings of a page."""
    text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    return {
        re.sub(r"[^\w\- ]", "", title.lower()).strip().replace(" ", "-")
        for title in re.findall(r"^#+ (.*)", text, re.M)
    }


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page):
    for target, anchor in re.findall(r"\]\((?!https?:)([^)#\s]*)#?([^)\s]*)\)", page.read_text(encoding="utf-8")):
        file = page.parent / target if target else page
        assert file.exists(), target
        assert not anchor or anchor in list_anchors(file), f"{target}#{anchor}"


def test_the_site_shows_every_page():
    pages = list_pages(yaml.safe_load((ROOT / "mkdocs.yml").read_text())["nav"])
    docs = {str(page.relative_to(ROOT / "docs")) for page in PAGES if page.is_relative_to(ROOT / "docs")}
    assert sorted(pages) == sorted({*docs, "index.md", "CONTRIBUTING.md", "SECURITY.md", "CHANGELOG.md"})
    linked = {"README.md", *re.findall(r"[\w-]+\.md", (ROOT / "README.md").read_text())}
    assert {page.name for page in PAGES if "api" not in page.parts} <= linked


@pytest.mark.parametrize("page", sorted((ROOT / "docs/api").glob("*.md")), ids=lambda page: page.stem)
def test_api_pages_name_modules(page):
    modules = re.findall(r"^::: (\S+)", page.read_text(), re.M)
    assert modules and [name for name in modules if importlib.util.find_spec(name) is None] == []


def test_constraints_are_within_the_bounds():
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    lines = [setup["options"]["install_requires"], *setup["options.extras_require"].values()]
    required = [Requirement(line) for line in "\n".join(lines).split("\n") if line]
    bounds = {r.name.lower(): r for r in required if r.marker is None or r.marker.evaluate({"extra": ""})}
    text = "\n".join(line.split("#")[0] for line in (ROOT / "constraints.txt").read_text().splitlines())
    pinned = [Requirement(line) for line in text.split("\n") if line.strip()]
    for requirement in pinned:
        (version,) = requirement.specifier
        assert version.operator == "==" and version.version in bounds[requirement.name.lower()].specifier
    assert {"torch", "transformers", "timm", "numpy"} < {requirement.name for requirement in pinned}
