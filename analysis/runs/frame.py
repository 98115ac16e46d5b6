"""Readings of saved runs as one tidy table: run folders, a reduced set and runs from elsewhere alike."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from foreshock.analysis.runs import reduced
from foreshock.analysis.runs.discover import fault_names, role_of
from foreshock.analysis.runs.index import read_index
from foreshock.experiments import trace
from foreshock.experiments.names import check_distinct
from foreshock.experiments.trace import ELSEWHERE, Trace, TraceError
from foreshock.experiments.validation import nearest

COLUMNS = ("run_id", "step", "tokens", "signal", "layer", "head", "value", "undefined", "fault", "seed", "role")
HEALTHY = "healthy"

Facts = Mapping[str, dict[str, Any]]
"""By run id its fault, seed and role."""


def load(folder: Path | str, signals: Iterable[str] | None = None, runs: Iterable[str] | None = None) -> pd.DataFrame:
    """The readings of the finished runs in a folder, a row a reading, sorted by run and signal as they are saved.

    Of attached runs it reads what is there, whether or not they came to their end (``end_reason`` of the manifest).

    folder: of run folders, of a reduced set, or of runs from elsewhere; experiments below it are found too.
    signals, runs: names of those that are wanted, all by default.

    Columns: run_id, signal, fault (``healthy`` where there is none) and role, categories; step and tokens, int64;
    layer and head, int16, -1 where the signal has no such axis; value, float64, NaN where ``undefined`` (a missing
    sample) or where the run computed one; undefined, bool; seed, int64. Role: of the index beside the runs, of the
    import, ``attached``, or that of the seed (``experiments.plan``).

    Raises ValueError for a signal or run that is not there, with the nearest, and TraceError where there is no
    finished run or a file is damaged.
    """
    folder = Path(folder)
    wanted = _names(signals, "signals")
    chosen = _chosen(folder, _sources(folder, wanted), wanted, _names(runs, "runs"))
    tables = [frame_of(run, facts) for run, facts in chosen]
    table = pd.concat(_alike(tables), ignore_index=True)
    missing = [name for name in wanted or () if name not in set(table["signal"].cat.categories)]
    if missing:
        raise ValueError(f"signals={missing[0]!r}: no run in {folder} has it{nearest(missing[0], _signals(folder))}")
    return table


def frame_of(run: Trace, facts: Mapping[str, Any]) -> pd.DataFrame:
    """One run's readings, as ``load`` gives them. facts: its fault, seed and role."""
    parts = []
    for name, series in run.signals.items():
        sample, layer, head = np.indices(series.values.shape, np.int32).reshape(3, -1)
        axes = run.manifest["signals"].get(name, {}).get("axes", ())
        part = {
            "step": series.steps[sample],
            "tokens": series.tokens[sample],
            "layer": (layer if "layer" in axes else np.full(layer.shape, -1)).astype(np.int16),
            "head": (head if "head" in axes else np.full(head.shape, -1)).astype(np.int16),
            "value": np.where(series.undefined, np.nan, series.values).astype(float).ravel(),
            "undefined": series.undefined.ravel(),
        }
        parts.append((name, part))
    counts = [len(part["step"]) for _, part in parts]
    table = pd.DataFrame({key: np.concatenate([part[key] for _, part in parts]) for key in parts[0][1]})
    table["signal"] = pd.Categorical.from_codes(np.repeat(range(len(parts)), counts), [name for name, _ in parts])
    table["run_id"] = pd.Categorical.from_codes(np.zeros(len(table), np.int8), [run.run_id])
    for key in ("fault", "role"):
        table[key] = pd.Categorical.from_codes(np.zeros(len(table), np.int8), [facts[key]])
    return table.assign(seed=np.int64(facts["seed"]))[list(COLUMNS)]


class Written(NamedTuple):
    """files: how many were written; left_out: by run that has none, why."""

    files: int
    left_out: dict[str, str]


def write_csv(
    folder: Path, out: Path, signals: Iterable[str] | None = None, runs: Iterable[str] | None = None
) -> Written:
    """One CSV file a run, ``<run_id>.csv``, one run in memory at a time. Raises as ``load``."""
    out.mkdir(parents=True, exist_ok=True)
    wanted, only = _names(signals, "signals"), _names(runs, "runs")
    written: set[str] = set()
    sources = _sources(folder, wanted)
    for run, facts in _chosen(folder, sources, wanted, only):
        frame_of(run, facts).to_csv(out / f"{run.run_id}.csv", index=False)
        written.add(run.run_id)
    lacking = "it has no readings" if wanted is None else f"it has no readings of {', '.join(wanted)}"
    left_out = {run: lacking for run in only or sources if run not in written}
    return Written(len(written), left_out | ({} if only else _unfinished(folder)))


