"""The trace of a run: tidy Parquet parts and a manifest. Needs no torch, and no code of ours to read.

A run's folder holds ``manifest.json``, ``trace/part-<first>-<last>.parquet`` (steps, inclusive),
``checkpoint.pt`` while it is unfinished and ``weights.safetensors`` once it is done. Every file is
written whole under another name and renamed into place, so a kill leaves whole files only
(``experiments.files``). ``files`` of the manifest, which is sealed, has the SHA-256 of every part and of the weights;
a manifest without ``files`` is an older one, whose files are read unchecked.

Columns of a part: step, tokens (training tokens seen by then), signal, layer and head (-1 where the
signal has no such axis), value, and undefined: true marks a missing sample (a zero update has no entropy),
while a NaN or Inf that is not undefined arose from a nonzero computation. At which steps a signal has readings, its
entry in ``signals`` of the manifest says: ``every_steps``, and ``jittered`` (``monitors.cadence``).

``events`` of the manifest are what has happened to the run beside its training, each with the updates applied by then
(``step``): ``resume``, with what was ``forgotten``, and ``checkpoint_lost``, with the ``reason`` and the step that the
run went back to. A run that was merely interrupted and resumed has none. ``error`` is why a run has ``failed``.
"""

from __future__ import annotations

import shlex
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from foreshock.experiments.files import damage, read_checked, sealed, sha256, unsealed, write_whole
from foreshock.experiments.migration import from_schema_2, from_schema_3, with_card
from foreshock.faults.card import InjectionCard, read_card
from foreshock.monitors.signal import Signal, read_signal

TRACE, WEIGHTS = "trace", "weights.safetensors"

ATTACHED = "attached"
"""Key of a manifest of ``foreshock.attach``, and the role of its run; no run of ours has it."""

ELSEWHERE = "elsewhere"
"""Key of a manifest that says where a run was trained; no run of ours has it."""

SCHEMA_VERSION = 4
"""Of the manifest. Versions 2 and 3 are read too (``experiments.migration``)."""

PART_STEPS = 200
"""Steps of an attached run from one part of its trace to the next: what a kill can lose."""

COLUMNS_VERSION = 2
"""Of the columns of a part."""

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
    metadata={"foreshock.schema": str(COLUMNS_VERSION)},
)

FINAL_REASONS = ("completed", "diverged", "non_finite")
"""End reasons of a finished run; ``running``, ``interrupted`` and ``failed`` runs of ours are resumed.

An attached run (``ATTACHED``) is never resumed, and what it has written is read whatever its end reason: ``running``
while it trains and after a kill, ``stopped`` where its watch has stopped itself before the training ended.
"""

REQUIRED = ("config", "onset_step", "end_reason", "signals")
"""Keys that every manifest has."""


class TraceError(Exception):
    """A trace that is missing, damaged, or of another schema version."""


def write_manifest(folder: Path, manifest: Mapping[str, Any]) -> None:
    write_whole(folder / "manifest.json", sealed(manifest, sort_keys=True))


def manifest_of(folder: Path) -> dict[str, Any]:
    """The run's manifest. Raises TraceError if the folder has none, or it is damaged."""
    manifest = read_manifest(folder)
    if manifest is None:
        raise TraceError(f"{folder} holds no run: it has no manifest.json")
    return manifest


def read_manifest(folder: Path) -> dict[str, Any] | None:
    """The run's manifest, or None where the folder has none. Raises TraceError if it is damaged."""
    path = folder / "manifest.json"
    try:
        manifest = unsealed(path.read_bytes())
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise damaged(path, error, folder) from None
    lost = next((key for key in REQUIRED if key not in manifest), None)
    if lost is not None:
        raise damaged(path, f"it has no {lost}", folder)
    try:
        return as_of_today(manifest, path)
    except (TypeError, ValueError, KeyError) as error:
        raise damaged(path, error, folder) from None


