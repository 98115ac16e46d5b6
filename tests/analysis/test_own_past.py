"""Detectors of a signal's own past, and rules whose number nobody calibrates: by hand, causal, and as they promise."""

import math

import numpy as np
import pytest

from foreshock.analysis.detect.fixed_rules import (
    FoundryRise,
    OlmoSpike,
    PublishedLimit,
    SelfBound,
    TimesMedian,
    self_bound,
)
from foreshock.analysis.detect.own_past import Statistic, TrailingMedian, own_past
from foreshock.analysis.runs.align import Aligned
from foreshock.analysis.runs.elsewhere import cells_of
from foreshock.analysis.runs.reduced import ReducedTrace
from foreshock.experiments.elsewhere.known_signals import KNOWN
from foreshock.experiments.elsewhere.readings import Readings
from foreshock.experiments.elsewhere.traces import ImportedRun
from foreshock.monitors.signal import Signal


def aligned(values):
    values = np.asarray(values, float)[:, None, None]
    return Aligned(np.arange(len(values)), values, np.zeros(values.shape, bool))


def a_run(**signals):
    """A healthy run in a cell of its own, with a reading of each signal at every tenth step."""
    readings = {
        n: Readings(n, 10 * np.arange(len(v)), np.zeros(len(v), int), np.asarray(v, float)) for n, v in signals.items()
    }
    run = ImportedRun("mine", "cell", 0, None, {name: KNOWN[name] for name in signals}, readings, {})
    (cell,) = cells_of([ReducedTrace("mine", None, run.manifest(), run.series())], {"train_loss_raw": 1e9})
    return cell.experiment.runs[0]


def test_the_ratio_to_the_trailing_median_by_hand():
    x = [1, 3, 2, 4, 6, 0, np.inf, 5]
    z = TrailingMedian(window=3).z(aligned(x)).ravel()
    assert np.isnan(z[:3]).all()
    assert z[3] == pytest.approx(math.log(4 / 2))  # of 1, 3, 2
    assert z[4] == pytest.approx(math.log(6 / 3))  # of 3, 2, 4
    assert z[5] == -np.inf and z[6] == np.inf and z[7] == np.inf  # what is broken stays so


def test_a_median_of_zero_is_no_scale():
    assert np.isnan(TrailingMedian(window=2).z(aligned([0, 0, 5]))).all()


@pytest.mark.parametrize("index", [0, 1])
def test_the_detectors_do_not_look_ahead(index):
    x = np.random.default_rng(0).lognormal(size=200)
    run = a_run(grad_global_norm=x, train_loss_raw=np.ones(200))
    watcher = own_past("gradient norm", "grad_global_norm", "up")[index]
    _, whole = watcher.statistic(run)
    _, part = watcher.statistic(a_run(grad_global_norm=x[:120], train_loss_raw=np.ones(120)))
    np.testing.assert_allclose(part, whole[:120], rtol=1e-12)


def test_a_statistic_gives_its_largest_value_and_first_alarm():
    seen = Statistic(np.array([0, 10, 20, 30]), np.array([np.nan, 1.0, 3.0, 2.0]))
    assert (seen.maximum, seen.largest_before(20), seen.largest_before(10)) == (3.0, 1.0, -np.inf)
    assert (seen.alarm(1.5), seen.alarm(3.0)) == (20, None)


def test_times_the_median_alarms_at_the_first_reading_strictly_above():
    x = np.ones(100)
    x[40], x[70], x[80] = 9.0, 2.0, 2.1
    run = a_run(grad_global_norm=x, train_loss_raw=np.ones(100))
    assert TimesMedian(2.0).alarm(run) == 800  # not within the first 50, and not at exactly twice
    assert TimesMedian(1.5).alarm(run) == 700
    assert TimesMedian(3.0).alarm(run) is None


def test_the_rules_of_the_trade_alarm_when_they_would_have_been_raised():
    loss = 2 + 0.01 * np.random.default_rng(1).normal(size=400)
    loss[300:] = 5.0
    run = a_run(train_loss_raw=loss, grad_global_norm=np.ones(400))
    assert OlmoSpike().alarm(run) == 3000
    assert FoundryRise().alarm(run) == 3040  # at the fifth in a row


def test_a_published_limit():
    run = a_run(grad_global_norm=[1.0] * 60 + [3.0], train_loss_raw=np.ones(61))
    assert PublishedLimit(Signal("grad_global_norm", "1", "up", above=2.0)).alarm(run) == 600


def test_the_bound_of_the_self_track_is_passed_by_chance_as_often_as_it_says():
    generator, alarms = np.random.default_rng(2), 0
    rule = SelfBound("grad_global_norm", "up", alpha=0.2)
    for _ in range(200):
        alarms += (
            rule.alarm(a_run(grad_global_norm=generator.normal(size=100), train_loss_raw=np.ones(100))) is not None
        )
    assert alarms / 200 <= 0.2 + 3 * math.sqrt(0.2 * 0.8 / 200)
    assert alarms / 200 > 0.08
    assert self_bound(1, 0.05) < self_bound(100, 0.05) < self_bound(100, 0.05, "both")
    with pytest.raises(ValueError, match=r"looks=0, alpha=0\.05 is not allowed"):
        self_bound(0, 0.05)
