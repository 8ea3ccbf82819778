"""Tables of text as Markdown and LaTeX."""

import re
from collections.abc import Sequence


# What LaTeX reads as something else than the character.
_LATEX = {character: f"\\{character}" for character in "&%$#_{}"} | {
    "\\": "\\textbackslash{}",
    "~": "\\textasciitilde{}",
    "^": "\\textasciicircum{}",
    "±": "$\\pm$",
}


def format_markdown(columns: Sequence[str], rows: Sequence[Sequence[str]], num_texts: int = 1) -> str:
    """Format a table as Markdown that also reads well as plain text.

    Args:
        columns: titles of the columns.
        rows: cells of each row.
        num_texts: leading columns that hold text and are aligned to the left; the others hold numbers.
    """
    cells = [[cell.replace("|", "\\|") for cell in row] for row in (columns, *rows)]
    widths = [max(3, *map(len, column)) for column in zip(*cells, strict=True)]
    rule = ["-" * width if place < num_texts else "-" * (width - 1) + ":" for place, width in enumerate(widths)]
    lines = []
    for row in (cells[0], rule, *cells[1:]):
        padded = [
            cell.ljust(width) if place < num_texts else cell.rjust(width)
            for place, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        lines.append(f"| {' | '.join(padded)} |")
    return "\n".join(lines)


def format_latex(columns: Sequence[str], rows: Sequence[Sequence[str]], num_texts: int = 1) -> str:
    """Format a table as a LaTeX `tabular` with the rules of `booktabs`; for the arguments see `format_markdown`."""

    def write(row: Sequence[str]) -> str:
        cells = ["".join(_LATEX.get(character, character) for character in cell) for cell in row]
        # A bracket after the end of a line would be an option of the line break.
        texts = [cell.replace("[", "{[}") for cell in cells[:num_texts]]
        return " & ".join([*texts, *(re.sub(r"-(?=\d)", "$-$", cell) for cell in cells[num_texts:])])

    layout = "l" * num_texts + "r" * (len(columns) - num_texts)
    body = [f"{write(row)} \\\\" for row in rows]
    lines = [f"\\begin{{tabular}}{{{layout}}}", "\\toprule", f"{write(columns)} \\\\", "\\midrule", *body]
    return "\n".join([*lines, "\\bottomrule", "\\end{tabular}"])
