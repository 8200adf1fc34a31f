"""Prints a table in the terminal, or writes it as Markdown. The first row holds the headings."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console
from rich.table import Table
from rich.text import Text


def print_table(console: Console, title: str, rows: Sequence[Sequence[str]], texts: Sequence[int] = (0,)) -> None:
    """`texts`: the columns that are set to the left; numbers are set to the right."""
    # Text and not str, in which rich would take `[x]` for markup and `:x:` for an emoji.
    table = Table()
    for number, heading in enumerate(rows[0]):
        table.add_column(Text(heading), justify="left" if number in texts else "right", overflow="fold")
    for row in rows[1:]:
        table.add_row(*map(Text, row))
    console.print(Text(title, style="italic"), soft_wrap=True)  # above the table, not in its width
    console.print(table)


def markdown(rows: Sequence[Sequence[str]]) -> str:
    lines = ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows]
    return "\n".join([lines[0], "|" + " --- |" * len(rows[0]), *lines[1:]])
