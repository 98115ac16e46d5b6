"""What can be said of runs from elsewhere: tables, and the sentences that keep them honest."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
from rich.console import Console
from rich.table import Table

from foreshock.analysis.detect.fixed_rules import SPIKE_RULES, FixedRule, PublishedLimit, SelfBound
from foreshock.analysis.runs.elsewhere import Cell, cells_of
from foreshock.analysis.runs.labels import LABEL_SIGNAL
from foreshock.analysis.scores.elsewhere import (
    Judged,
    calibrated_scores,
    fixed_scores,
    judge,
    shared_signals,
    summary,
)
from foreshock.experiments.trace import Trace

ALPHA_IN_CELL, ALPHA_POOLED = 0.20, 0.05
"""What a cell of 5 twins supports, and what all boards here have."""


@dataclass(frozen=True)
class Findings:
    """scores: a row a detector and run; detectors: their summary; left_out: runs that are not judged; says: lines.

    judged: what the scores were made from.
    """

    judged: Judged
    scores: pd.DataFrame
    detectors: pd.DataFrame
    left_out: pd.DataFrame
    says: tuple[str, ...]

    def write(self, out: Path) -> None:
        out.mkdir(parents=True, exist_ok=True)
        for name, table in (("runs", self.scores), ("detectors", self.detectors), ("left_out", self.left_out)):
            table.to_csv(out / f"{name}.csv", index=False, float_format="%.6g")


def score_imported(runs: Sequence[Trace], alpha: float | None = None) -> Findings:
    """Score runs from elsewhere. alpha: of both thresholds, in a cell and pooled, instead of their own."""
    cells = cells_of(runs)
    return findings(cells, (*SPIKE_RULES, *_own_rules(cells)), alpha)


def findings(cells: Sequence[Cell], rules: Sequence[FixedRule], alpha: float | None = None) -> Findings:
    """The same of cells that are there already, and of these rules without calibration."""
    judged, tables, says = judge(cells, rules), [], [*_labels(cells), *_unwatched(cells)]
    for pooled, rate in ((False, alpha or ALPHA_IN_CELL), (True, alpha or ALPHA_POOLED)):
        try:
            table = calibrated_scores(judged, rate, pooled)
            reason = "no run has enough healthy twins"
        except ValueError as error:
            table, reason = pd.DataFrame(), str(error)
        where = "pooled over cells" if pooled else "in a cell"
        if table.empty:
            says.append(f"no threshold {where} at {rate:.0%} false alarms: {reason}")
        else:
            judged_runs = table["run_id"].nunique()
            all_runs = sum(len(cell.experiment.runs) for cell in cells)
            of_all = f"{judged_runs} of {all_runs}"
            says.append(f"thresholds {where} at {rate:.0%} false alarms: {of_all} runs have enough healthy twins")
            if not pooled:
                says.append("in a cell some healthy run must be the largest: false alarms there are so by construction")
        tables.append(table)
    tables.append(fixed_scores(judged))
    says += _alone(cells)
    scores = pd.concat([table for table in tables if len(table)], ignore_index=True) if any(map(len, tables)) else None
    left_out = [(cell.name, run, reason) for cell in cells for run, reason in cell.left_out.items()]
    if left_out:
        says.append(f"{len(left_out)} runs are not judged, such as {left_out[0][1]}: {left_out[0][2]}")
    if scores is None:
        raise ValueError(f"no run can be judged: {says[-1]}")
    unjudged = pd.DataFrame(left_out, columns=["cell", "run_id", "reason"])
    return Findings(judged, scores, summary(scores), unjudged, tuple(says))


def _own_rules(cells: Sequence[Cell]) -> list[FixedRule]:
    """The bound of the self track for every signal, and the limits that signals' own sources publish."""
    rules: list[FixedRule] = []
    described = {s: cell.experiment.signals[s] for cell in cells if cell.experiment.runs for s in cell.signals}
    for name, signal in described.items():
        rules.append(SelfBound(name, signal.bad))
        if signal.above is not None or signal.below is not None:
            rules.append(PublishedLimit(signal))
    return rules


def _labels(cells: Sequence[Cell]) -> list[str]:
    lines = []
    for label in dict.fromkeys(cell.label for cell in cells):
        of_label = [cell for cell in cells if cell.label == label]
        failed = sum(len(cell.experiment.of("faulty")) for cell in of_label)
        judged = sum(len(cell.experiment.runs) for cell in of_label)
        what = "validation loss" if label.signal == LABEL_SIGNAL else "training loss, as there is no validation loss"
        lines.append(f"{failed} of {judged} judged runs fail, by {what}: a rise of {label.rise_nats:g} nats")
    return lines


def _unwatched(cells: Sequence[Cell]) -> list[str]:
    """Of signals that some cells have and others lack."""
    shared = shared_signals(cells)
    lost = {name: cell.name for cell in cells if cell.experiment.runs for name in cell.signals if name not in shared}
    return [f"{name} is watched by rules alone: cell {cell} has it and others lack it" for name, cell in lost.items()]


def _alone(cells: Sequence[Cell]) -> list[str]:
    """Of runs without a twin: nothing can be calibrated."""
    single = [cell for cell in cells if len(cell.experiment.runs) + len(cell.left_out) == 1]
    if not single:
        return []
    runs = f"run {single[0].name} has" if len(single) == 1 else f"{len(single)} runs have"
    judges = "only the self track at its bound, and published limits"
    return [f"{runs} no seed twin: {judges}; their false alarms are unknown"]


def print_findings(result: Findings, console: Console) -> None:
    """The detectors' table on a terminal, and what must be known to read it."""
    columns = ("thresholds", "detector", "detected", "95 %", "late", "missed", "mean lead", "false alarms", "95 %")
    table = Table(*columns, box=None, pad_edge=False)
    for row in result.detectors.to_dict("records"):
        rate = "" if pd.isna(row["alpha"]) else f" {row['alpha']:.0%}"
        table.add_row(
            f"{row['scope']}{rate}",
            row["detector"],
            f"{row['detected']}/{row['failures']}",
            _interval(row["detected_low"], row["detected_high"]),
            str(row["late"]),
            str(row["missed"]),
            "" if pd.isna(row["lead_steps"]) else f"{row['lead_steps']:,.0f}",
            f"{row['false_alarms']}/{row['healthy_runs']}",
            _interval(row["false_alarm_low"], row["false_alarm_high"]),
        )
    console.print(table)
    for line in result.says:
        console.print(f"- {line}", highlight=False, markup=False)


def _interval(low: float, high: float) -> str:
    return "" if pd.isna(low) else f"{low:.0%}-{high:.0%}".replace("%-", "-")
