"""When readings are due: jittered ones meet every phase of every period, and the training's own stay at multiples."""

import math
from itertools import islice

import pytest

from foreshock.monitors.cadence import GRID_STEPS, JITTER_STEPS, Cadence, is_due, period

PERIODS = range(1, 31)
IN_A_ROW = 60
"""Readings, which are 600 steps."""


def readings(cadence: Cadence, count: int) -> list[int]:
    steps = [0]
    while len(steps) <= count:
        steps.append(cadence.next_after(steps[-1]))
    return steps[1:]


@pytest.mark.parametrize("p", PERIODS)
def test_any_60_readings_in_a_row_meet_every_phase_of_a_period(p):
    """From every start: the phases of the readings repeat after as many of them as lcm(60, p)."""
    starts = math.lcm(len(JITTER_STEPS), p)
    met = [step % p for step in readings(Cadence(10, jittered=True), starts + IN_A_ROW)]
    for start in range(starts):
        assert set(met[start : start + IN_A_ROW]) == set(range(p)), f"start {start}"


def test_60_readings_in_a_row_span_600_steps():
    steps = readings(Cadence(10, jittered=True), 4 * IN_A_ROW)
    assert all(later - step == 600 for step, later in zip(steps, steps[IN_A_ROW:], strict=False))


def test_multiples_of_10_never_meet_most_phases():
    """What the jitter is for."""
    assert {step % 10 for step in readings(Cadence(10), 600)} == {0}
    assert {step % 20 for step in readings(Cadence(10), 600)} == {0, 10}


def test_reading_k_is_at_10_k_and_its_jitter_which_is_one_digit():
    assert len(JITTER_STEPS) == IN_A_ROW and set(JITTER_STEPS) == set(range(GRID_STEPS)) and JITTER_STEPS[0] == 0
    steps = readings(Cadence(10, jittered=True), 150)
    assert steps == [10 * k + JITTER_STEPS[k % 60] for k in range(1, 151)]
    assert steps[:4] == [11, 26, 37, 41] and steps[59:61] == [600, 611]


@pytest.mark.parametrize("m", [2, 3, 5, 50])
def test_a_cadence_of_10_m_takes_every_mth_reading(m):
    assert readings(Cadence(10 * m, jittered=True), 9) == readings(Cadence(10, jittered=True), 9 * m)[m - 1 :: m]


@pytest.mark.parametrize("m", range(2, 6))
def test_slower_cadences_meet_every_last_digit_within_600_steps(m):
    steps = readings(Cadence(10 * m, jittered=True), 60 // m)
    assert {step % 10 for step in steps} == set(range(10)) and steps[-1] == 600


@pytest.mark.parametrize(("every", "never"), [(10, 0), (20, 5), (30, 11), (50, 15), (70, 0)])
def test_how_many_of_25_phases_a_cadence_never_meets(every, never):
    """Its readings repeat after a period; against 25 phases after as many of them as lcm."""
    cadence = Cadence(every, jittered=True)
    steps = math.lcm(period([cadence]), 25)
    assert len({step % 25 for step in readings(cadence, steps // every)}) == 25 - never


@pytest.mark.parametrize("every", [1, 2, 3, 5, 7, 15, 25])
def test_any_other_cadence_is_at_multiples(every):
    assert readings(Cadence(every, jittered=True), 20) == list(range(every, 20 * every + 1, every))
    assert not Cadence(every, jittered=True).moves


@pytest.mark.parametrize("every", [1, 3, 10, 50])
def test_what_is_not_jittered_is_at_multiples_as_the_training_is(every):
    steps = range(1, 700)
    assert [s for s in steps if Cadence(every).is_due(s)] == [s for s in steps if is_due(s, every)]
    assert next(s for s in steps if is_due(s, every)) == every


@pytest.mark.parametrize("own", [1, 2, 3, 10, 20, 30])
@pytest.mark.parametrize("other", [1, 3, 5, 10, 20])
@pytest.mark.parametrize("jittered", [False, True])
def test_a_thinned_cadence_is_read_where_both_are(own, other, jittered):
    cadence = Cadence(own, jittered)
    thinned = [step for step in range(1, 2000) if cadence.is_due(step) and cadence.thinned(other).is_due(step)]
    if jittered and (own == 1 or cadence.moves):
        assert thinned == list(islice(readings(Cadence(math.lcm(own, other), True), 2000), len(thinned)))
    else:
        assert thinned == [step for step in range(1, 2000) if step % own == 0 and step % other == 0]
    assert thinned


def test_all_cadences_are_due_together_after_a_period():
    cadences = [Cadence(10, True), Cadence(50, True), Cadence(7), Cadence(1, True)]
    together = period(cadences)
    assert together == math.lcm(600, 50, 7)
    for cadence in cadences:
        assert cadence.is_due(together)
        assert all(cadence.is_due(step) == cadence.is_due(step + together) for step in range(1, 700))
    assert period([Cadence(10), Cadence(4, True)]) == 20
