"""When a reading is due: the steps at which the signals of a trace are read. No torch.

A fault may act at every p-th step alone (``faults.base.Window``). Readings at multiples of 10 would never meet one that
acts at steps 5, 15, 25 ... So monitors that read single steps (laws, recomputation, statistics of gradients,
activations and weights) read at *jittered* steps: reading k at step 10 k + j_k, where j is one constant of the trace
schema. Every phase of every period up to 30 is met within any 60 readings in a row, which are 600 steps. A cadence of
10 m takes every m-th of them, and a longer cadence may meet fewer phases: of the 25 phases of period 25 a cadence of 20
never meets 5, of 30 eleven, of 50 fifteen. A fault that acts so rarely is looked for at cadence 10. A cadence of 1
takes every step, and any other cadence, such as 3, its multiples. Increments over a window and held-out evaluations
stay at multiples of their cadence: an increment holds every step of its window.

    cadence 10, jittered:        11, 26, 37, 41, 57, 69, 71, 89, 97, 104, ...
    cadence 10, not jittered:    10, 20, 30, 40, 50, 60, 70, 80, 90, 100, ...
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import count
from math import lcm

GRID_STEPS = 10
"""Steps from one reading to the next, but for jitter."""

# fmt: off
JITTER_STEPS = (
    0, 1, 6, 7, 1, 7, 9, 1, 9, 7, 4, 1, 9, 0, 1, 9, 5, 4, 9, 7,
    0, 4, 9, 5, 7, 4, 8, 1, 8, 6, 8, 7, 8, 8, 8, 3, 2, 8, 7, 3,
    2, 8, 7, 2, 2, 6, 2, 2, 4, 3, 5, 8, 6, 8, 5, 1, 3, 5, 6, 3,
)
# fmt: on
"""j_0 to j_59, repeated. No formula gave them: simulated annealing redrew or swapped digits until no phase of a period
up to 30 waited for more than 60 readings, and every m-th reading, m from 2 to 5, met every last digit of a step within
600 steps. j_0 = 0, so that cadences that divide 600 meet at its multiples; reading 0, before any update, is none.

In the observation id of every monitor that it moves: with other digits those are read again."""


@dataclass(frozen=True, order=True)
class Cadence:
    """How often a signal is read: every ``every_steps``, at jittered steps where that is a multiple of 10."""

    every_steps: int
    jittered: bool = False

    @property
    def moves(self) -> bool:
        """Whether it is read at other steps than the multiples of ``every_steps``."""
        return self.jittered and self.every_steps % GRID_STEPS == 0

    def is_due(self, step: int) -> bool:
        """Whether there is a reading after ``step`` updates, 1 or more."""
        jitter = JITTER_STEPS[step // GRID_STEPS % len(JITTER_STEPS)] if self.moves else 0
        return (step - jitter) % self.every_steps == 0

    def next_after(self, step: int) -> int:
        """The first step after this one that has a reading."""
        return next(later for later in count(step + 1) if self.is_due(later))

    def thinned(self, every_steps: int) -> Cadence:
        """The cadence of those of its readings that one of ``every_steps`` has too.

        Readings of single steps that are there at every step are thinned to jittered ones.
        """
        moves = self.moves or (self.jittered and self.every_steps == 1)
        return Cadence(lcm(self.every_steps, every_steps) if moves else every_steps, moves)


def period(cadences: Iterable[Cadence]) -> int:
    """Steps after which the same cadences are due again; all of them are due at its multiples."""
    cadences = list(cadences)
    jitter = GRID_STEPS * len(JITTER_STEPS) if any(cadence.moves for cadence in cadences) else 1
    return lcm(jitter, *(cadence.every_steps for cadence in cadences))


def is_due(step: int, every_steps: int) -> bool:
    """Whether something of the training is due, an evaluation, a checkpoint, a checksum: at multiples."""
    return step % every_steps == 0
