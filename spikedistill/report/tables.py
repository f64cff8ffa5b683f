"""Tables of text, for the terminal, Markdown and CSV."""

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Table:
    """heads: column titles.  rows: cells as text, the first of each row is its name."""

    heads: Sequence[str]
    rows: Sequence[Sequence[str]]
    title: str = ""


def show(table: Table) -> None:
    """Print to the terminal; numbers are aligned to the right."""
    from rich import box
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table as Rich

    drawn = Rich(title=escape(table.title), title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    for i, head in enumerate(table.heads):
        drawn.add_column(head, justify="right" if i else "left")
    for row in table.rows:
        drawn.add_row(*map(escape, row))
    Console().print(drawn)


def markdown(table: Table) -> str:
    lines = [f"**{table.title}**\n"] if table.title else []
    lines += ["| " + " | ".join(table.heads) + " |", "|---|" + "---:|" * (len(table.heads) - 1)]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in table.rows)]) + "\n"
