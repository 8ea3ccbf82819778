"""mra/common/cards.py: templates in files, tables, and what is escaped."""

import configparser
from pathlib import Path

import pytest
from huggingface_hub import CardData, RepoCard
from jinja2 import UndefinedError

from mra.common.cards import describe_versions, fill_card, fill_template, markdown_table


ROOT = Path(__file__).resolve().parents[2]


def test_card_has_metadata_and_values(tmp_path):
    (tmp_path / "part.md").write_text("# {{ name }}\n{% block body %}{% endblock %}\n")
    (tmp_path / "card.md").write_text(
        '{% extends "part.md" %}\n{% block body %}\n{{ table(["a", ""], [[1, 2]]) }}\n{{ versions() }}\n{% endblock %}\n'
    )
    text = fill_card(tmp_path / "card.md", CardData(license="mit"), name="<me> & you")
    assert text == (
        f"---\nlicense: mit\n---\n# <me> & you\n| a | |\n| --- | --- |\n| 1 | 2 |\n{describe_versions()}\n"
    )
    assert RepoCard(text).data.license == "mit"


def test_html_is_escaped_and_missing_values_are_errors(tmp_path):
    (tmp_path / "page.html").write_text("<p>{{ text }}</p>")
    assert fill_template(tmp_path / "page.html", text="a < b") == "<p>a &lt; b</p>"
    with pytest.raises(UndefinedError, match="'text' is undefined"):
        fill_template(tmp_path / "page.html")


def test_tables():
    assert markdown_table(["a", "n"], [["p|q\nr", 1], ["", 2.5]], text_columns=1) == (
        "| a | n |\n| --- | ---: |\n| p\\|q r | 1 |\n| | 2.5 |"
    )


def test_every_template_is_installed():
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    data = {name: value.split(", ") for name, value in setup["options.package_data"].items()}
    templates = [path for name in data for path in (ROOT / name).rglob("templates/*")]
    assert len(templates) >= 7
    for path in templates:
        package, *parts = path.relative_to(ROOT).parts
        assert any(Path(*parts).match(pattern) for pattern in data[package]), path
