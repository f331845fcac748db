"""Tables as text: aligned columns for the terminal, pipes for Markdown. The first row is the header."""

import io
from collections.abc import Collection, Sequence

from rich.console import Console
from rich.table import Table

Rows = Sequence[Sequence[str]]
WIDE = 10_000  # characters: a table is never wrapped, terminals do that


def text_table(rows: Rows, left: Collection[int] = (0,)) -> str:
    """Aligned lines, two spaces between the columns; columns in `left` are aligned to the left, others to the right.

    Rows may be shorter than others.
    """
    table = Table(box=None, show_header=False, pad_edge=False, padding=(0, 2, 0, 0))
    for column in range(max(map(len, rows), default=0)):
        table.add_column(justify="left" if column in left else "right", no_wrap=True)
    for row in rows:
        table.add_row(*row)
    out = io.StringIO()
    Console(file=out, width=WIDE, markup=False, emoji=False, highlight=False, color_system=None).print(table)
    return "\n".join(line.rstrip() for line in out.getvalue().splitlines())


def markdown_table(rows: Rows, left: Collection[int] = (0,)) -> str:
    """A Markdown table with the same alignment; pipes within cells are escaped."""
    rule = ["---" if column in left else "---:" for column in range(len(rows[0]))]
    cells = [[cell.replace("|", "\\|") for cell in row] for row in rows]
    return "\n".join("| " + " | ".join(row) + " |" for row in [cells[0], rule, *cells[1:]])
