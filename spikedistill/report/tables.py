"""Tables of text, for the terminal, Markdown, CSV and LaTeX."""

import csv as writer
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from io import StringIO
from typing import Any


@dataclass(frozen=True)
class Table:
    """heads: column titles.  rows: cells as text, the first of each row is its name."""

    heads: Sequence[str]
    rows: Sequence[Sequence[str]]
    title: str = ""


def show(table: Table) -> None:
    """Print to the terminal; numbers are aligned to the right."""
    from rich import box
    from rich.markup import escape
    from rich.table import Table as Rich

    drawn = Rich(title=escape(table.title), title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    drawn.padding = (0, 0, 0, 1)
    for i, head in enumerate(table.heads):
        cells = [head, *(row[i] for row in table.rows)]
        words = [word for text in cells for word in text.split()] if i else cells
        longest = max(map(len, words), default=1)  # a word is never cut, a row's name never broken
        drawn.add_column(head, justify="right" if i else "left", min_width=longest)
    for row in table.rows:
        drawn.add_row(*map(escape, row))
    console().print(drawn)


def console() -> Any:
    """rich's, as wide as the terminal; a file or pipe is as wide as its longest line."""
    from rich.console import Console

    return Console(width=None if sys.stdout.isatty() else 1000)


def markdown(table: Table) -> str:
    lines = [f"**{table.title}**\n"] if table.title else []
    lines += ["| " + " | ".join(table.heads) + " |", "|---|" + "---:|" * (len(table.heads) - 1)]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in table.rows)]) + "\n"


def csv(table: Table) -> str:
    text = StringIO()
    writer.writer(text, lineterminator="\n").writerows([table.heads, *table.rows])
    return text.getvalue()


def latex(table: Table) -> str:
    """A `tabular` for the package booktabs."""
    lines = [f"% {table.title}"] if table.title else []
    lines += [
        rf"\begin{{tabular}}{{l{'r' * (len(table.heads) - 1)}}}",
        r"\toprule",
        _latex_row(table.heads),
        r"\midrule",
    ]
    return "\n".join([*lines, *map(_latex_row, table.rows), r"\bottomrule", r"\end{tabular}"]) + "\n"


LATEX = {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "±": r"$\pm$", "−": "$-$"}
LATEX |= {"Δ": r"$\Delta$", "…": r"\ldots{}", "–": "--"} | {letter: "\\" + letter for letter in "&%$#_{}"}


def _latex_row(cells: Sequence[str]) -> str:
    return " & ".join("".join(LATEX.get(letter, letter) for letter in cell) for cell in cells) + r" \\"
