"""What came out, in one sentence a fault; every number in it is a cell of the lead-time table."""

from __future__ import annotations

from collections.abc import Sequence

import pandas as pd

from foreshock.analysis.figures.drawing import pretty
from foreshock.analysis.runs.experiment import Experiment

ALARM = "median_alarm_from_onset_step"
"""An alarm before the onset is no answer to the fault."""


def headline(experiment: Experiment, table: pd.DataFrame) -> str:
    """When the detectors of the experiment's ``headline`` alarm, and when the loss diverges: medians over runs.

    table: of ``scores.table.lead_table``. Empty where the experiment names no such detector, or all are declined.
    """
    names = experiment.index["experiment"].get("headline") or ()
    rows = table[(table["kind"] == "detector") & table["detector"].isin(names) & table["declined"].isna()]
    several = len(experiment.faults) > 1
    return " ".join(
        (f"{experiment.label(fault)}: " if several else "") + _sentence(experiment, rows[rows["fault"] == fault])
        for fault in experiment.faults
        if (rows["fault"] == fault).any()
    )


def _sentence(experiment: Experiment, rows: pd.DataFrame) -> str:
    rows = rows.sort_values(ALARM, kind="stable")
    divergence, runs = rows[["median_divergence_step", "runs"]].iloc[0]
    silent = rows[ALARM].isna()
    late = rows[ALARM] >= divergence
    in_time = rows[~silent & ~late]
    where = "step" if experiment.axis == "steps" else "token"
    first = "no alarm" if in_time.empty else f"First alarms: {_alarms(in_time, where)}"
    if pd.isna(divergence):
        said = f"{first}; the loss of the median run does not diverge within {experiment.horizon:,} {experiment.axis}"
    elif in_time.empty:
        said = f"The loss diverges at {where} {divergence:,.0f}, and no alarm comes before"
    else:
        said = f"{first}, before the loss diverges at {divergence:,.0f}"
    if late.any():
        said += f"; after it, {_alarms(rows[late], where)}"
    if silent.any():
        said += f"; none in the median run: {_listed([pretty(name) for name in rows.loc[silent, 'detector']])}"
    of = "one run" if runs == 1 else f"medians over {runs:.0f} runs"
    said += f" ({of}; {_healthy(rows)})."
    return said[0].upper() + said[1:]


def _alarms(rows: pd.DataFrame, where: str) -> str:
    """``laws at step 10, ΔW at 750 and Δ₂ at 800``."""
    steps = [f"{step:,.0f}" for step in rows[ALARM]]
    steps[0] = f"{where} {steps[0]}"
    return _listed([f"{pretty(name)} at {step}" for name, step in zip(rows["detector"], steps, strict=True)])


def _healthy(rows: pd.DataFrame) -> str:
    """Alarms in healthy test runs: one count where all detectors have the same."""
    of = f"{rows['healthy_test_runs'].iloc[0]:.0f}"
    if of == "0":
        return "no healthy test run"
    alarms = {
        pretty(name): f"{count:.0f}" for name, count in zip(rows["detector"], rows["healthy_test_alarms"], strict=True)
    }
    if len(set(alarms.values())) == 1:
        count = next(iter(alarms.values()))
        return f"{count} of {of} healthy runs alarm" if count == "0" else f"each alarms in {count} of {of} healthy runs"
    return f"alarms in {of} healthy runs: " + _listed([f"{name} {count}" for name, count in alarms.items()])


def _listed(parts: Sequence[str]) -> str:
    """``a, b and c``."""
    return parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} and {parts[-1]}"
