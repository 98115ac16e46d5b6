"""The trace of a run: tidy Parquet parts and a manifest. Needs no torch, and no code of ours to read.

A run's folder holds ``manifest.json``, ``trace/part-<first>-<last>.parquet`` (steps, inclusive),
``checkpoint.pt`` while it is unfinished and ``weights.safetensors`` once it is done. Every file is
written whole under another name and renamed into place, so a kill leaves whole files only.

Columns of a part: step, tokens (training tokens seen by then), signal, layer and head (-1 where the
signal has no such axis), value, and undefined: true marks a missing sample (a zero update has no entropy),
while a NaN or Inf that is not undefined arose from a nonzero computation.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

SCHEMA_VERSION = 2

SCHEMA = pa.schema(
    [
        ("step", pa.int64()),
        ("tokens", pa.int64()),
        ("signal", pa.dictionary(pa.int32(), pa.string())),
        ("layer", pa.int16()),
        ("head", pa.int16()),
        ("value", pa.float64()),
        ("undefined", pa.bool_()),
    ],
    metadata={"foreshock.schema": str(SCHEMA_VERSION)},
)

FINAL_REASONS = ("completed", "diverged", "non_finite")
"""End reasons of a finished run; ``running``, ``interrupted`` and ``failed`` runs are resumed."""


class TraceError(Exception):
    """A trace that is missing, damaged, or of another schema version."""


def write_whole(path: Path, data: bytes) -> None:
    """Write a file so that a kill at any moment leaves the old one or the new one, never a piece."""
    temporary = path.with_name(path.name + ".partial")
    try:
        with open(temporary, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise


def write_manifest(folder: Path, manifest: Mapping[str, Any]) -> None:
    write_whole(folder / "manifest.json", json.dumps(manifest, indent=1, sort_keys=True).encode() + b"\n")


def read_manifest(folder: Path) -> dict[str, Any] | None:
    """The run's manifest, or None where the folder has none. Raises TraceError if it is damaged."""
    path = folder / "manifest.json"
    try:
        manifest = json.loads(path.read_text())
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise TraceError(f"{path} is damaged ({error}): delete the folder to run it again") from None
    if manifest.get("schema") != SCHEMA_VERSION:
        raise TraceError(f"{path} has schema version {manifest.get('schema')}, this code reads {SCHEMA_VERSION}")
    return manifest


def _parts(folder: Path) -> list[tuple[int, int, Path]]:
    """(first step, last step, path) of every part, in order."""
    parts = []
    for path in (folder / "trace").glob("part-*.parquet"):
        _, first, last = path.stem.split("-")
        parts.append((int(first), int(last), path))
    return sorted(parts)


def _read_part(path: Path, signals: Iterable[str] | None = None) -> pa.Table:
    try:
        if signals is None:  # a file by itself costs a third of what a data set of one file does
            with pq.ParquetFile(path) as part:
                return part.read()
        return pq.read_table(path, filters=[("signal", "in", list(signals))])
    except (pa.ArrowException, OSError) as error:
        reason = str(error).splitlines()[0]
        raise TraceError(f"trace part {path} is damaged ({reason}): delete the run's folder to run it again") from None


def write_part(folder: Path, first_step: int, last_step: int, columns: Mapping[str, Any]) -> None:
    """Write the rows of steps first_step to last_step as one part."""
    table = pa.table({name: pa.array(columns[name], SCHEMA.field(name).type) for name in SCHEMA.names}, SCHEMA)
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, compression="zstd")
    (folder / "trace").mkdir(exist_ok=True)
    write_whole(folder / "trace" / f"part-{first_step:09d}-{last_step:09d}.parquet", sink.getvalue().to_pybytes())


