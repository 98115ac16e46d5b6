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
from foreshock.experiments.training.run_writer import HELD_OUT

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
    whole = begun is not None and begun["observations"] == run.observations
    watched = run if whole else replace(run, monitors=missing)
    if begun is not None and begun["observations"] != watched.observations:  # the monitors have changed since
        shutil.rmtree(again)
    again.mkdir(exist_ok=True)
    return watched, again, manifest_in(again, watched)


def same_trajectory(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    """Whether two manifests are of runs with the same weights at every step that both know, and the same end."""
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
        trace.write_manifest(folder / AGAIN, new_manifest(run))
        return False
    replaced = {n: s for n, s in again["signals"].items() if n != HELD_OUT.name}
    number = 1 + sum(trace.TRACE in name for name in manifest["files"])
    files = {trace.WEIGHTS: manifest["files"][trace.WEIGHTS]}
    for source, known, drop in (
        (folder, manifest["files"], set(replaced)),  # outdated ones of the same monitors
        (folder / AGAIN, again["files"], {HELD_OUT.name}),
    ):
        for name in (name for name in known if name.startswith(f"{trace.TRACE}/")):
            table = pq.ParquetFile(source / name).read()
            rows = table.filter(pc.invert(pc.is_in(table["signal"].cast(pa.string()), pa.array(sorted(drop)))))
            if source == folder and len(rows) == len(table):
                files[name] = known[name]
            elif len(rows):
                first, last = name.removesuffix(".parquet").split("-")[1:3]
                files |= trace.write_table(folder, f"part-{first}-{last}-{number}", rows)
            number += 1
    outdated = set(manifest["files"]) - set(files)
    manifest["files"] = files
    manifest["signals"] |= replaced
    manifest["observations"] |= again["observations"]
    manifest["config"]["monitor"] |= again["config"]["monitor"]
    for spent in ("wall_s", "cpu_s"):
        manifest[spent] += again[spent]
    trace.write_manifest(folder, manifest)
    for name in outdated:
        (folder / name).unlink()
    shutil.rmtree(folder / AGAIN)
    return True


def take_its_place(folder: Path) -> dict[str, Any]:
    """Let the whole run in ``folder/again`` take the place of the one that it was trained in; its manifest."""
    again, old = folder.with_name(f"{folder.name}.{AGAIN}"), folder.with_name(f"{folder.name}.old")
    (folder / AGAIN).rename(again)
    folder.rename(old)
    again.rename(folder)
    shutil.rmtree(old)
    return trace.manifest_of(folder)
