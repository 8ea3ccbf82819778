"""Commands, options, paths and names in the documentation exist; links, site and constraints hold."""

import ast
import configparser
import dataclasses
import importlib
import importlib.util
import re
import shlex
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement

from data_scripts.dad.config import SECTIONS
from mra.cli import VERBS
from mra.common.arguments import init_fields, parse_arguments
from mra.training.arguments import FINETUNING, PRETRAINING
from mra.web.arguments import PageArguments


ROOT = Path(__file__).resolve().parents[2]
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), ROOT / "benchmarks/README.md"])
SHELL = sorted((ROOT / "recipes").rglob("*.sh"))
MODULES = {path.name for top in ("mra", "data_scripts", "benchmarks", "tests") for path in (ROOT / top).rglob("*.py")}
MODULES |= {path.name for path in ROOT.glob("*.py")}
EVERY_PAGE = pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))


def read(path: Path | str) -> str:
    return (ROOT / path).read_text(encoding="utf-8")


def blocks(text: str, language: str) -> list[str]:
    """The fenced blocks of a language, without what indents the whole block."""
    return re.findall(rf"^```{language}\n(.*?)^```", text, flags=re.DOTALL | re.MULTILINE)


def inline_code(text: str) -> list[str]:
    """The code spans outside of blocks; a span may go on in the next line."""
    prose = re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE)
    return re.findall(r"`([^`\n]+)`", re.sub(r"(?<!\n)\n(?![\n|])", " ", prose))


# ---------------------------------------------------------------- commands


class ReadError(Exception):
    """Ends a `main` once it has read its command line."""


def shown_commands(path: Path) -> list[str]:
    """Lines of bash that run this project, joined where they continue, with variables and the first set filled in."""
    text = read(path)
    lines = text if path.suffix == ".sh" else "".join(blocks(text, "bash"))
    lines = re.sub(r"^srun bash -c '(.*)'", r"\1", lines.replace("\\\n", " ").replace("$set", "cuhk"), flags=re.M)
    for name, value in re.findall(r'^([A-Z]+)="(.*)"', lines, re.M):
        lines = lines.replace(f"${name} ", f"{value} ")
    return [line.strip() for line in lines.splitlines() if is_ours(line)]


def is_ours(line: str) -> bool:
    try:
        return find_target(shlex.split(line, comments=True)) is not None
    except ValueError:  # a quotation that goes on, in a script
        return False


def find_target(words: list[str]) -> tuple[str, list[str]] | None:
    """The module that a command runs, or `mra`, with the words after it."""
    words = words[1:] if words[:1] == ["step"] else words
    if words[:1] == ["mra"]:
        return "mra", words[1:]
    if not words or (not {"python", "accelerate"} & set(words) and not words[0].endswith(".py")):
        return None
    for index, word in enumerate(words):
        module = words[index + 1] if word == "-m" else word.removesuffix(".py").replace("/", ".")
        if (word == "-m" or word.endswith(".py")) and not module.startswith("tests."):
            is_file = (ROOT / f"{module.replace('.', '/')}.py").is_file()
            return (module, words[index + 1 + (word == "-m") :]) if is_file else None
    return None


def read_command(module: str, words: list[str], patch: pytest.MonkeyPatch) -> None:
    """Let a module read its command line; `SystemExit` where it refuses it."""

    def stop(*args, **kwargs):
        raise ReadError(parse_arguments(*args, **kwargs))

    if module == "mra":
        name = " ".join(words[:2]) if " ".join(words[:2]) in VERBS else words[0]
        verb = VERBS[name]
        parse_arguments(verb.themes, argv=words[len(name.split()) :], config=getattr(verb, "config", False))
        return
    reader = importlib.import_module("mra.web.server" if module == "app" else module)
    for owner in (reader, importlib.import_module("data_scripts.dad.command")):
        if hasattr(owner, "parse_arguments"):
            patch.setattr(owner, "parse_arguments", stop)
    with pytest.raises(ReadError):
        reader.main(words)


