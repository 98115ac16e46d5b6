"""What came out of a campaign: a row for every run, and one for every change that its fault made."""

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
    table = pd.DataFrame(rows)
    for name, content in ((RUNS, table), (INJECTIONS, pd.DataFrame(changes)), (OUTCOMES, outcomes(table))):
        write_whole(report / name, content.to_csv(index=False).encode())
    return table


def outcomes(table: pd.DataFrame) -> pd.DataFrame:
    """One row a fault, dose and site: its runs by outcome, the most frequent first. table: as ``runs.csv``.

    outcome: such as ``gradual drift 3, no effect 2``; better: runs that end below every healthy one; excess: median
    over the runs of the final loss less the healthy median, in nats a token, Inf where it is not finite.
    """
    rows = []
    told = table[table.outcome.fillna("") != ""] if "outcome" in table else table[:0]
    for keys, runs in told.groupby(["fault", "dose", "site", "needs"], sort=False, dropna=False):
        counts = runs.outcome.value_counts(sort=True)
        rows.append(
            dict(zip(("fault", "dose", "site", "needs"), keys, strict=True))
            | {
                "seeds": len(runs),
                "steps": int(runs.steps.max()),
                "outcome": ", ".join(f"{name} {count}" for name, count in counts.items()),
                "better": int((runs.note == BETTER).sum()),
                "excess": round(float((runs.final_loss - runs.healthy_final_loss).fillna(np.inf).median()), 3),
            }
        )
    return pd.DataFrame(
        rows, columns=["fault", "dose", "site", "needs", "seeds", "steps", "outcome", "better", "excess"]
    )


def _manifest(result: Result, out: Path) -> dict[str, Any]:
    """Of the run; empty where there is none yet."""
    if isinstance(result.run, ValueError):
        return {}
    return trace.read_manifest(out / result.run.run_id) or {}


def _row(result: Result, manifest: dict[str, Any]) -> dict[str, Any]:
    """What was meant and what was changed; a column is empty where there is nothing to say."""
    cell, run = result.cell, result.run
    row: dict[str, Any] = {
        "run_id": "" if isinstance(run, ValueError) else run.run_id,
        "fault": cell.fault,
        "dose": said_keys(cell.dose),
        "site": said_keys(cell.site),
        "needs": cell.needs,
        "seed": cell.seed,
    }
    if isinstance(run, ValueError):
        return {**row, "end_reason": REFUSED, "reason": str(run)}
    card = run.fault.describe()
    changed = manifest.get("injected", ())
    return {
        **row,
        "family": card.family,
        "onset": card.first_step,
        "meant": json.dumps([asdict(injection) for injection in card.injections]),
        "points": " ".join(dict.fromkeys(entry["point"] for entry in changed)),
        "tensors": len({entry["tensor"] for entry in changed}),
        "elements": sum(entry["elements"] for entry in changed),
        "norm": float(np.sqrt(sum(entry["norm"] ** 2 for entry in changed))),
        "end_reason": manifest.get("end_reason", "not trained"),
        "steps": manifest.get("steps_done", 0),
    }


def _end(result: Result, out: Path, label: DrawupLabel) -> dict[str, Any]:
    """What became of a run against its healthy twins, where they have ended; final losses in nats a token.

    One twin alone tells no outcome, as it has no range.
    """
    if isinstance(result.run, ValueError):
        return {}
    try:
        end = outcome_of_folders(out / result.run.run_id, [out / twin.run_id for twin in result.twins], label)
    except (trace.TraceError, OSError):
        return {}
    return {
        "outcome": end.outcome if len(result.twins) > 1 else "",
        "note": end.note if len(result.twins) > 1 else "",
        "final_loss": end.final_loss,
        "healthy_final_loss": float(np.median(end.healthy_final_losses)),
        "twins": len(result.twins),
    }
