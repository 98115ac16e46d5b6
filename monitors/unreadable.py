"""A step that a monitor cannot read, though it can read others."""

from __future__ import annotations


class Unreadable(ValueError):
    """Says in one line what this step has that the monitor's formulas are not about, such as a mask of padding."""
