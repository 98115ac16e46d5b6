"""Tables in a terminal or a pipe, without a name or a number cut off."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from rich.console import Console
from rich.table import Table

WIDEST = 10_000
"""Characters; no table needs as many."""


def needed_width(grid: Table, console: Console) -> int:
    """Characters that a table takes where nothing in it wraps."""
    return console.measure(grid, options=console.options.update(max_width=WIDEST)).maximum


def print_whole(console: Console, *forms: Callable[[], Sequence[Table]]) -> None:
    """Print tables as wide as they need. A terminal gets the first of their forms that fits, the last where none does.

    A pipe or a file has no width and gets the first. Where none fits, the terminal breaks the lines, and nothing is
    lost.
    """
    for form in forms:
        grids = form()
        needed = max(needed_width(grid, console) for grid in grids)
        if not console.is_terminal or needed <= console.width:
            break
    width = console.width
    console.width = max(width, needed)
    try:
        for grid in grids:
            console.print(grid)
    finally:
        console.width = width