def as_of_today(manifest: Mapping[str, Any], path: Path) -> dict[str, Any]:
    """A manifest of this schema version, or of an older one as this has it.

    Raises TraceError, with ``path``, where it is of another, and TypeError, ValueError or KeyError where it describes
    no signals.
    """
    version = manifest.get("schema")
    if version == 2:
        return with_card(from_schema_3(from_schema_2(manifest)))
    if version == 3:
        return with_card(from_schema_3(manifest))
    if version != SCHEMA_VERSION:
        raise TraceError(
            f"{path} has schema version {version}, and this code reads {SCHEMA_VERSION}, 3 and 2: read it with the "
            f"release that wrote it, or {_instead(path.parent)}"
        )
    return with_card(manifest)


def damaged(path: Path, reason: object, folder: Path) -> TraceError:
    """The error for a file of a run that is not what was written: reason, and what to do, in one line."""
    said = " ".join(str(reason).split())
    return TraceError(f"{path} is damaged ({said}): {_instead(folder)}")


def _instead(folder: Path) -> str:
    """What to do about a run that cannot be read; its manifest, damaged or not, tells where the run is from."""
    name = shlex.quote(str(folder))
    try:
        manifest = (folder / "manifest.json").read_bytes()
    except OSError:
        manifest = b""
    if f'"{ATTACHED}":'.encode() in manifest:
        return f"restore {name} from a copy, or move it away: nothing but its own training has these readings"
    if f'"{ELSEWHERE}":'.encode() in manifest:
        return f"rm -r {name}, then import the run again"
    if b'"config":' not in manifest:
        return f"move {name} away, as nothing tells where the run is from, and train it again if it is this project's"
    return f"rm -r {name}, then train the run again"


def is_readable(manifest: Mapping[str, Any]) -> bool:
    """Whether a run has readings to read: one that is finished, or an attached one that has written any."""
    return manifest["end_reason"] in FINAL_REASONS or (ATTACHED in manifest and bool(manifest.get("files")))


def check_files(folder: Path, manifest: Mapping[str, Any]) -> None:
    """Raises TraceError where a file of a finished run is missing or damaged."""
    if manifest["end_reason"] in FINAL_REASONS:
        _check(folder, manifest.get("files", {}))


def _check(folder: Path, files: Mapping[str, str]) -> None:
    for name, expected in files.items():
        reason = damage(folder / name, expected)
        if reason is not None:
            raise damaged(folder / name, reason, folder)


def is_done(folder: Path) -> bool:
    """Whether a folder holds a finished run. Raises TraceError where a file of it is missing or damaged."""
    manifest = read_manifest(folder)
    if manifest is None:
        return False
    check_files(folder, manifest)
    return manifest["end_reason"] in FINAL_REASONS


def _parts(folder: Path) -> list[Path]:
    """Every part in the folder, in order."""
    return sorted((folder / TRACE).glob("part-*.parquet"))


def write_part(folder: Path, first_step: int, last_step: int, columns: Mapping[str, Any]) -> dict[str, str]:
    """Write the rows of steps first_step to last_step as one part; its entry in ``files`` of the manifest."""
    table = pa.table({name: pa.array(columns[name], SCHEMA.field(name).type) for name in SCHEMA.names}, SCHEMA)
    return write_table(folder, f"part-{first_step:09d}-{last_step:09d}", table)


def write_table(folder: Path, name: str, table: pa.Table) -> dict[str, str]:
    """Write rows as a part of this name; its entry in ``files`` of the manifest."""
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, compression="zstd")
    (folder / TRACE).mkdir(exist_ok=True)
    return write_file(folder, f"{TRACE}/{name}.parquet", sink.getvalue().to_pybytes())


def write_file(folder: Path, name: str, data: bytes) -> dict[str, str]:
    """Write a file of a run; its entry in ``files`` of the manifest."""
    write_whole(folder / name, data)
    return {name: sha256(data)}


