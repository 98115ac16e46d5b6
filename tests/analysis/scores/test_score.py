import math

import pytest

from foreshock.analysis.scores.outcome import restricted_mean_lead, score


@pytest.mark.parametrize(
    ("alarm", "onset", "divergence", "outcome", "lead"),
    [
        (500, 1, 1500, "lead", 1000),
        (1, 1, 1500, "lead", 1499),
        (1500, 1, 1500, "late", 0),
        (1600, 1, 1500, "late", 0),
        (None, 1, 1500, "missed", 0),
        (99, 100, 1500, "false_alarm", 0),
        (100, 100, 1500, "lead", 1400),
        (99, 100, None, "false_alarm", None),
        (500, 1, None, "benign_alarm", None),
        (None, 1, None, "quiet", None),
        (500, None, None, "false_alarm", None),
        (500, None, 1500, "false_alarm", 0),
        (None, None, None, "quiet", None),
        (500, 1, 2500, "benign_alarm", None),
        (None, 1, 2500, "quiet", None),
    ],
)
def test_every_outcome(alarm, onset, divergence, outcome, lead):
    result = score(alarm=alarm, onset=onset, divergence=divergence, horizon=2000)
    assert (result.outcome, result.restricted_lead_steps) == (outcome, lead)


def test_alarming_k_steps_earlier_scores_exactly_k_more():
    leads = [score(alarm=a, onset=1, divergence=1500, horizon=2000).restricted_lead_steps for a in (900, 893)]
    assert leads[1] - leads[0] == 7


def test_an_alarm_beyond_the_horizon_is_an_error():
    with pytest.raises(ValueError, match="alarm=2001 is beyond the horizon"):
        score(alarm=2001, onset=1, divergence=None, horizon=2000)


def test_a_miss_lowers_the_mean_lead_and_a_quiet_run_does_not_enter_it():
    lead = score(alarm=500, onset=1, divergence=1500, horizon=2000)
    miss = score(alarm=None, onset=1, divergence=1500, horizon=2000)
    quiet = score(alarm=None, onset=1, divergence=None, horizon=2000)
    assert restricted_mean_lead([lead, miss, quiet]) == 500
    assert math.isnan(restricted_mean_lead([quiet]))
