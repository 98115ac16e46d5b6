"""A detector costs what its monitors compute and the taps that they need, at the steps at which they read."""

import math

import pytest

from foreshock.analysis.scores.costs import MonitorCost, costs_of, detector_cost, monitor_costs, taps_share

MEASURED = {
    "laws": {"share_of_step": 0.010, "signals": ["a", "b"], "every_steps": [10], "taps": {"dot_product": 0.08}},
    "scores": {"share_of_step": 0.002, "signals": ["c"], "every_steps": [10], "taps": {"dot_product": 0.08}},
    "weights": {"share_of_step": 0.003, "signals": ["d"], "every_steps": [50], "taps": {}},
    "linear": {
        "share_of_step": 0.004,
        "signals": ["e"],
        "every_steps": [30],
        "taps": {"dot_product": 0.08, "linear": 0.12},
    },
    "spikes": {"share_of_step": 0.001, "signals": ["f"], "every_steps": [1, 10], "taps": {}},
}


@pytest.mark.parametrize(
    ("signals", "cost"),
    [
        (["d"], 0.003),
        (["f"], 0.001),
        (["a"], 0.010 + 0.08 / 10),
        (["a", "b"], 0.010 + 0.08 / 10),  # one monitor is paid once
        (["a", "c"], 0.010 + 0.002 + 0.08 / 10),  # and so are taps that two read at one step
        (["e"], 0.004 + (0.08 + 0.12) / 30),
        (["a", "e"], 0.010 + 0.004 + 0.08 / 10 + 0.12 / 30),  # every 30th step is a 10th one
    ],
)
def test_a_detector_pays_for_its_monitors_and_their_taps(signals, cost):
    assert detector_cost(signals, costs_of(MEASURED)) == pytest.approx(cost, rel=1e-12)


def test_cadences_that_meet_now_and_then_tap_their_union():
    readers = [MonitorCost("two", 0.0, (2,), {"norm": 0.6}), MonitorCost("three", 0.0, (3,), {"norm": 0.6})]
    assert taps_share(readers) == pytest.approx(0.6 * 4 / 6, rel=1e-12)  # of six steps 0, 2, 3 and 4


def test_what_was_not_measured_has_no_cost(tmp_path):
    assert math.isnan(detector_cost(["a", "homemade"], costs_of(MEASURED)))
    assert math.isnan(detector_cost([], costs_of(MEASURED)))
    assert monitor_costs("mha_nano", tmp_path / "none.json") == {} == monitor_costs("never_measured")


def test_the_published_costs_know_every_tap():
    """Every monitor that taps pays for it, in the file that the leaderboard reads."""
    for model in ("mha_nano", "mha_small", "moe_nano", "moe_small"):
        by_name = {cost.name: cost for cost in monitor_costs(model).values()}
        tapping = {name for name, cost in by_name.items() if cost.taps}
        assert {"attention_laws", "attention_recomputed", "linear_laws", "spectral_alignment"} <= tapping
        for name in tapping:  # of the small models attention's taps are lost in the noise
            assert taps_share([by_name[name]]) > 0 or model.endswith("small"), name
        assert taps_share(list(by_name.values())) > 0
