"""Public training logs with real failures, as cells: AlgoPerf submissions and language models in FP6.

A folder holds ``algoperf_series.parquet`` (run_id, step, train_loss, grad_norm, validation_loss; empty where nothing
was read) with ``algoperf_runs.csv`` (run_id, workload, submission, trial, study, hparams), and
``mx_fp6_series.parquet`` (run_id, step, train_loss, grad_norm). docs/elsewhere.md says where they come from.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from foreshock.analysis.runs.csv_table import read_table
from foreshock.analysis.runs.elsewhere import MIN_READINGS, TRAIN_LOSS
from foreshock.analysis.runs.labels import LABEL_SIGNAL
from foreshock.analysis.runs.reduced import ReducedTrace
from foreshock.experiments.elsewhere.known_signals import KNOWN
from foreshock.experiments.elsewhere.readings import Readings
from foreshock.experiments.elsewhere.traces import ImportedRun
from foreshock.experiments.files import sha256
from foreshock.experiments.trace import Trace

ALGOPERF, ALGOPERF_RUNS, FP6 = "algoperf_series.parquet", "algoperf_runs.csv", "mx_fp6_series.parquet"
FILES = (ALGOPERF, ALGOPERF_RUNS, FP6)
COLUMNS = {"train_loss": TRAIN_LOSS, "grad_norm": "grad_global_norm", "validation_loss": LABEL_SIGNAL}
CELL_KEYS = ("workload", "submission", "trial", "hparams")
"""Runs of AlgoPerf that have these alike are seed twins; their studies are their seeds."""

FP6_CELL = "mx_fp6"


def checksums(folder: Path) -> dict[str, str]:
    """SHA-256 of every file. Raises ValueError where one is missing."""
    missing = [name for name in FILES if not (folder / name).is_file()]
    if missing:
        raise ValueError(f"logs={folder} has no {missing[0]}: docs/elsewhere.md says where the logs come from")
    return {name: sha256((folder / name).read_bytes()) for name in FILES}


def algoperf_runs(folder: Path) -> list[Trace]:
    """The AlgoPerf runs, with the cells of seed twins in their manifests."""
    runs = read_table(folder / ALGOPERF_RUNS, str(folder / ALGOPERF_RUNS), ("run_id", "study", *CELL_KEYS))
    seen: dict[str, int] = {}
    cells, seeds = {}, {}
    for row in runs.to_dict("records"):
        cells[row["run_id"]] = " ".join(str(row[key]) for key in CELL_KEYS)
        seeds[row["run_id"]] = seen.setdefault(cells[row["run_id"]], 0)
        seen[cells[row["run_id"]]] += 1
    series = _series(folder / ALGOPERF, tuple(COLUMNS))
    unknown = sorted(set(series) - set(cells))
    if unknown:
        raise ValueError(f"{folder / ALGOPERF_RUNS} has no row for run {unknown[0]} of {ALGOPERF}")
    return [_trace(run, cells[run], seeds[run], of_run, folder / ALGOPERF) for run, of_run in series.items()]


def fp6_runs(folder: Path) -> list[Trace]:
    """The FP6 runs with at least ``MIN_READINGS`` readings, as one cell.

    They are no seed twins: healthy runs of one format stand for those of another, read at another cadence.
    """
    series = {
        run_id: of_run
        for run_id, of_run in _series(folder / FP6, ("train_loss", "grad_norm")).items()
        if len(of_run[TRAIN_LOSS].steps) >= MIN_READINGS
    }
    return [_trace(run_id, FP6_CELL, i, of_run, folder / FP6) for i, (run_id, of_run) in enumerate(series.items())]


def _series(path: Path, columns: tuple[str, ...]) -> dict[str, dict[str, Readings]]:
    """By run id and signal. Raises ValueError on a file that is none, a missing column, and steps that do not rise."""
    try:
        table = pq.read_table(path, columns=["run_id", "step", *columns]).to_pandas()
    except (pa.ArrowException, OSError, ValueError) as error:
        raise ValueError(f"{path} cannot be read: {' '.join(str(error).split())}") from None
    runs: dict[str, dict[str, Readings]] = {}
    for run_id, rows in table.groupby("run_id", sort=False):
        for column in columns:
            known = rows[rows[column].notna()]
            steps = known["step"].to_numpy(np.int64)
            if (np.diff(steps) <= 0).any():
                raise ValueError(f"{path}: run {run_id} has unsorted or repeated steps of {column}")
            if len(steps):
                values = known[column].to_numpy(float)
                readings = Readings(column, steps, np.zeros(len(steps), np.int64), values)
                runs.setdefault(str(run_id), {})[COLUMNS[column]] = readings
    return runs


def _trace(run_id: str, cell: str, seed: int, readings: Mapping[str, Readings], path: Path) -> Trace:
    """A run as a trace that is not on disk."""
    signals: dict[str, Any] = {name: KNOWN[name] for name in readings}
    run = ImportedRun(run_id, cell, seed, None, signals, readings, {"format": "parquet", "file": path.name})
    return ReducedTrace(run_id, path.parent, run.manifest(), run.series())
