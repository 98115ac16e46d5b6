"""A finished run that lacks a monitor's readings is trained again for those alone.

They are taken only where the weights' checksums show that it was the same trajectory. Where they do not, on a processor
that rounds otherwise, the run is trained whole in its place.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from foreshock.experiments import trace
from foreshock.experiments.build import Run
from foreshock.experiments.training.manifest import manifest_in, new_manifest
from foreshock.experiments.training.run_writer import CLEAN, HELD_OUT

LABELS = {HELD_OUT.name, CLEAN.name}
"""What a run has without monitors."""

AGAIN = "again"
"""The folder in a run's own where it is trained again."""


def without_readings(run: Run, manifest: Mapping[str, Any]) -> list[str]:
    """The run's monitors that a finished run's manifest has no readings of, as they are configured and written now."""
    known = manifest.get("observations", run.observations)  # an older manifest is taken as it is
    return [name for name, observation in run.observations.items() if known.get(name) != observation]


def is_complete(folder: Path, run: Run) -> bool:
    """Whether a folder holds the finished run and every reading. Raises TraceError where a file is lost or damaged."""
    return trace.is_done(folder) and not without_readings(run, trace.manifest_of(folder))


def trained_again(run: Run, folder: Path, manifest: Mapping[str, Any]) -> tuple[Run, Path, dict[str, Any]]:
    """A finished run that lacks readings, as it is trained again: watched by whom, its folder there and its manifest.

    After ``take_over`` has failed, it is watched by all its monitors.
    """
    again, begun = folder / AGAIN, trace.read_manifest(folder / AGAIN)
    missing = {name: run.monitors[name] for name in without_readings(run, manifest)}
    watched = run if is_whole(begun) else replace(run, monitors=missing)
    if begun is not None and begun["observations"] != watched.observations:  # the monitors have changed since
        shutil.rmtree(again)
        watched = replace(run, monitors=missing)
    again.mkdir(exist_ok=True)
    return watched, again, manifest_in(again, watched)


def is_whole(manifest: Mapping[str, Any] | None) -> bool:
    """Whether a run that is trained again is to take the place of the old one."""
    return manifest is not None and manifest.get("whole", False)


def same_trajectory(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    """Whether two manifests are of runs with the same checksums of their weights, and the same end."""
    keys = ("weights_sha256", "steps_done", "end_reason")
    return all(one[key] == other[key] for key in keys) and one["files"][trace.WEIGHTS] == other["files"][trace.WEIGHTS]


def take_over(run: Run, folder: Path, manifest: dict[str, Any]) -> bool:
    """Add the readings of ``folder/again`` to the run's own; if that was another trajectory, begin the whole run there.

    Returns whether it was the same. A kill at any moment leaves the run as it was, or with the readings.
    """
    again = trace.manifest_of(folder / AGAIN)
    if not same_trajectory(manifest, again):
        shutil.rmtree(folder / AGAIN)
        (folder / AGAIN).mkdir()
        trace.write_manifest(folder / AGAIN, new_manifest(run) | {"whole": True})
        return False
    emitted = manifest["emitted"]
    outdated = {signal for name in again["observations"] for signal in emitted.get(name, ())}
    number = 1 + max((_number(name) for name in manifest["files"]), default=0)
    files = {trace.WEIGHTS: manifest["files"][trace.WEIGHTS]}
    for offset, (source, known, drop) in enumerate(
        ((folder, manifest["files"], outdated), (folder / AGAIN, again["files"], LABELS))
    ):
        for name in (name for name in known if name.startswith(f"{trace.TRACE}/")):
            table = pq.ParquetFile(source / name).read()
            rows = table.filter(
                pc.invert(pc.is_in(table["signal"].cast(pa.string()), pa.array(sorted(drop), pa.string())))
            )
            if source == folder and len(rows) == len(table):
                files[name] = known[name]
            elif len(rows):
                first, last = name.removesuffix(".parquet").split("-")[1:3]
                files |= trace.write_table(folder, f"part-{first}-{last}-{number + offset}", rows)
    gone = set(manifest["files"]) - set(files)
    kept = {name: signal for name, signal in manifest["signals"].items() if name not in outdated}
    manifest["files"] = files
    manifest["signals"] = kept | {n: s for n, s in again["signals"].items() if n not in LABELS}
    for key in ("observations", "emitted"):
        manifest[key] |= again[key]
    manifest["config"]["monitor"] |= again["config"]["monitor"]
    for spent in ("wall_s", "cpu_s"):
        manifest[spent] += again[spent]
    trace.write_manifest(folder, manifest)
    for name in gone:
        (folder / name).unlink()
    shutil.rmtree(folder / AGAIN)
    return True


def _number(part: str) -> int:
    """Of a part ``part-<first>-<last>-<number>.parquet`` that was added or written anew; 0 for another file."""
    pieces = part.removesuffix(".parquet").split("-")
    return int(pieces[3]) if len(pieces) > 3 else 0


def take_its_place(folder: Path) -> dict[str, Any]:
    """Let the whole run in ``folder/again`` take the place of the one that it was trained in; its manifest."""
    (folder / AGAIN).rename(_aside(folder))
    finish_replacing(folder)
    return trace.manifest_of(folder)


def finish_replacing(folder: Path) -> None:
    """Finish what a kill may have stopped in ``take_its_place``: a run that lies aside takes its place."""
    if _aside(folder).exists():
        if folder.exists():
            shutil.rmtree(folder)
        _aside(folder).rename(folder)


def _aside(folder: Path) -> Path:
    """Where a whole run waits for the old one to go; no folder of runs looks there."""
    return folder.with_name(f".{folder.name}.{AGAIN}")
