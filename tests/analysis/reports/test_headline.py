"""The sentence that says what came out: every number in it is a cell of the table."""

from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest

from foreshock.analysis.reports.headline import headline

LAWS, DELTA_W, DELTA_2 = "conservation laws", "Delta W entropy", "Delta2 entropy"


def experiment(**changes):
    given = {"axis": "steps", "horizon": 1500, "faults": ["attention"], "label": str} | changes
    return SimpleNamespace(index={"experiment": {"headline": [LAWS, DELTA_W, DELTA_2]}}, **given)


def table(alarms, divergence=1430.0, healthy=(0, 0, 0), healthy_runs=3, fault="attention") -> pd.DataFrame:
    rows = pd.DataFrame({"detector": [LAWS, DELTA_W, DELTA_2], "median_alarm_from_onset_step": alarms})
    return rows.assign(
        kind="detector", fault=fault, declined=None, runs=3, median_divergence_step=divergence,
        healthy_test_alarms=healthy, healthy_test_runs=healthy_runs,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        (
            table([10.0, 750.0, 800.0]),
            "First alarms: conservation laws at step 10, ΔW entropy at 750 and Δ₂ entropy at 800, before the loss "
            "diverges at 1,430 (medians over 3 runs; 0 of 3 healthy runs alarm).",
        ),
        (  # sorted by alarm; one too late, one never
            table([np.nan, 1430.0, 800.0]),
            "First alarms: Δ₂ entropy at step 800, before the loss diverges at 1,430; after it, ΔW entropy at step "
            "1,430; none in the median run: conservation laws (medians over 3 runs; 0 of 3 healthy runs alarm).",
        ),
        (
            table([np.nan, 1450.0, np.nan], healthy=(1, 1, 1)),
            "The loss diverges at step 1,430, and no alarm comes before; after it, ΔW entropy at step 1,450; none "
            "in the median run: conservation laws and Δ₂ entropy (medians over 3 runs; each alarms in 1 of 3 healthy "
            "runs).",
        ),
        (
            table([10.0, 750.0, 800.0], divergence=np.nan, healthy=(0, 1, 0)),
            "First alarms: conservation laws at step 10, ΔW entropy at 750 and Δ₂ entropy at 800; the loss of the "
            "median run does not diverge within 1,500 steps (medians over 3 runs; alarms in 3 healthy runs: "
            "conservation laws 0, ΔW entropy 1 and Δ₂ entropy 0).",
        ),
        (
            table([np.nan] * 3, divergence=np.nan, healthy_runs=0),
            "No alarm; the loss of the median run does not diverge within 1,500 steps; none in the median run: "
            "conservation laws, ΔW entropy and Δ₂ entropy (medians over 3 runs; no healthy test run).",
        ),
    ],
)
def test_it_says_whatever_came_out(rows, said):
    assert headline(experiment(), rows) == said


def test_each_fault_has_its_sentence_and_a_declined_detector_none():
    two = pd.concat([table([10.0, 750.0, 800.0]), table([20.0, np.nan, 900.0], fault="ramp")])
    two.loc[two["detector"] == DELTA_W, "declined"] = "zero spread"
    said = headline(experiment(faults=["attention", "ramp"]), two)
    assert said.startswith("attention: First alarms: conservation laws at step 10 and Δ₂ entropy at 800,")
    assert "ramp: First alarms: conservation laws at step 20 and Δ₂ entropy at 900," in said
    assert "ΔW" not in said


def test_one_run_has_no_median():
    assert headline(experiment(), table([10.0, 750.0, 800.0]).assign(runs=1)).endswith(
        "(one run; 0 of 3 healthy runs alarm)."
    )


def test_tokens_are_not_called_steps():
    said = headline(experiment(axis="tokens", horizon=96000), table([640.0, 750.0, 800.0]))
    assert said.startswith("First alarms: conservation laws at token 640,")
    assert "step" not in said


def test_an_experiment_without_a_headline_says_nothing():
    silent = SimpleNamespace(index={"experiment": {}}, faults=["attention"])
    assert headline(silent, table([10.0, 750.0, 800.0])) == ""
