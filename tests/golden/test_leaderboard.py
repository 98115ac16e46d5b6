"""The published leaderboard is what the published runs give."""

import pandas as pd
import pytest

from analysis.contest import contest, run_scores
from analysis.found import find
from analysis.leaderboard import board
from experiments.build import ROOT

RUNS, TABLE = ROOT / "results" / "reference_set", ROOT / "results" / "leaderboard.csv"
COUNTED = ["runs", "diverged", "calibration_runs", "healthy_alarms", "healthy_runs", "detected", "late", "missed"]
MEASURED = ["threshold", "rmlt_steps", "rmlt_low", "rmlt_high", "relative_lead_steps"]


@pytest.mark.parametrize("number", [0, 1])
def test_the_leaderboard_is_what_the_committed_runs_give(number):
    experiment = find(RUNS)[number]
    one = contest(experiment, "reference")
    now = board(one, run_scores(one)).set_index(["fault", "detector"]).sort_index()
    published = pd.read_csv(TABLE)
    published = published[(published["model"] == experiment.model) & (published["track"] == "reference")]
    published = published.set_index(["fault", "detector"]).sort_index().loc[now.index]
    pd.testing.assert_frame_equal(now[COUNTED].astype(float), published[COUNTED].astype(float))
    pd.testing.assert_frame_equal(now[MEASURED].astype(float), published[MEASURED].astype(float), rtol=1e-5)


def test_every_row_says_what_it_must():
    table = pd.read_csv(TABLE)
    judged = table[table["declined"].isna() & (table["kind"] == "detector") & (table["track"] != "published")]
    stated = ["runs", "alpha", "calibration_runs", "healthy_alarms", "false_alarm_low", "false_alarm_high"]
    stated += ["detected", "cost_share_of_step"]
    assert judged[stated].notna().all().all()
    assert judged.loc[judged["fault"] != "all", "delay_steps"].notna().all()
    pooled = judged[(judged["fault"] == "all") & (judged["track"] == "reference")]
    assert pooled[["rmlt_steps", "rmlt_low", "rmlt_high", "rank", "relative_lead_steps"]].notna().all().all()
    assert (pooled["calibration_runs"] >= 19).all() and (pooled["alpha"] == 0.05).all()
