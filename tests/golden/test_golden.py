"""Scoring of saved real runs gives the saved table, to the last digit."""

from pathlib import Path

import numpy as np
import pandas as pd

from foreshock.analysis.runs.load import load
from foreshock.analysis.scores.contest import contest, run_scores
from foreshock.analysis.scores.leaderboard import board
from foreshock.analysis.scores.table import lead_table

GOLDEN = Path(__file__).parent / "paper_attention"
REFERENCE_SET = Path(__file__).parent / "reference_set"


def test_the_table_of_the_golden_runs_has_not_changed(tmp_path):
    held = contest(load(GOLDEN, GOLDEN / "runs"), "reference", singles=True)
    lead_table(held).to_csv(tmp_path / "table.csv", index=False)
    now, expected = pd.read_csv(tmp_path / "table.csv"), pd.read_csv(GOLDEN / "expected.csv")
    pd.testing.assert_frame_equal(now, expected, check_exact=False, rtol=1e-12)


def test_the_golden_runs_show_the_fault_before_the_loss_does():
    table = pd.read_csv(GOLDEN / "expected.csv").set_index("detector")
    delta2 = table.loc["Delta2 entropy"]
    assert delta2["lead"] == 3
    assert np.isfinite(delta2["median_divergence_step"])
    assert delta2["rmlt_steps"] > 0


def test_the_leaderboard_of_the_golden_reference_set_has_not_changed(tmp_path):
    experiment = load(REFERENCE_SET, REFERENCE_SET)
    contests = [contest(experiment, track) for track in ("reference", "self", "floor")]
    table = pd.concat([board(one, run_scores(one)) for one in contests], ignore_index=True)
    table.to_csv(tmp_path / "table.csv", index=False)
    now, expected = pd.read_csv(tmp_path / "table.csv"), pd.read_csv(REFERENCE_SET / "expected.csv")
    pd.testing.assert_frame_equal(now, expected, check_exact=False, rtol=1e-9)
