"""Which rows or tokens of a batch a monitor looks at, where looking at all of them would cost too much."""

from __future__ import annotations


class RowsInTurn:
    """``rows`` rows of the batch, the next ones at each reading; 0 for all.

    The choice depends on the step alone, so that a resumed run looks at the same rows. Raises ValueError for
    a negative number.
    """

    def __init__(self, rows: int, every_steps: int) -> None:
        if rows < 0:
            raise ValueError(f"monitor.rows={rows} is not allowed: a number of batch rows, or 0 for all")
        self.rows, self.every_steps = rows, every_steps

    def at(self, step: int, available: int) -> slice:
        """The rows of a batch of ``available`` rows at this step: at least one of them."""
        if not 0 < self.rows < available:
            return slice(None)
        first = step // self.every_steps * self.rows % available
        return slice(first, first + self.rows)


class TokensInTurn:
    """Every ``stride``-th token of the batch, from the next one at each reading; 1 for all.

    The choice depends on the step alone. Raises ValueError for a stride below 1.
    """

    def __init__(self, stride: int, every_steps: int) -> None:
        if stride < 1:
            raise ValueError(f"monitor.token_stride={stride} is not allowed: at least 1, which takes every token")
        self.stride, self.every_steps = stride, every_steps

    def at(self, step: int, available: int) -> slice:
        """The tokens of a batch of ``available`` at this step: at least one of them."""
        stride = min(self.stride, available)
        return slice(step // self.every_steps % stride, None, stride)