@pytest.mark.parametrize("path", [*PAGES, *SHELL], ids=lambda path: str(path.relative_to(ROOT)))
def test_shown_commands_are_read(path, monkeypatch):
    monkeypatch.chdir(ROOT)
    for command in shown_commands(path):
        words = shlex.split(re.sub(r" \.\.\.\s*(#.*)?$", "", command), comments=True)
        configs = [words[index + 1] for index, word in enumerate(words) if word == "--config_file"]
        assert all(Path(config).is_file() for config in configs), command
        with monkeypatch.context() as patch:
            try:
                read_command(*find_target(words), patch)
            except SystemExit as error:
                pytest.fail(f"{command}: {error}")


def test_commands_are_found():
    found = {find_target(shlex.split(c, comments=True))[0] for path in [*PAGES, *SHELL] for c in shown_commands(path)}
    assert {"mra", "train_pretrain", "train_finetune", "eval_retrieval", "app", "data_scripts.make_sample"} < found
    assert {"data_scripts.dad.run", "data_scripts.dad.generate", "benchmarks.paired_runs"} < found


def test_no_pretraining_starts_from_swin_and_bert():
    commands = shown_commands(ROOT / "docs/reproduction.md")
    _, words = find_target(shlex.split(next(c for c in commands if "--model_name_or_path none" in c)))
    model = parse_arguments(FINETUNING, argv=words)[0]
    assert model.model_name_or_path is None and model.vision_weights.endswith("22k.pth")
    assert model.text_weights == model.tokenizer_name == "bert-base-uncased"


# ---------------------------------------------------------------- options, targets, paths, names

# Of accelerate, of the published repository, of argparse; a placeholder; two that show a mistake.
FOREIGN = {
    "--cpu",
    "--num_processes",
    "--mixed_precision",
    "--multi_gpu",
    "--dist",
    "--help",
    "--section.key",
    "--config",
}


def known_options() -> set[str]:
    names = [
        "data_scripts.make_sample",
        *(f"benchmarks.{path.stem}" for path in (ROOT / "benchmarks").glob("[a-z]*.py")),
    ]
    modules = [importlib.import_module(name) for name in names]
    own = [t for m in modules for t in vars(m).values() if dataclasses.is_dataclass(t) and isinstance(t, type)]
    themes = [*PRETRAINING, *FINETUNING, PageArguments, *own, *(t for verb in VERBS.values() for t in verb.themes)]
    known = {f"--{prefix}{item.name}" for theme in themes for item in init_fields(theme) for prefix in ("", "no_")}
    aliases = {item.metadata.get("name") for theme in themes for item in init_fields(theme)} - {None}
    return known | {f"--{name}" for name in aliases} | {f"--{name}" for name in factory_keys()}


def factory_keys() -> set[str]:
    return {f"{section}.{item.name}" for section, theme in SECTIONS.items() for item in init_fields(theme)}


def test_options_in_the_text_exist():
    shown = {
        (page.name, flag.rstrip("."))
        for page in PAGES
        for code in inline_code(read(page))
        if not code.startswith(("pip ", "hf ", "tests/"))
        for flag in re.findall(r"(?<!\S)--[a-z][\w.]*", code)
    }
    known = known_options() | FOREIGN
    assert len(shown) > 150 and {(page, flag) for page, flag in shown if flag not in known} == set()


def test_keys_of_the_factory_exist():
    sections = "|".join(SECTIONS)
    keys = {code for code in inline_code(read("docs/dad.md")) if re.fullmatch(rf"({sections})\.(?!py$|md$)\w+", code)}
    assert len(keys) > 10 and keys <= factory_keys(), keys - factory_keys()


@EVERY_PAGE
def test_make_targets_exist(page):
    targets = set(re.findall(r"^([a-z-]+):", read("Makefile"), re.M))
    code = [*inline_code(read(page)), *"".join(blocks(read(page), "bash")).splitlines()]
    shown = {target for line in code for target in re.findall(r"^make (?:[A-Z]+=\S+ )?([a-z][a-z-]*)", line.strip())}
    assert shown <= targets, shown - targets