def _names(given: Iterable[str] | None, option: str) -> tuple[str, ...] | None:
    """Names that an option gives, each once. Raises ValueError."""
    if given is None:
        return None
    names = (given,) if isinstance(given, str) else tuple(given)
    check_distinct(names, option)
    return names


def _alike(tables: list[pd.DataFrame]) -> list[pd.DataFrame]:
    """Tables whose categories are the same, so that joining them keeps categories."""
    for column in ("run_id", "signal", "fault", "role"):
        names = list(dict.fromkeys(name for table in tables for name in table[column].cat.categories))
        for table in tables:
            table[column] = table[column].cat.set_categories(names)
    return tables


def _chosen(
    folder: Path, sources: Mapping[str, Source], signals: tuple[str, ...] | None, runs: tuple[str, ...] | None
) -> Iterator[tuple[Trace, dict[str, Any]]]:
    """Every wanted run with a wanted signal, and its facts. sources: of the folder, with these signals."""
    missing = [run for run in runs or () if run not in sources]
    if missing:
        raise ValueError(f"runs={missing[0]!r}: no finished run in {folder} is called so{nearest(missing[0], sources)}")
    known = {run: manifest for run, (manifest, _) in sources.items()}
    facts = _facts(folder, known)
    some = False
    for run_id in runs or sources:
        run = sources[run_id][1]()
        if run.signals:
            some = True
            yield run, facts[run_id]
    if not some:
        name = (signals or ("",))[0]
        raise ValueError(f"signals={name!r}: no run in {folder} has it{nearest(name, _signals(folder))}")


Source = tuple[Mapping[str, Any], Callable[[], Trace]]
"""A run's manifest, and what reads its trace."""


def _sources(folder: Path, signals: tuple[str, ...] | None) -> dict[str, Source]:
    """By id every readable run below a folder. Raises TraceError where there is none, or an id is there twice."""
    if not folder.is_dir():
        raise TraceError(f"{folder} does not exist")
    sources: dict[str, Source] = {}

    def add(run_id: str, source: Source) -> None:
        if run_id in sources:
            raise TraceError(f"{folder} holds run {run_id} twice: load its folders apart")
        sources[run_id] = source

    for path in sorted({path.parent for path in folder.rglob(reduced.SIGNALS)}):
        for run_id, run in reduced.read(path).items():
            add(run_id, (run.manifest, partial(_only, run, signals)))
    for path in sorted(folder.rglob("manifest.json")):
        manifest = trace.read_manifest(path.parent) if (path.parent / trace.TRACE).is_dir() else None
        if manifest is not None and trace.is_readable(manifest):
            add(path.parent.name, (manifest, partial(trace.read, path.parent, signals)))
    if not sources:
        raise TraceError(f"{folder} holds no finished run")
    return sources


def _unfinished(folder: Path) -> dict[str, str]:
    """By folder of a run that cannot be read yet, why."""
    manifests = {path.parent: trace.manifest_of(path.parent) for path in sorted(folder.rglob("manifest.json"))}
    reasons: dict[str, str] = {}
    for path, manifest in manifests.items():
        if not trace.is_readable(manifest):
            reasons[str(path.relative_to(folder))] = f"it is {manifest['end_reason']}, and not finished"
        elif not (path / trace.TRACE).is_dir():
            reasons[str(path.relative_to(folder))] = "its trace is missing"
    return reasons


def _only(run: Trace, signals: tuple[str, ...] | None) -> Trace:
    """A run of a reduced folder with the wanted signals alone."""
    if signals is None:
        return run
    kept = {name: series for name, series in run.signals.items() if name in signals}
    return reduced.ReducedTrace(run.run_id, run.folder, run.manifest, kept)


def _signals(folder: Path) -> list[str]:
    """Every signal that some run has."""
    return list(dict.fromkeys(name for manifest, _ in _sources(folder, None).values() for name in manifest["signals"]))


def _facts(folder: Path, manifests: Mapping[str, Mapping[str, Any]]) -> Facts:
    """By run id: of the index beside the runs where there is one, else from the manifests."""
    names = dict(zip(manifests, fault_names(list(manifests.values())), strict=True))
    facts = {}
    for run_id, manifest in manifests.items():
        fault = None if manifest["onset_step"] is None else names[run_id]
        role = manifest.get(ELSEWHERE, {}).get("role") or role_of(manifest, fault)
        role = "elsewhere" if ELSEWHERE in manifest and not manifest[ELSEWHERE].get("role") else role
        facts[run_id] = {"fault": fault or HEALTHY, "seed": manifest["seed"], "role": role}
    for path in sorted(folder.rglob("experiment.json")):
        for cell in read_index(path.parent)["runs"]:
            if cell["run_id"] in facts:
                facts[cell["run_id"]] |= {"fault": cell["fault"] or HEALTHY, "role": cell["role"]}
    return facts
