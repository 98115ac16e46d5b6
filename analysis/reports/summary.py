"""What a report says first: a few sentences and a table of the named detectors."""

from __future__ import annotations

from collections import Counter
from functools import partial

import pandas as pd
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from foreshock.analysis.figures.drawing import pretty
from foreshock.analysis.reports.headline import headline
from foreshock.analysis.reports.kinds.base import Kind
from foreshock.analysis.reports.terminal import print_whole
from foreshock.analysis.runs.experiment import HEALTHY_ROLES, Experiment
from foreshock.analysis.runs.outcomes import BETTER
from foreshock.analysis.scores.contest import Contest
from foreshock.analysis.scores.outcomes import benign_table

COLUMNS = {
    "detector": "detector",
    "median_alarm_step": "median alarm",
    "median_divergence_step": "median divergence",
    "rmlt_steps": "mean lead",
    "relative_lead_steps": "mean lead over best baseline",
    "detected": "runs detected",
    "late": "late",
    "missed": "missed",
    "false_alarm": "false",
    "healthy": "healthy runs with an alarm",
}
POSITIONS = ("median_alarm_step", "median_divergence_step", "rmlt_steps", "relative_lead_steps")
"""Columns that hold steps or tokens."""


def summary(contest: Contest, kind: Kind) -> str:
    """What the report shows, in a few sentences that hold whatever came out."""
    experiment = contest.experiment
    faulty, healthy = experiment.of("faulty"), experiment.of(*HEALTHY_ROLES)
    diverged = sum(run.divergence is not None for run in faulty)
    degraded = sum(run.degraded for run in faulty)
    healthy_diverged = sum(run.divergence is not None for run in healthy)
    counts = {role: len(experiment.of(role)) for role in ("reference", "calibration", "test")}
    sentences = [
        f"{diverged} of {len(faulty)} faulty runs diverge within {experiment.horizon:,} {experiment.axis}"
        f"{f', {degraded} more end degraded' if degraded else ''}; {healthy_diverged} of {len(healthy)} healthy runs "
        f"do. Divergence: the held-out loss stands {experiment.drawup_threshold_nats:.2f} nats above its minimum, "
        f"a margin set by {counts['reference']} reference runs. "
        f"Thresholds: split conformal on {counts['calibration']} healthy calibration runs at "
        f"{experiment.alpha:.0%} false alarms per run; {counts['test']} healthy test runs. Reference track, "
        f"{experiment.index['rule']['chart'].upper()} chart, seeds of all roles disjoint."
    ]
    sentences += [outcome_sentence(experiment), benign_sentence(contest)]
    if experiment.mixed:
        sentences.append(f"Mixed on request: {'; '.join(experiment.mixed)}.")
    if len(faulty) < 10 * len(experiment.faults):
        sentences.append("Fewer than 10 faulty seeds: points without intervals.")
    sentences.append(kind.sentences(contest))
    return " ".join(filter(None, sentences))


def outcome_sentence(experiment: Experiment) -> str:
    """How many faulty runs came to which outcome (``analysis.runs.outcomes``), the most frequent first."""
    judged = [run.outcome for run in experiment.of("faulty") if run.outcome is not None]
    counts = Counter(outcome.outcome for outcome in judged).most_common()
    better = sum(outcome.note == BETTER for outcome in judged)
    said = ", ".join(f"{count} {name}" for name, count in counts)
    return f"Outcomes of faulty runs on the clean label: {said}{f'; {better} end {BETTER}' if better else ''}."


def benign_sentence(contest: Contest) -> str:
    """Which detectors alarm in benign runs; empty without any."""
    table = benign_table(contest)
    if table.empty:
        return ""
    of_detector = table.groupby("detector", sort=False)[["runs", "alarms"]].sum().sort_values("alarms", ascending=False)
    sirens = of_detector[of_detector["alarms"] > 0]
    said = ", ".join(f"{pretty(str(row.Index))} {row.alarms}" for row in sirens.itertuples()) or "none"
    runs = int(of_detector["runs"].max())
    return f"Alarms in {runs} benign runs, none of which is a fault: {said}."


def shown_rows(contest: Contest, table: pd.DataFrame, fault: str, kind: str) -> pd.DataFrame:
    """The rows of a fault and of a kind (``detector`` or ``signal``), with the columns that a reader wants, as text.

    table: of ``scores.table.lead_table``. Columns are named for people; rows of declined detectors are left out.
    """
    rows = table[(table["fault"] == fault) & (table["kind"] == kind) & table["declined"].isna()].copy()
    rows["healthy"] = [f"{r.healthy_test_alarms:.0f}/{r.healthy_test_runs:.0f}" for r in rows.itertuples()]
    rows["detected"] = [f"{r.detected * r.runs:.0f}/{r.runs:.0f}" for r in rows.itertuples()]
    for column in POSITIONS:
        rows[column] = ["–" if pd.isna(value) else f"{value:,.0f}" for value in rows[column]]
    rows["detector"] = [pretty(name) for name in rows["detector"]]
    for column in ("late", "missed", "false_alarm"):
        rows[column] = [f"{value:.0f}" for value in rows[column]]
    axis = contest.experiment.axis
    names = {column: f"{name} ({axis})" if column in POSITIONS else name for column, name in COLUMNS.items()}
    return rows[list(COLUMNS)].rename(columns=names)


def print_summary(contest: Contest, kind: Kind, table: pd.DataFrame, console: Console) -> None:
    """The named detectors in the terminal, one table a fault, the sentences, and the headline."""
    experiment = contest.experiment
    view = f"{experiment.model}, " if len(experiment.index["experiment"]["models"]) > 1 else ""
    for fault in experiment.faults:
        rows = shown_rows(contest, table, fault, "detector")
        title = f"{experiment.index['experiment']['title']}: {view}{experiment.label(fault)}"
        grid = Table(title=escape(title), title_justify="left")
        for column in rows.columns:
            named = column == "detector"
            grid.add_column(column, justify="left" if named else "right", no_wrap=named)
        for row in rows.itertuples(index=False):
            grid.add_row(*map(escape, row))
        print_whole(console, partial(list, (grid,)))
    console.print(summary(contest, kind), markup=False)
    outcome = headline(experiment, table)
    if outcome:
        console.print(outcome, style="bold", highlight=False, markup=False)
