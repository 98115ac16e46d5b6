"""Runs reduced to what scoring needs, small enough to commit: one file of signals, one of manifests.

A reduced folder holds ``experiment.json`` (the experiment's index), ``runs.json`` (manifests, what all share
written once), ``checksums.json`` (the SHA-256 of each of the others; an older folder has none and is read unchecked)
and ``signals.parquet``: the rows of a trace (``experiments.trace``) with the run's id, for the signals of the
experiment's detectors and the label, as often as its ``score_every`` says, as FP32 rounded to
``SHARE_OF_SPREAD`` of the spread that the reference runs have at that sample: far below what any z-score can mean.
Labels that need the whole training loss are computed before it is thinned.

    python -m analysis.reduced report=DIR runs=DIR out=DIR
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from foreshock.analysis.detect.bands import DeclinedSignal, ReferenceBand
from foreshock.analysis.runs.align import hold, thin
from foreshock.analysis.runs.labels import CLEAN_SIGNAL, LABEL_SIGNAL
from foreshock.analysis.runs.load import load
from foreshock.analysis.runs.reduced import CHECKSUMS, INDEX, RUNS, SIGNALS, read
from foreshock.analysis.scores.sensitivity import other_labels
from foreshock.experiments import trace
from foreshock.experiments.files import sha256, write_whole
from foreshock.experiments.trace import Series, Trace, TraceError
from foreshock.experiments.usage import misused, show_help

__all__ = ["main", "read", "write"]

SHARE_OF_SPREAD = 1 / 32


def rounded(values: np.ndarray, quantum: np.ndarray) -> np.ndarray:
    """The nearest multiples of a quantum, which is lowered to a power of 2, as FP32; NaN, Inf and quantum 0 stay."""
    step = np.exp2(np.floor(np.log2(np.where(quantum > 0, quantum, 1.0))))
    with np.errstate(invalid="ignore"):
        nearest = np.round(values / step) * step
    return np.where(np.isfinite(values) & (quantum > 0), nearest, values).astype(np.float32)


def quanta(name: str, reference: Sequence[Series]) -> tuple[np.ndarray, np.ndarray]:
    """Steps and, (T, layers), what a signal may be rounded to there; no steps where reference runs have no spread."""
    try:
        band = ReferenceBand.fit(name, [hold(series, "steps", series.steps) for series in reference])
    except DeclinedSignal:
        return np.empty(0, int), np.empty((0, 1))
    return band.positions, SHARE_OF_SPREAD * band.scale


def common(records: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The keys and values that all records have alike, nested mappings included."""
    first, shared = records[0], {}
    for key, value in first.items():
        others: list[Any] = [record.get(key) for record in records]
        if all(other == value for other in others):
            shared[key] = value
        elif all(isinstance(other, Mapping) for other in others):
            shared[key] = common(others)
    return shared


def without(record: Mapping[str, Any], shared: Mapping[str, Any]) -> dict[str, Any]:
    """What ``merged(shared, ...)`` needs to give the record again."""
    rest = {}
    for key, value in record.items():
        if key not in shared:
            rest[key] = value
        elif value != shared[key]:
            rest[key] = without(value, shared[key])
    return rest


def _rows(run: Trace, signals: Mapping[str, tuple[np.ndarray, np.ndarray]], every: int) -> pa.Table:
    parts = []
    for name, (known, quantum) in signals.items():
        if name not in run.signals:
            continue
        series = thin(run.signals[name], run.described[name].cadence.thinned(every))
        values = series.values.copy()
        at = np.isin(series.steps, known)
        values[at] = rounded(values[at], quantum[np.searchsorted(known, series.steps[at])][..., None])
        sample, layer, head = np.indices(values.shape).reshape(3, -1)
        axes = run.manifest["signals"][name]["axes"] if name in run.manifest["signals"] else []
        parts.append(
            {
                "step": series.steps[sample],
                "tokens": series.tokens[sample],
                "signal": np.full(values.size, name, object),
                "layer": layer if "layer" in axes else np.full(values.size, -1),
                "head": head if "head" in axes else np.full(values.size, -1),
                "value": values.ravel().astype(np.float32),
                "undefined": series.undefined.ravel(),
            }
        )
    columns = {key: np.concatenate([part[key] for part in parts]) for key in parts[0]}
    return pa.table({"run": np.full(len(columns["step"]), run.run_id, object), **columns})


