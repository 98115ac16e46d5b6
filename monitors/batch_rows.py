"""A few rows or tokens of the batch, taken in turn: for laws that each of them obeys by itself."""

from __future__ import annotations


def check_rows(rows: int) -> int:
    """``rows``, or ValueError where it is no number of rows."""
    if rows < 0:
        raise ValueError(f"monitor.rows={rows} is not allowed: a number of batch rows, or 0 for all")
    return rows


def in_turn(rows: int, reading: int, available: int) -> slice:
    """The rows of the batch for the given reading, 0 for all; the last of the batch may be fewer."""
    if not 0 < rows < available:
        return slice(None)
    first = reading * rows % available
    return slice(first, first + rows)


def check_stride(stride: int) -> int:
    """``stride``, or ValueError where it is none."""
    if stride < 1:
        raise ValueError(f"monitor.token_stride={stride} is not allowed: at least 1, which takes every token")
    return stride


def every(stride: int, reading: int, available: int) -> slice:
    """Every ``stride``-th token for the given reading, from another one each time; never none."""
    stride = min(stride, available)
    return slice(reading % stride, None, stride)
