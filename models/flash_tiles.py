"""How the kernels of ``models.flash`` move along a sequence: tiles of a head's rows, and the keys that a query sees."""

from __future__ import annotations

import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)


@triton.jit
def load_tile(head_ptr, rows, T, D: tl.constexpr, BLOCK_D: tl.constexpr, WHOLE: tl.constexpr = False):
    """Rows of one head's (T, D) matrix, zero outside it. WHOLE: all rows are known to be inside."""
    dims = tl.arange(0, BLOCK_D)[None, :]
    places = head_ptr + rows[:, None] * D + dims
    if WHOLE and D == BLOCK_D:
        return tl.load(places)
    elif WHOLE:
        return tl.load(places, mask=dims < D, other=0.0)
    else:
        return tl.load(places, mask=(rows[:, None] < T) & (dims < D), other=0.0)


@triton.jit
def load_rows(head_ptr, rows, T, WHOLE: tl.constexpr = False):
    """Rows of one head's (T,) vector, zero outside it. WHOLE: as in ``load_tile``."""
    if WHOLE:
        return tl.load(head_ptr + rows)
    else:
        return tl.load(head_ptr + rows, mask=rows < T, other=0.0)


@triton.jit
def store_tile(head_ptr, tile, rows, T, D: tl.constexpr, BLOCK_D: tl.constexpr):
    dims = tl.arange(0, BLOCK_D)[None, :]
    tl.store(head_ptr + rows[:, None] * D + dims, tile, mask=(rows[:, None] < T) & (dims < D))


@triton.jit
def sees(rows, cols, T, WINDOW: tl.constexpr, ahead=None):
    """Whether a query (row) reads a key (column): itself and the WINDOW - 1 before it (WINDOW 0: all before it).

    ahead: how many keys after its own it reads too, where the mask is shifted.
    """
    seen = (cols <= rows) & (rows < T) if ahead is None else (cols <= rows + ahead) & (rows < T) & (cols < T)
    if WINDOW:
        seen = seen & (cols > rows - WINDOW)
    return seen


@triton.jit
def key_range(first_row, ROWS: tl.constexpr, COLS: tl.constexpr, T, WINDOW: tl.constexpr, ahead=None):
    """Where the key tiles of a query tile begin, become free of any mask, meet the diagonal, and end.

    ahead: as in ``sees``; the diagonal lies so much further on, and a tile that the end cuts is not free.
    """
    if ahead is None:
        stop = tl.minimum(first_row + ROWS, T)
        diagonal = first_row // COLS * COLS
    else:
        stop = tl.minimum(first_row + ROWS + ahead, T)
        diagonal = tl.minimum(first_row + 1 + ahead, T) // COLS * COLS
    start = 0
    unmasked = 0
    if WINDOW:
        start = tl.maximum(first_row - WINDOW + 1, 0) // COLS * COLS
        unmasked = tl.minimum(tl.cdiv(tl.maximum(first_row + ROWS - WINDOW, 0), COLS) * COLS, diagonal)
    return start, unmasked, diagonal, stop


@triton.jit
def query_range(first_col, ROWS: tl.constexpr, COLS: tl.constexpr, T, WINDOW: tl.constexpr, ahead=None):
    """Where the query tiles of a key tile begin, become free of any mask, meet the window's edge or the end, and end.

    ahead: as in ``sees``; the diagonal lies so much earlier, and no tile is free for keys past the end.
    """
    start = first_col // ROWS * ROWS
    stop = T
    whole_stop = T // ROWS * ROWS
    if WINDOW:
        stop = tl.minimum(stop, first_col + COLS - 1 + WINDOW)
        whole_stop = tl.minimum(whole_stop, (first_col + WINDOW) // ROWS * ROWS)
    if ahead is None:
        whole = tl.minimum(tl.cdiv(first_col + COLS - 1, ROWS) * ROWS, stop)
    else:
        start = tl.maximum(first_col - ahead, 0) // ROWS * ROWS
        whole = tl.minimum(tl.cdiv(tl.maximum(first_col + COLS - 1 - ahead, 0), ROWS) * ROWS, stop)
        whole = tl.where(first_col + COLS > T, stop, whole)
    whole_stop = tl.maximum(whole_stop, whole)
    return start, whole, whole_stop, stop
