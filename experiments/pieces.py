"""Training in pieces of ``train.piece_s`` seconds, for machines that are lent for a short time."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

UNFINISHED_CODE = 75
"""Exit code of a command that left off on purpose: EX_TEMPFAIL of sysexits.h, which invites to try again."""

Job = TypeVar("Job")


class Unfinished(Exception):
    """Work is left, and nothing is wrong: the same command goes on."""


def in_pieces(
    jobs: Sequence[Job], at_once: int, piece_s: float, launch: Callable[[Sequence[Job], float], list[Any]]
) -> list[Any]:
    """Launch the jobs, so many at once, until ``piece_s`` seconds are over; what the launched ones returned, in order.

    launch: takes jobs and the seconds that are left for them. Jobs whose turn does not come are not launched.
    """
    started, results = time.monotonic(), []
    for first in range(0, len(jobs), at_once):
        left_s = piece_s - (time.monotonic() - started)
        if left_s <= 0:
            break
        results += launch(jobs[first : first + at_once], left_s)
    return results
