"""Runs reduced to what scoring needs, small enough to commit: one file of signals, one of manifests.

A reduced folder holds ``experiment.json`` (the experiment's index), ``runs.json`` (manifests, what all share
written once), ``checksums.json`` (the SHA-256 of each of the others; an older folder has none and is read unchecked)
and ``signals.parquet``: the rows of a trace (``experiments.trace``) with the run's id, for the signals of the
experiment's detectors and the label, at multiples of its ``score_every``, as FP32 rounded to
``SHARE_OF_SPREAD`` of the spread that the reference runs have at that sample: far below what any z-score can mean.
Labels that need the whole training loss are computed before it is thinned.

    python -m analysis.reduced report=DIR runs=DIR out=DIR
"""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from analysis.align import hold, thin
from analysis.tracks import DeclinedSignal, ReferenceBand
from experiments import trace
from experiments.files import read_checked, sha256, write_whole
from experiments.trace import Series, Trace, TraceError
from experiments.usage import misused, show_help

SHARE_OF_SPREAD = 1 / 32
INDEX, SIGNALS, RUNS, CHECKSUMS = "experiment.json", "signals.parquet", "runs.json", "checksums.json"


def rounded(values: np.ndarray, quantum: np.ndarray) -> np.ndarray:
    """The nearest multiples of a quantum, which is lowered to a power of 2, as FP32; NaN, Inf and quantum 0 stay."""
    step = np.exp2(np.floor(np.log2(np.where(quantum > 0, quantum, 1.0))))
    with np.errstate(invalid="ignore"):
        nearest = np.round(values / step) * step
    return np.where(np.isfinite(values) & (quantum > 0), nearest, values).astype(np.float32)


def quanta(name: str, reference: Sequence[Series]) -> tuple[np.ndarray, np.ndarray]:
    """Steps and, (T, layers), what a signal may be rounded to there; no steps where reference runs have no spread."""
    try:
        band = ReferenceBand.fit(name, [hold(one, "steps", one.steps) for one in reference])
    except DeclinedSignal:
        return np.empty(0, int), np.empty((0, 1))
    return band.positions, SHARE_OF_SPREAD * band.scale


def common(records: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The keys and values that all records have alike, nested mappings included."""
    first, found = records[0], {}
    for key, value in first.items():
        others = [record.get(key) for record in records]
        if all(other == value for other in others):
            found[key] = value
        elif all(isinstance(other, Mapping) for other in others):
            found[key] = common(others)
    return found


def without(record: Mapping[str, Any], shared: Mapping[str, Any]) -> dict[str, Any]:
    """What ``merged(shared, ...)`` needs to give the record again."""
    rest = {}
    for key, value in record.items():
        if key not in shared:
            rest[key] = value
        elif value != shared[key]:
            rest[key] = without(value, shared[key])
    return rest


def merged(shared: Mapping[str, Any], rest: Mapping[str, Any]) -> dict[str, Any]:
    """The record of which ``common`` and ``without`` made two."""
    record = dict(shared)
    for key, value in rest.items():
        record[key] = merged(shared[key], value) if isinstance(shared.get(key), Mapping) else value
    return record


def _rows(run: Trace, signals: Mapping[str, tuple[np.ndarray, np.ndarray]], every: int) -> pa.Table:
    parts = []
    for name, (known, quantum) in signals.items():
        if name not in run.signals:
            continue
        series = thin(run.signals[name], every)
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
    wanted = ["held_out_loss", *dict.fromkeys(s for names in index["experiment"]["detectors"].values() for s in names)]
    every = index["experiment"].get("score_every", 1)
    roles = {cell["run_id"]: cell["role"] for cell in index["runs"]}
    reference = [run for run in runs if roles[run.run_id] == "reference"]
    signals = {
        name: quanta(name, [run.signals[name] for run in reference])
        for name in wanted
        if all(name in run.signals for run in reference)
    }
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
        table.replace_schema_metadata({"foreshock.schema": str(trace.SCHEMA_VERSION)}),
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
    if version != str(trace.SCHEMA_VERSION):
        raise TraceError(f"{folder / SIGNALS} has schema version {version}, this code reads {trace.SCHEMA_VERSION}")
    signal = table.column_names.index("signal")
    table = table.set_column(signal, "signal", pc.dictionary_encode(table["signal"])).sort_by("run")
    runs = table["run"].to_numpy()
    bounds = [0, *(np.flatnonzero(runs[1:] != runs[:-1]) + 1).tolist(), len(runs)]
    found = {}
    for start, stop in pairwise(bounds):
        run_id = runs[start]
        try:
            series = trace.series_of(table.slice(start, stop - start), run_id)
            manifest = merged(records["shared"], records["runs"][run_id])
        except KeyError as error:
            raise damaged(path, f"run {run_id} has no {error}") from None
        found[run_id] = ReducedTrace(run_id, folder, manifest, series)
    return found


def main(arguments: list[str]) -> None:
    show_help(arguments, __doc__)
    from analysis.experiment import load
    from analysis.sensitivity import other_labels

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
