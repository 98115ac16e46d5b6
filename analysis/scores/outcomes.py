"""What became of runs, and who alarmed at a planned change that is no fault."""

from __future__ import annotations

import numpy as np
import pandas as pd

from foreshock.analysis.runs.experiment import HEALTHY, Experiment
from foreshock.analysis.scores.contest import Contest
from foreshock.faults.card import BENIGN

BENIGN_COLUMNS = ["model", "control", "detector", "runs", "alarms", "share", "alarms_before"]


def outcome_table(experiment: Experiment) -> pd.DataFrame:
    """One row a faulty, benign or healthy test run: its outcome and note (``analysis.runs.outcomes``).

    final_loss: smoothed clean label at the run's end, NaN where it is not finite; healthy_median, healthy_largest: of
    the calibration runs there; all in nats.
    """
    rows = []
    for run in experiment.of("faulty", BENIGN, "test"):
        assert run.outcome is not None  # which all of these roles have
        rows.append(
            {
                "model": experiment.model,
                "role": run.role,
                "fault": run.fault or HEALTHY,
                "seed": run.seed,
                "run_id": run.trace.run_id,
                "outcome": run.outcome.outcome,
                "note": run.outcome.note,
                "final_loss": run.outcome.final_loss,
                "healthy_median": float(np.median(run.outcome.healthy_final_losses)),
                "healthy_largest": max(run.outcome.healthy_final_losses),
            }
        )
    return pd.DataFrame(rows)


def benign_table(contest: Contest) -> pd.DataFrame:
    """One row a benign control and detector: in how many runs it alarms. Declined ones and controls have none.

    alarms: runs with an alarm at or after the onset of the planned change, whatever its loss does: false alarms, of
    which no board counts one as a detection; share: of the runs; alarms_before: runs with one before it.
    """
    experiment, rows = contest.experiment, []
    judged = contest.without_singles().detectors
    for control in experiment.benign_controls:
        runs = experiment.of(BENIGN, fault=control)
        for name, detector in judged.items():
            if detector.declined or contest.kinds[name] == "control":
                continue
            raised = [(detector.alarms[run.trace.run_id], run.onset or 0) for run in runs]
            after = sum(alarm is not None and alarm >= onset for alarm, onset in raised)
            before = sum(alarm is not None and alarm < onset for alarm, onset in raised)
            counted = (len(runs), after, after / len(runs), before)
            rows.append((experiment.model, control, name, *counted))
    table = pd.DataFrame(rows, columns=BENIGN_COLUMNS)
    return table.sort_values(["control", "share"], ascending=[True, False], kind="stable")
