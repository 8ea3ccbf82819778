"""Cards and pages from Jinja2 templates in files."""

from collections.abc import Sequence
from pathlib import Path

from huggingface_hub import CardData
from jinja2 import Environment, FileSystemLoader, StrictUndefined, select_autoescape

from mra.common.environment import describe_environment


def fill_template(path: str | Path, **values: object) -> str:
    """Fill a template; values are escaped if its name ends in `.html`.

    Args:
        path: the template file, which may include others from its folder. It can call [`markdown_table`] as `table` and
            [`describe_versions`] as `versions`.
        values: values by their names in the template.

    Raises:
        jinja2.UndefinedError: if a value of the template is missing.
    """
    path = Path(path)
    environment = Environment(
        loader=FileSystemLoader(path.parent),
        autoescape=select_autoescape(["html"]),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.globals.update(table=markdown_table, versions=describe_versions)
    return environment.get_template(path.name).render(values)


def fill_card(path: str | Path, data: CardData, **values: object) -> str:
    """Fill the template of a card for the Hub.

    Args:
        path: the template file.
        data: metadata, written as YAML before the filled template.
        values: values by their names in the template.

    Returns:
        Text of a `README.md`.
    """
    return f"---\n{data.to_yaml()}\n---\n{fill_template(path, **values)}"


def markdown_table(header: Sequence[object], rows: Sequence[Sequence[object]], text_columns: int | None = None) -> str:
    """Return a Markdown table without a final line break.

    Args:
        header: heading of each column.
        rows: cells of each row.
        text_columns: number of left-aligned columns; later ones are right-aligned. None aligns all left.
    """
    text_columns = len(header) if text_columns is None else text_columns
    rule = ["---" if column < text_columns else "---:" for column in range(len(header))]
    return "\n".join("|" + "".join(_cell(cell) for cell in row) for row in (header, rule, *rows))


def describe_versions() -> str:
    """Return one line with the versions of Python and the libraries, and the git revision."""
    environment = describe_environment()
    libraries = ", ".join(f"{library} {version}" for library, version in environment["libraries"].items())
    return f"Python {environment['python']}, {libraries}; revision {environment['git_revision'] or 'unknown'}."


def _cell(value: object) -> str:
    text = str(value).replace("|", "\\|").replace("\n", " ")
    return f" {text} |" if text else " |"