@EVERY_PAGE
def test_paths_in_the_text_exist(page):
    tops = "mra|tests|data_scripts|recipes|accelerate_configs|benchmarks|docs|metrics"
    for code in inline_code(read(page)):
        path = code.split(" ")[0]
        if re.fullmatch(rf"({tops})/[\w./*-]*", path) and "..." not in path:
            assert list(ROOT.glob(path.rstrip("/"))), path
        elif re.fullmatch(r"\w+\.py", path):
            assert path in MODULES, path


@EVERY_PAGE
def test_modules_in_the_text_exist(page):
    for code in inline_code(read(page)):
        if re.fullmatch(r"(mra|data_scripts|benchmarks)(\.\w+)+", code):
            module, _, name = code.rpartition(".")
            try:
                found = importlib.util.find_spec(code) is not None
            except ModuleNotFoundError:  # its last part is a name in a module
                found = False
            assert found or name in dir(importlib.import_module(module)), code


@EVERY_PAGE
def test_python_blocks_import_what_exists(page):
    for block in blocks(read(page), "python"):
        for node in ast.walk(ast.parse(block)):
            if isinstance(node, ast.ImportFrom) and node.module.split(".")[0] in ("mra", "data_scripts"):
                assert {alias.name for alias in node.names} <= set(dir(importlib.import_module(node.module))), block


def defined_tests(path: Path) -> list[str]:
    return re.findall(r"^def (test_\w+)", path.read_text(encoding="utf-8"), re.M)


def test_tests_in_the_text_exist():
    shown = {name for page in PAGES for name in inline_code(read(page)) if re.fullmatch(r"test_\w+", name)}
    defined = {name for path in (ROOT / "tests").rglob("test_*.py") for name in defined_tests(path)}
    assert shown and shown <= defined, shown - defined


def test_faults_are_shown_by_tests():
    shown = re.findall(r"`(tests/\S+\.py)(?: -m faults)? -k (?:\"([^\"]+)\"|(\w+))`", read("docs/faults.md"))
    rows = [line for line in read("docs/faults.md").splitlines() if line.startswith("| ") and "---" not in line]
    assert len(shown) > 60 and all("`tests/" in row for row in rows if not row.endswith("| test |"))
    for path, several, one in shown:
        tests = defined_tests(ROOT / path)
        for part in (several or one).split(" or "):
            assert any(part in test for test in tests), f"{path} has no test for -k {part}"


def test_line_counts_of_the_reading_list():
    rows = re.findall(r"^\| \d \| `(\S+)` \| ([\d,]+) \|", read("docs/architecture.md"), re.M)
    total = re.search(r"^\| \| sum \| ([\d,]+) \|", read("docs/architecture.md"), re.M)[1]
    counts = {path: int(count.replace(",", "")) for path, count in rows}
    assert len(counts) > 4 and sum(counts.values()) == int(total.replace(",", ""))
    for path, count in counts.items():
        assert abs(len(read(path).splitlines()) - count) <= 0.2 * count, path


# ---------------------------------------------------------------- links and site


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


@EVERY_PAGE
def test_links_lead_somewhere(page):
    for target, anchor in re.findall(r"\]\((?!https?:)([^)#\s]*)#?([^)\s]*)\)", read(page)):
        file = page.parent / target if target else page
        assert file.exists(), target
        assert not anchor or anchor in list_anchors(file), f"{target}#{anchor}"


def test_the_site_shows_every_page():
    pages = list_pages(yaml.safe_load(read("mkdocs.yml"))["nav"])
    docs = {str(page.relative_to(ROOT / "docs")) for page in PAGES if page.is_relative_to(ROOT / "docs")}
    assert sorted(pages) == sorted({*docs, "index.md", "CONTRIBUTING.md", "SECURITY.md", "CHANGELOG.md"})
    linked = {"README.md", *re.findall(r"[\w-]+\.md", read("README.md"))}
    assert {page.name for page in PAGES if "api" not in page.parts} <= linked


@pytest.mark.parametrize("page", sorted((ROOT / "docs/api").glob("*.md")), ids=lambda page: page.stem)
def test_api_pages_name_modules(page):
    modules = re.findall(r"^::: (\S+)", page.read_text(), re.M)
    assert modules and [name for name in modules if importlib.util.find_spec(name) is None] == []


# ---------------------------------------------------------------- versions


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
