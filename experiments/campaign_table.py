"""What came out of a campaign: a row for every run, one for every change that its fault made, one for every fault."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from foreshock.analysis.runs.labels import DrawupLabel
from foreshock.analysis.runs.outcomes import BETTER, outcome_of_folders
from foreshock.experiments import trace
from foreshock.experiments.build import Run
from foreshock.experiments.campaign_runs import Cell
from foreshock.experiments.faults import said_keys
from foreshock.experiments.files import write_whole

RUNS, INJECTIONS, OUTCOMES = "runs.csv", "injections.csv", "outcomes.csv"
REFUSED = "refused"
OF_A_FAULT = ["fault", "family", "needs", "dose", "site"]
OF_A_RUN = ["run_id", *OF_A_FAULT, "seed", "onset", "meant", "points", "tensors", "elements", "end_reason", "reason"]
OF_AN_END = ["steps", "outcome", "note", "final_loss", "healthy_final_loss", "twins"]
OF_AN_INJECTION = ["run_id", "fault", "point", "operation", "tensor", "steps", "elements", "norm"]
OF_OUTCOMES = [*OF_A_FAULT, "seeds", "steps", "outcome", "better", "excess"]
WHOLE = ["seed", "onset", "tensors", "elements", "steps", "twins"]
"""Columns of whole numbers, which may be missing."""


@dataclass(frozen=True)
class Result:
    """A cell, its run or why it is refused, and the healthy runs of the same training."""

    cell: Cell
    run: Run | ValueError
    twins: Sequence[Run]


def write_tables(report: Path, results: Sequence[Result], out: Path, label: DrawupLabel) -> pd.DataFrame:
    """Write ``runs.csv``, which is returned, ``injections.csv`` and ``outcomes.csv``. out: of the run folders."""
    manifests = [_manifest(result, out) for result in results]
    rows = [
        _row(result, manifest) | _end(result, out, label) for result, manifest in zip(results, manifests, strict=True)
    ]
    changes = [
        {"run_id": manifest["run_id"], "fault": result.cell.fault, **entry}
        for result, manifest in zip(results, manifests, strict=True)
        for entry in manifest.get("injected", ())
    ]
    runs = pd.DataFrame(rows, columns=[*OF_A_RUN, *OF_AN_END]).astype(dict.fromkeys(WHOLE, "Int64"))
    tables = {RUNS: runs, INJECTIONS: pd.DataFrame(changes, columns=OF_AN_INJECTION), OUTCOMES: outcomes(runs)}
    for name, table in tables.items():
        write_whole(report / name, table.to_csv(index=False).encode())
    return runs


def outcomes(runs: pd.DataFrame) -> pd.DataFrame:
    """One row a fault, dose and site: its runs by outcome, the most frequent first. runs: as ``runs.csv``.

    outcome: such as ``gradual drift 3, no effect 2``; better: runs that end below every healthy one; excess: median
    over the runs of the final loss less the healthy median, in nats a token, Inf where it is not finite.
    """
    rows = []
    for keys, of_fault in runs[runs.outcome.notna()].groupby(OF_A_FAULT, sort=False, dropna=False):
        counts = of_fault.outcome.value_counts()
        excess = (of_fault.final_loss - of_fault.healthy_final_loss).fillna(np.inf).median()
        said = ", ".join(f"{name} {count}" for name, count in counts.items())
        better = int((of_fault.note == BETTER).sum())
        rows.append((*keys, len(of_fault), of_fault.steps.max(), said, better, round(float(excess), 3)))
    return pd.DataFrame(rows, columns=OF_OUTCOMES)


def _manifest(result: Result, out: Path) -> dict[str, Any]:
    """Of the run; empty where there is none yet."""
    if isinstance(result.run, ValueError):
        return {}
    return trace.read_manifest(out / result.run.run_id) or {}


def _row(result: Result, manifest: dict[str, Any]) -> dict[str, Any]:
    """What was meant and what was changed; a key is missing where there is nothing to say."""
    cell, run = result.cell, result.run
    row: dict[str, Any] = {
        "fault": cell.fault,
        "family": cell.family,
        "needs": cell.needs,
        "dose": said_keys(cell.dose),
        "site": said_keys(cell.site),
        "seed": cell.seed,
        "onset": cell.onset,
    }
    if isinstance(run, ValueError):
        return {**row, "end_reason": REFUSED, "reason": str(run)}
    card, changed = run.fault.describe(), manifest.get("injected", ())
    return {
        **row,
        "run_id": run.run_id,
        "onset": card.first_step,
        "meant": json.dumps([asdict(injection) for injection in card.injections]),
        "points": " ".join(dict.fromkeys(entry["point"] for entry in changed)),
        "tensors": len({entry["tensor"] for entry in changed}),
        "elements": sum(entry["elements"] for entry in changed),
        "end_reason": manifest.get("end_reason", "not trained"),
        "reason": manifest.get("error"),
        "steps": manifest.get("steps_done", 0),
    }


def _end(result: Result, out: Path, label: DrawupLabel) -> dict[str, Any]:
    """What became of a run that has ended against its completed healthy twins; final losses in nats a token.

    One twin alone tells no outcome, as it has no range.
    """
    folders = [out / twin.run_id for twin in result.twins]
    twins = [folder for folder in folders if (trace.read_manifest(folder) or {}).get("end_reason") == "completed"]
    if isinstance(result.run, ValueError) or not twins:
        return {}
    try:
        end = outcome_of_folders(out / result.run.run_id, twins, label)
    except (trace.TraceError, OSError):
        return {}
    told = {"outcome": end.outcome, "note": end.note} if len(twins) > 1 else {}
    healthy = float(np.median(end.healthy_final_losses))
    return {**told, "final_loss": end.final_loss, "healthy_final_loss": healthy, "twins": len(twins)}
