"""mra/common/table_formats.py: tables as Markdown and LaTeX."""

from mra.common.table_formats import format_latex, format_markdown


ROWS = [["a_1 | b", "77.53"], ["[c] 50%", "-0.25 ± 1.00 [-1.50, 0.10]"]]


def test_markdown_is_aligned():
    assert format_markdown(["", "R@1"], ROWS).splitlines() == [
        "|          |                        R@1 |",
        "| -------- | -------------------------: |",
        "| a_1 \\| b |                      77.53 |",
        "| [c] 50%  | -0.25 ± 1.00 [-1.50, 0.10] |",
    ]


def test_latex_is_escaped():
    assert format_latex(["", "R@1"], ROWS).splitlines() == [
        "\\begin{tabular}{lr}",
        "\\toprule",
        " & R@1 \\\\",
        "\\midrule",
        "a\\_1 | b & 77.53 \\\\",
        "{[}c] 50\\% & $-$0.25 $\\pm$ 1.00 [$-$1.50, 0.10] \\\\",
        "\\bottomrule",
        "\\end{tabular}",
    ]
