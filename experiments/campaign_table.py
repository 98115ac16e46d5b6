"""What came out of a campaign: a row for every run, and one for every change that its fault made."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from foreshock.experiments import trace
from foreshock.experiments.build import Run
from foreshock.experiments.campaign_runs import Cell
from foreshock.experiments.faults import said_keys
from foreshock.experiments.files import write_whole
from foreshock.experiments.training.run_writer import HELD_OUT

RUNS, INJECTIONS = "runs.csv", "injections.csv"
REFUSED = "refused"


@dataclass(frozen=True)
class Outcome:
    """A cell, its run or why it is refused, and the healthy runs of the same training."""

    cell: Cell
    run: Run | ValueError
    twins: Sequence[Run]


def write_tables(report: Path, outcomes: Sequence[Outcome], out: Path) -> None:
    """Write ``runs.csv`` and ``injections.csv``. out: the folder of run folders."""
    manifests = [_manifest(outcome, out) for outcome in outcomes]
    rows = [_row(*pair, out) for pair in zip(outcomes, manifests, strict=True)]
    changes = [
        {"run_id": manifest["run_id"], "fault": outcome.cell.fault, **entry}
        for outcome, manifest in zip(outcomes, manifests, strict=True)
        for entry in manifest.get("injected", ())
    ]
    for name, table in ((RUNS, rows), (INJECTIONS, changes)):
        write_whole(report / name, pd.DataFrame(table).to_csv(index=False).encode())


def _manifest(outcome: Outcome, out: Path) -> dict[str, Any]:
    """Of the run; empty where there is none yet."""
    if isinstance(outcome.run, ValueError):
        return {}
    return trace.read_manifest(out / outcome.run.run_id) or {}


def _row(outcome: Outcome, manifest: dict[str, Any], out: Path) -> dict[str, Any]:
    """What was meant, what was changed, and how the run ended; a column is empty where there is nothing to say."""
    cell, run = outcome.cell, outcome.run
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
    twin = next((twin for twin in outcome.twins if twin.seed == run.seed), None)
    return {
        **row,
        "family": card.family,
        "onset": run.fault.onset,
        "meant": json.dumps([asdict(injection) for injection in card.injections]),
        "points": " ".join(dict.fromkeys(entry["point"] for entry in changed)),
        "tensors": len({entry["tensor"] for entry in changed}),
        "elements": sum(entry["elements"] for entry in changed),
        "norm": float(np.sqrt(sum(entry["norm"] ** 2 for entry in changed))),
        "end_reason": manifest.get("end_reason", "not trained"),
        "steps": manifest.get("steps_done", 0),
        "held_out_loss": _final_loss(out / run.run_id),
        "healthy_loss": float("nan") if twin is None else _final_loss(out / twin.run_id),
    }


def _final_loss(folder: Path) -> float:
    """The last held-out loss of a run, in nats a token; NaN where it has not ended."""
    try:
        values = trace.read(folder, [HELD_OUT.name]).signals[HELD_OUT.name].values
    except (trace.TraceError, OSError):
        return float("nan")
    return float(values.ravel()[-1])
