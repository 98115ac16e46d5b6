import numpy as np
import pytest

from analysis import entrants
from analysis.alarms import make_rule
from analysis.found import conf

RISE = np.concatenate((np.zeros(60), np.full(60, 8.0)))


@pytest.mark.parametrize("name", entrants.RIVER)
def test_rivers_detectors_count_the_drifts_they_have_reported(name):
    noise = 0.1 * np.random.default_rng(0).normal(size=(3, len(RISE)))
    drifts = make_rule(**conf("rule", name)).statistic(noise + [[0.0], [1.0], [0.0]] * RISE)
    assert (np.diff(drifts) >= 0).all()
    assert drifts[1, 59] == 0 < drifts[1, -1]
    assert not drifts[[0, 2]].any()


def test_kswin_counts_the_same_on_all_cores(monkeypatch):
    rule, runs = make_rule(**conf("rule", "kswin")), np.random.default_rng(1).normal(size=(4, 3000)).cumsum(axis=1)
    alone = np.stack([rule.statistic(run) for run in runs])
    assert alone[:, -1].min() > 0
    monkeypatch.setattr(entrants, "MANY_SAMPLES", runs.size - 1)
    assert np.array_equal(rule.statistic(runs), alone)
