"""The form of every table in the terminal."""

from rich.table import Table


def table(*columns: str) -> Table:
    """An empty table: the first column aligned left for words, the others right for numbers."""
    made = Table()
    for number, column in enumerate(columns):
        made.add_column(column, justify="right" if number else "left")
    return made