def write(index: Mapping[str, Any], runs: Sequence[Trace], labels: Mapping[str, Mapping], out: Path) -> None:
    """Write a reduced folder. labels: by run id, divergence by every other label, kept in the manifests."""
    detected = (signal for names in index["experiment"]["detectors"].values() for signal in names)
    wanted = list(dict.fromkeys((LABEL_SIGNAL, CLEAN_SIGNAL, *detected)))
    every = index["experiment"].get("score_every", 1)
    roles = {cell["run_id"]: cell["role"] for cell in index["runs"]}
    reference = [run for run in runs if roles[run.run_id] == "reference"]
    signals = {
        name: quanta(name, [run.signals[name] for run in reference])
        for name in wanted
        if all(name in run.signals for run in reference)
    }
    if any(CLEAN_SIGNAL in run.signals for run in runs):  # of faulty runs alone: as fine as their own label
        signals[CLEAN_SIGNAL] = signals[LABEL_SIGNAL]
    table = pa.concat_tables(_rows(run, signals, every) for run in runs)
    # Rows that follow one another are then alike in all but the value.
    table = table.sort_by([(name, "ascending") for name in ("signal", "layer", "head", "run", "step")])
    for name, kind in (("step", pa.int32()), ("layer", pa.int8()), ("head", pa.int8())):
        table = table.set_column(table.column_names.index(name), name, table[name].cast(kind))
    manifests = {}
    for run in runs:
        manifest = {**run.manifest, "labels": labels[run.run_id]}
        manifest["signals"] = {name: manifest["signals"][name] for name in wanted if name in manifest["signals"]}
        manifest["config"] = {key: value for key, value in manifest["config"].items() if key != "monitor"}
        manifest.pop("files", None)  # which are not here
        manifests[run.run_id] = manifest
    shared = common(list(manifests.values()))
    sink = pa.BufferOutputStream()
    pq.write_table(
        table.replace_schema_metadata({"foreshock.schema": str(trace.COLUMNS_VERSION)}),
        sink,
        compression="zstd",
        compression_level=19,
        use_dictionary=["run", "signal", "layer", "head", "step", "tokens"],
        column_encoding={"value": "BYTE_STREAM_SPLIT"},
    )
    per_run = {run: without(manifest, shared) for run, manifest in manifests.items()}
    lines = ",\n".join(f"{json.dumps(run)}: {json.dumps(rest, sort_keys=True)}" for run, rest in per_run.items())
    shared_lines = json.dumps(shared, indent=1, sort_keys=True)
    files = {
        INDEX: f"{json.dumps(index, indent=1)}\n".encode(),
        RUNS: f'{{"shared": {shared_lines},\n"runs": {{\n{lines}\n}}}}\n'.encode(),
        SIGNALS: sink.getvalue().to_pybytes(),
    }
    out.mkdir(parents=True, exist_ok=True)
    write_checksums(out, {name: sha256(data) for name, data in files.items()})
    for name, data in files.items():
        write_whole(out / name, data)


def write_checksums(folder: Path, known: Mapping[str, str]) -> None:
    """Write ``checksums.json``. Before the files: until all are written, they do not match it."""
    write_whole(folder / CHECKSUMS, f"{json.dumps(known, indent=1)}\n".encode())


def main(arguments: list[str]) -> None:
    show_help(arguments, __doc__)
    given = dict(argument.split("=", 1) for argument in arguments if "=" in argument)
    if set(given) != {"report", "runs", "out"} or len(given) != len(arguments):
        misused("python -m analysis.reduced report=DIR runs=DIR out=DIR")
    report, out = Path(given["report"]), Path(given["out"])
    try:
        experiment = load(report, Path(given["runs"]))
    except (ValueError, OSError, TraceError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(2)
    write(experiment.index, [run.trace for run in experiment.runs], other_labels(experiment), out)
    size = sum(path.stat().st_size for path in out.iterdir())
    print(f"{out}: {len(experiment.runs)} runs, {size / 2**20:.2f} MiB")


if __name__ == "__main__":
    main(sys.argv[1:])