def cut_back(folder: Path, step: int) -> None:
    """Drop every row after ``step``: what a killed run wrote beyond its last checkpoint."""
    for first, last, path in _parts(folder):
        if first > step:
            path.unlink()
        elif last > step:
            table = _read_part(path)
            kept = table.filter(pa.compute.less_equal(table["step"], step))
            write_part(folder, first, step, {name: kept[name].combine_chunks() for name in SCHEMA.names})
            path.unlink()


@dataclass(frozen=True)
class Series:
    """One signal of one run: steps and tokens (N,), values and undefined (N, layers, heads).

    An absent axis has length 1.
    """

    steps: np.ndarray
    tokens: np.ndarray
    values: np.ndarray
    undefined: np.ndarray


@dataclass(frozen=True)
class Trace:
    """A finished run as saved: its manifest, and its signals by name."""

    run_id: str
    folder: Path
    manifest: Mapping[str, Any]
    wanted: tuple[str, ...] | None = None

    @property
    def onset(self) -> int | None:
        """The first step whose weights a faulty update may have touched; None for a healthy run."""
        return self.manifest["onset_step"]

    @property
    def end_reason(self) -> str:
        return self.manifest["end_reason"]

    @property
    def horizon(self) -> int:
        return self.manifest["config"]["train"]["steps"]

    @cached_property
    def signals(self) -> Mapping[str, Series]:
        """Every saved signal (or those asked for). Raises TraceError on damaged parts or repeated steps."""
        parts = _parts(self.folder)
        if not parts:
            raise TraceError(f"run {self.run_id} in {self.folder} has no trace")
        table = pa.concat_tables(_read_part(path, self.wanted) for _, _, path in parts).combine_chunks()
        return series_of(table, self.run_id)


def series_of(table: pa.Table, run_id: str) -> dict[str, Series]:
    """One run's rows, in any order, as series by signal. Raises TraceError on missing or repeated steps."""
    name_column = table["signal"].unify_dictionaries().combine_chunks()
    if isinstance(name_column, pa.ChunkedArray):
        name_column = name_column.chunk(0) if name_column.num_chunks else pa.DictionaryArray.from_arrays([], [])
    codes = name_column.indices.to_numpy(zero_copy_only=False)
    step, tokens, layer, head, value, undefined = (
        table[name].to_numpy() for name in ("step", "tokens", "layer", "head", "value", "undefined")
    )
    order = np.lexsort((head, layer, step, codes))
    bounds = np.flatnonzero(np.diff(codes[order], prepend=-1, append=-1)) if len(order) else []
    signals = {}
    step, tokens, layer, head, value, undefined = (x[order] for x in (step, tokens, layer, head, value, undefined))
    for start, stop in pairwise(bounds):
        name = name_column.dictionary[int(codes[order[start]])].as_py()
        cells = int(np.searchsorted(step[start:stop], step[start], side="right"))
        layers = len(np.unique(layer[start : start + cells]))
        at = step[start:stop].reshape(-1, cells) if (stop - start) % cells == 0 else None
        if at is None or cells % layers or (at != at[:, :1]).any() or (np.diff(at[:, 0]) <= 0).any():
            raise TraceError(f"run {run_id}: signal {name!r} has missing or repeated steps")
        shape = (-1, layers, cells // layers)
        seen = tokens[start:stop:cells]
        signals[name] = Series(
            at[:, 0].copy(), seen, value[start:stop].reshape(shape), undefined[start:stop].reshape(shape)
        )
    return signals


def read(folder: Path | str, signals: Iterable[str] | None = None) -> Trace:
    """The trace of a finished run. ``signals``: names to load, or None for all. Raises TraceError."""
    folder = Path(folder)
    manifest = read_manifest(folder)
    if manifest is None:
        raise TraceError(f"{folder} holds no run: it has no manifest.json")
    if manifest["end_reason"] not in FINAL_REASONS:
        raise TraceError(f"run {folder.name} is unfinished ({manifest['end_reason']}): run it again to resume it")
    return Trace(folder.name, folder, manifest, None if signals is None else tuple(signals))
