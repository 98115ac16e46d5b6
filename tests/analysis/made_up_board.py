"""A leaderboard with a known answer: which detector alarms under which fault when."""

from __future__ import annotations

from pathlib import Path

import pandas as pd

from foreshock.analysis.reports.boards import Request, score_runs
from foreshock.analysis.runs.experiment import Experiment
from foreshock.analysis.scores.contest import Contest, contest
from tests.described import described

SIGNALS = {
    "qk_delta2_spectrum.entropy.w50": described("qk_delta2_spectrum.entropy.w50"),
    "grad_global_norm": described("grad_global_norm", every_steps=5),
    "update_to_weight": described("update_to_weight"),
}
EARLY, LATE = "qk_delta2_spectrum.entropy.w50", "grad_global_norm"
DETECTORS = {"early": [EARLY], "late": [LATE], "either": [EARLY, LATE], "elsewhere": ["absent"]}
COUNTS = {"reference": 5, "calibration": 9, "test": 6, "faulty": 12}
FAULTS = {
    "attention": {"shows": {EARLY: 400, LATE: 700}, "diverges": 800, "onset": 301},
    "ramp": {"shows": {LATE: 600}, "diverges": 700, "onset": 301},
    "batch8": {"shows": {}, "diverges": None, "onset": 301},
}


def scored(folder: Path, out: Path, **options) -> pd.DataFrame:
    """The leaderboard of a folder of runs, by track, fault and detector. options: of ``Request``."""
    table = score_runs(Request(runs=folder, out=out, **options)).get("leaderboard")
    return table.set_index(["track", "fault", "detector"]).sort_index()


def with_singles(experiment: Experiment) -> Contest:
    """What a report shows: the contest of an experiment on the reference track, every signal by itself too."""
    return contest(experiment, "reference", singles=True)
