"""Runs reduced to what scoring needs, as they are read.

A reduced folder holds ``experiment.json`` (the experiment's index), ``runs.json`` (manifests, what all share
written once), ``checksums.json`` (the SHA-256 of each of the others; an older folder has none and is read unchecked)
and ``signals.parquet``: the rows of a trace (``experiments.trace``) with the run's id, rounded. ``analysis.reduced``
writes it.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from foreshock.experiments import trace
from foreshock.experiments.files import read_checked
from foreshock.experiments.trace import Series, Trace, TraceError

INDEX, SIGNALS, RUNS, CHECKSUMS = "experiment.json", "signals.parquet", "runs.json", "checksums.json"


def merged(shared: Mapping[str, Any], rest: Mapping[str, Any]) -> dict[str, Any]:
    """The record of which ``common`` and ``without`` made two."""
    record = dict(shared)
    for key, value in rest.items():
        record[key] = merged(shared[key], value) if isinstance(shared.get(key), Mapping) else value
    return record


def content(folder: Path, name: str) -> bytes:
    """A file of a reduced folder. Raises TraceError where it is missing or, if the folder has checksums, damaged."""
    path = folder / CHECKSUMS
    try:
        known = json.loads(path.read_bytes())[name] if path.exists() else None
        path = folder / name
        return path.read_bytes() if known is None else read_checked(path, known)
    except (ValueError, KeyError, TypeError, FileNotFoundError) as error:
        raise damaged(path, error) from None


def damaged(path: Path, reason: object) -> TraceError:
    """The error for a file of a reduced folder that is not what was written, with what to do."""
    return TraceError(
        f"{path} is damaged ({str(reason).splitlines()[0]}): git checkout -- {shlex.quote(str(path.parent))}, or "
        f"python -m analysis.reduced report=DIR runs=DIR out={shlex.quote(str(path.parent))} for runs of your own"
    )


class ReducedTrace(Trace):
    """A run out of a reduced folder; its signals are there already."""

    def __init__(self, run_id: str, folder: Path, manifest: Mapping[str, Any], signals: Mapping[str, Series]) -> None:
        super().__init__(run_id, folder, manifest)
        self.__dict__["signals"] = signals


def is_reduced(folder: Path) -> bool:
    return (folder / SIGNALS).exists() or (folder / CHECKSUMS).exists()


def read(folder: Path) -> dict[str, Trace]:
    """Every run of a reduced folder, by id. Raises TraceError where it is damaged or of another schema version."""
    path = folder / SIGNALS
    try:
        table = pq.read_table(pa.BufferReader(content(folder, SIGNALS)))
        path = folder / RUNS
        records = json.loads(content(folder, RUNS))
    except (pa.ArrowException, OSError, ValueError) as error:
        raise damaged(path, error) from None
    version = (table.schema.metadata or {}).get(b"foreshock.schema", b"none").decode()
    if version != str(trace.COLUMNS_VERSION):
        raise TraceError(f"{folder / SIGNALS} has schema version {version}, this code reads {trace.COLUMNS_VERSION}")
    signal = table.column_names.index("signal")
    table = table.set_column(signal, "signal", pc.dictionary_encode(table["signal"])).sort_by("run")
    runs = table["run"].to_numpy()
    bounds = [0, *(np.flatnonzero(runs[1:] != runs[:-1]) + 1).tolist(), len(runs)]
    traces: dict[str, trace.Trace] = {}
    for start, stop in pairwise(bounds):
        run_id = runs[start]
        try:
            series = trace.series_of(table.slice(start, stop - start), run_id)
            manifest = trace.as_of_today(merged(records["shared"], records["runs"][run_id]), folder / RUNS)
        except KeyError as error:
            raise damaged(path, f"run {run_id} has no {error}") from None
        except (TypeError, ValueError) as error:
            raise damaged(path, f"run {run_id}: {error}") from None
        traces[run_id] = ReducedTrace(run_id, folder, manifest, series)
    return traces
