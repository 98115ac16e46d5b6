"""A few rows of the batch, taken in turn, where looking at all of them would cost too much."""

from __future__ import annotations


def check_rows(rows: int) -> int:
    """``rows``, or ValueError where it is no number of rows."""
    if rows < 0:
        raise ValueError(f"monitor.rows={rows} is not allowed: a number of batch rows, or 0 for all")
    return rows


def in_turn(rows: int, reading: int, available: int) -> slice:
    """The rows of the batch for the given reading, 0 for all; the last of the batch may be fewer, never none."""
    if not 0 < rows < available:
        return slice(None)
    first = reading * rows % available
    return slice(first, first + rows)
