"""A threshold that calibration runs set at their start, on made-up runs and on the committed mixture of experts."""

from pathlib import Path

import numpy as np
import pytest

from foreshock.analysis.runs.load import load
from foreshock.analysis.threshold_source import charts, main, peaks, threshold_source
from tests.analysis.made_up_board import LATE, with_singles

MOE = Path(__file__).parents[2] / "results" / "reference_set" / "moe"


def test_the_threshold_is_the_one_that_scoring_uses(folder):
    experiment = load(folder, folder)
    detector = with_singles(experiment).detectors["late"]
    whole, rows = threshold_source(experiment, LATE, "attention")
    assert rows.loc[0, "threshold"] == detector.threshold == whole.loc[whole["sets_threshold"], "largest"].item()
    assert len(whole) == len(experiment.of("calibration")) and whole["largest"].is_monotonic_decreasing
    steps = [detector.alarms[run.trace.run_id] for run in experiment.of("faulty", fault="attention")]
    assert rows.loc[0, "median_alarm"] == np.median(steps)
    assert rows.loc[1, "threshold"] <= rows.loc[0, "threshold"]
    assert (peaks(experiment, charts(experiment, LATE), 301)["position"] >= 301).all()


def test_routing_entropy_is_judged_by_the_first_steps_of_healthy_runs():
    """results/README.md, the learning-rate ramp: set at step 40, in time in none; from the onset on, in 6 of 10."""
    whole, rows = threshold_source(load(MOE, MOE), "routing_entropy", "ramp")
    assert (whole.loc[:6, "position"] <= 40).all()
    assert rows["set_at"].tolist() == [40, 2380] and rows["in_time"].tolist() == [0, 6]
    assert rows["threshold"].tolist() == pytest.approx([8.92, 3.06], abs=0.01)
    assert rows["median_alarm"].tolist() == [1645, 1410] and (rows["median_divergence"] == 1545).all()


@pytest.mark.parametrize(
    ("signal", "fault", "said"),
    [("routing_entrop", "ramp", "no run of"), (LATE, "rmap", "fault='rmap' is not allowed: one of attention")],
)
def test_what_is_not_there_is_named_in_one_line(folder, capsys, signal, fault, said):
    with pytest.raises(SystemExit) as ended:
        main([f"runs={folder}", f"signal={signal}", f"fault={fault}"])
    captured = capsys.readouterr()
    assert ended.value.code == 2 and said in captured.err and captured.err.count("\n") == 1