def cut_back(folder: Path, files: Mapping[str, str]) -> None:
    """Drop every part that is not in ``files``, what the last checkpoint knows: a killed run wrote it beyond that.

    Raises TraceError where a part that should be there is missing or damaged; nothing is dropped then.
    """
    _check(folder, files)
    for path in [*_parts(folder), *folder.rglob("*.partial")]:
        if f"{TRACE}/{path.name}" not in files:
            path.unlink()


def read_weights(folder: Path) -> bytes:
    """``weights.safetensors`` of a finished run. Raises TraceError where it is missing or damaged."""
    manifest, path = read(folder).manifest, folder / WEIGHTS
    try:
        return read_checked(path, manifest["files"][WEIGHTS]) if "files" in manifest else path.read_bytes()
    except (ValueError, KeyError, FileNotFoundError) as error:
        raise damaged(path, error, folder) from None


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
    """A run as saved, finished or attached: its manifest, and its signals by name."""

    run_id: str
    folder: Path
    manifest: Mapping[str, Any]
    wanted: tuple[str, ...] | None = None

    @property
    def onset(self) -> int | None:
        """The first step whose weights a faulty update may have touched; None for a healthy run."""
        onset: int | None = self.manifest["onset_step"]
        return onset

    @cached_property
    def card(self) -> InjectionCard:
        """What the run's fault does. Raises TraceError where the manifest says nothing of the kind."""
        try:
            return read_card(self.manifest["injection"])
        except (TypeError, ValueError, KeyError) as error:
            raise TraceError(f"run {self.run_id} in {self.folder} does not say what its fault does: {error}") from None

    @property
    def end_reason(self) -> str:
        reason: str = self.manifest["end_reason"]
        return reason

    @property
    def horizon(self) -> int:
        steps: int = self.manifest["config"]["train"]["steps"]
        return steps

    @cached_property
    def described(self) -> Mapping[str, Signal]:
        """What the manifest says of each signal, by name. Raises TraceError where that is no signal."""
        try:
            return {name: read_signal({"name": name, **signal}) for name, signal in self.manifest["signals"].items()}
        except (TypeError, ValueError, KeyError) as error:
            raise TraceError(f"run {self.run_id} in {self.folder} does not describe its signals: {error}") from None

    @cached_property
    def signals(self) -> Mapping[str, Series]:
        """Every saved signal (or those asked for). Raises TraceError on missing or damaged parts or repeated steps."""
        parts = _parts(self.folder)
        known = self.manifest.get("files")
        if known is not None:
            parts = [self.folder / name for name in known if name.startswith(f"{TRACE}/")]  # others are a kill's
        if not parts:
            raise TraceError(f"run {self.run_id} in {self.folder} has no trace")
        return series_of(pa.concat_tables(map(self._read_part, parts)).combine_chunks(), self.run_id)

    def _read_part(self, path: Path) -> pa.Table:
        known = self.manifest.get("files")
        try:
            data = path.read_bytes() if known is None else read_checked(path, known[f"{TRACE}/{path.name}"])
            if self.wanted is None:  # a file by itself costs a third of what a data set of one file does
                return pq.ParquetFile(pa.BufferReader(data)).read()
            return pq.read_table(pa.BufferReader(data), filters=[("signal", "in", list(self.wanted))])
        except (pa.ArrowException, OSError, ValueError) as error:
            raise damaged(path, error, self.folder) from None


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
    bounds = np.flatnonzero(np.diff(codes[order], prepend=-1, append=-1)) if len(order) else np.empty(0, int)
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
    """The trace of a finished run, or what an attached one has written by now. ``signals``: names, None for all.

    Raises TraceError where there is none.
    """
    folder = Path(folder)
    manifest = manifest_of(folder)
    if not is_readable(manifest):
        ended = f"({manifest['end_reason']})"
        if ATTACHED in manifest:
            raise TraceError(
                f"run {folder.name} {ended} has no readings: foreshock.attach writes them every {PART_STEPS} steps and "
                "at close(), and it came to neither"
            )
        raise TraceError(f"run {folder.name} is unfinished {ended}: run it again to resume it")
    return Trace(folder.name, folder, manifest, None if signals is None else tuple(signals))
