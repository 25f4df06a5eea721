"""The style of every table in the terminal."""

from rich.table import Table


def table(*columns: str) -> Table:
    """An empty table. The first column is left-aligned for words, the others right-aligned."""
    made = Table()
    for number, column in enumerate(columns):
        made.add_column(column, justify="right" if number else "left")
    return made
