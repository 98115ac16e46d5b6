"""Signals on a common axis: what each grid position knows, and what it must not."""

import numpy as np
import pytest

from foreshock.analysis.runs.align import Aligned, hold, positions, thin
from foreshock.experiments.trace import Series
from foreshock.monitors.cadence import Cadence


def series(steps, tokens, values, undefined=None) -> Series:
    values = np.asarray(values, float).reshape(len(steps), 1, 1)
    undefined = np.zeros(values.shape, bool) if undefined is None else np.asarray(undefined).reshape(values.shape)
    return Series(np.array(steps), np.array(tokens), values, undefined)


def test_samples_on_the_grid_stay_as_they_are():
    one = series([10, 20, 30], [100, 200, 300], [1.0, np.inf, 3.0], [False, True, False])
    for axis, grid in (("steps", one.steps), ("tokens", one.tokens)):
        held = hold(one, axis, grid)
        assert np.array_equal(held.positions, grid)
        assert np.array_equal(held.values, one.values)
        assert np.array_equal(held.undefined, one.undefined)


def test_what_broke_once_stays_broken_even_where_every_sample_is_kept():
    one = series([10, 20, 30], [100, 200, 300], [1.0, np.nan, 3.0])
    assert hold(one, "steps", one.steps).values.ravel().tolist() == [1.0, np.inf, np.inf]
    assert thin(one, Cadence(10)).values.ravel().tolist() == [1.0, np.inf, np.inf]


def test_jittered_readings_are_thinned_to_every_so_many_th():
    cadence = Cadence(10, jittered=True)
    steps = [step for step in range(1, 1201) if cadence.is_due(step)]
    whole = series(steps, steps, np.arange(1, 121))
    for every, kept in ((1, 1), (10, 1), (5, 1), (20, 2), (3, 3), (30, 3), (600, 60)):
        thinned = thin(whole, cadence.thinned(every))
        assert thinned.values.ravel().tolist() == list(range(kept, 121, kept)), every
        assert thinned.steps.tolist() == steps[kept - 1 :: kept]


def test_readings_of_every_step_are_thinned_to_those_of_a_slower_monitor_like_it():
    every_step = series(range(1, 101), range(1, 101), range(1, 101))
    jittered = thin(every_step, Cadence(1, jittered=True).thinned(10)).steps.tolist()
    assert jittered == [step for step in range(1, 101) if Cadence(10, jittered=True).is_due(step)]
    assert thin(every_step, Cadence(1).thinned(10)).steps.tolist() == list(range(10, 101, 10))
    assert len(thin(series(np.empty(0, int), [], []), Cadence(10, jittered=True)).steps) == 0


def test_a_jittered_reading_that_was_skipped_over_still_breaks_the_signal():
    cadence = Cadence(10, jittered=True)
    whole = series([11, 26, 37, 41], [11, 26, 37, 41], [1.0, 2.0, np.nan, 4.0])
    assert thin(whole, cadence.thinned(20)).values.ravel().tolist() == [2.0, np.inf]


def test_each_position_shows_the_latest_sample_at_or_before_it():
    """Half the batch: a sample every 50 tokens on a grid of 100."""
    small = series([10, 20, 30, 40, 50], [50, 100, 150, 200, 250], [1, 2, 3, 4, 5])
    held = hold(small, "tokens", np.array([100, 200, 300, 400]))
    assert held.positions.tolist() == [100, 200, 300]
    assert held.values.ravel().tolist() == [2.0, 4.0, 5.0]


def test_positions_before_the_first_sample_are_left_out():
    held = hold(series([10, 20], [250, 500], [1, 2]), "tokens", np.array([100, 200, 300, 400, 500]))
    assert held.positions.tolist() == [300, 400, 500]
    assert held.values.ravel().tolist() == [1.0, 1.0, 2.0]


def test_nothing_is_seen_after_the_grid_ends():
    held = hold(series([1, 2, 3], [10, 20, 30], [1, 2, 3]), "steps", np.array([1, 2]))
    assert held.values.ravel().tolist() == [1.0, 2.0]


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_a_skipped_sample_that_was_not_finite_still_breaks_the_signal(value):
    held = hold(series([1, 2, 3, 4], [25, 50, 75, 100], [1, value, 3, 4]), "tokens", np.array([25, 100]))
    assert held.values.ravel().tolist() == [1.0, np.inf]
    assert not held.undefined.any()


def test_it_is_causal():
    generator = np.random.default_rng(0)
    tokens = np.cumsum(generator.integers(1, 9, 60))
    whole = series(np.arange(60), tokens, generator.normal(size=60))
    early = Series(whole.steps[:40], tokens[:40], whole.values[:40], whole.undefined[:40])
    grid = np.arange(5, tokens[-1], 5)
    known = grid[grid <= tokens[39]]
    assert np.array_equal(
        hold(whole, "tokens", grid).values[: len(known) - 1], hold(early, "tokens", grid).values[: len(known) - 1]
    )


def test_a_run_without_samples_has_none():
    held = hold(series([], [], []), "steps", np.array([1, 2]))
    assert isinstance(held, Aligned) and held.values.shape == (0, 1, 1)


def test_an_unknown_axis_is_an_error():
    with pytest.raises(ValueError, match="align='time' is not allowed: one of steps, tokens"):
        positions(series([1], [1], [1]), "time")
