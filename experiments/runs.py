"""The runs in a folder: ``python -m experiments.runs [list|adopt|prune] [out=runs] [delete=true]``.

``list`` tells of each what it is, who watched it, and whether today's sources would train it again, and why. ``adopt``
asks whether a change of the sources was harmless: of each model and fault it trains one old run's first steps again,
and where the weights' checksums are the same, old runs of these sources count as today's
(``results/equivalences.json``). ``prune`` names the runs that are of no use any more, and with ``delete=true`` deletes
them.
"""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from foreshock.experiments import trace
from foreshock.experiments.build import Run, build_run
from foreshock.experiments.places import check_folder_to_read
from foreshock.experiments.training import checkpoint, equivalences
from foreshock.experiments.training.data import load_once
from foreshock.experiments.training.identity import trajectory_sources
from foreshock.experiments.training.loop import CHECKSUM_EVERY_STEPS
from foreshock.experiments.training.run_writer import weights_sha256
from foreshock.experiments.training.source_code import digest_of
from foreshock.experiments.usage import fail, misused, show_help

USAGE = "python -m experiments.runs [list|adopt|prune] [out=runs] [delete=true]"
COMMANDS = ("list", "adopt", "prune")
SENTINEL_STEPS = 200
CURRENT, UNKNOWN = "", "written before sources were kept apart"
UNJUDGED = "cannot be judged here"


@dataclass(frozen=True)
class Stored:
    """A run folder. stale: why today's sources would train it again, empty where they would not."""

    folder: Path
    manifest: Mapping[str, Any]
    stale: str

    @property
    def kind(self) -> tuple[str, str]:
        """Its model and training, and its fault's class, of which one run is trained to adopt the others."""
        config = self.manifest["config"]
        return json.dumps([config["model"], config["train"]], sort_keys=True), config["fault"]["_target_"]


def stored_in(out: Path) -> list[Stored]:
    """Every run folder, oldest first."""
    files = [path for path in out.glob("*/manifest.json") if not path.parent.name.startswith(".")]
    return [_stored(path.parent) for path in sorted(files, key=lambda path: path.stat().st_mtime)]


def _stored(folder: Path) -> Stored:
    try:
        manifest = trace.manifest_of(folder)
    except trace.TraceError as error:
        return Stored(folder, {}, f"{UNJUDGED}: {error}")
    return Stored(folder, manifest, why_stale(folder.name, manifest))


def run_of(manifest: Mapping[str, Any]) -> Run:
    """The run as today's sources would train it. Raises ValueError or FileNotFoundError where they cannot."""
    return build_run({**manifest["config"], "plugins": manifest.get("plugins", [])}, load_once)


def why_stale(run_id: str, manifest: Mapping[str, Any]) -> str:
    """Why the run would be trained again: the sources that changed since, or PyTorch."""
    if trace.ATTACHED in manifest or trace.ELSEWHERE in manifest:
        return f"{UNJUDGED}: it was not trained by this project"
    if "sources" not in manifest:
        return UNKNOWN
    version = torch.__version__.split("+")[0]
    if manifest["torch"] != version:
        return f"PyTorch was {manifest['torch']}, is {version}"
    try:
        run = run_of(manifest)
        sources = {name: digest_of([(name, path)]) for name, path in trajectory_sources(run.nodes)}
        if run.run_id == run_id:
            return CURRENT
    except (ValueError, FileNotFoundError) as error:
        return f"{UNJUDGED}: {error}"
    changed = sorted(n for n in {*sources, *manifest["sources"]} if sources.get(n) != manifest["sources"].get(n))
    return f"changed since: {', '.join(changed)}" if changed else "its data or its configuration has changed"


def outdated_readings(stored: Stored) -> list[str]:
    """The monitors whose readings today's sources would take again."""
    today, known = run_of(stored.manifest).observations, stored.manifest.get("observations", {})
    return [name for name, own in known.items() if today[name] != own]


def table_of(runs: list[Stored]) -> Table:
    table = Table("run", "when", "fault", "seed", "steps", "end", "monitors", "today")
    for stored in runs:
        if not stored.manifest:
            table.add_row(stored.folder.name, *[""] * 6, stored.stale)
            continue
        manifest, config = stored.manifest, stored.manifest["config"]
        when = datetime.fromtimestamp((stored.folder / "manifest.json").stat().st_mtime)
        again = [] if stored.stale else outdated_readings(stored)
        table.add_row(
            stored.folder.name,
            f"{when:%Y-%m-%d %H:%M}",
            config["fault"]["_target_"].rpartition(".")[2],
            str(config["seed"]),
            str(manifest["steps_done"]),
            manifest["end_reason"],
            str(len(config["monitor"])) if "monitor" in config else "",
            stored.stale or (f"readings again: {', '.join(again)}" if again else "current"),
        )
    return table


def first_checksums(run: Run, steps: int) -> dict[str, str]:
    """Of the weights of a run that is trained anew, by step."""
    torch.set_num_threads(run.train.threads)
    engine, healthy, found = run.new_engine(), run.healthy_sites(), {}
    for step in range(steps):
        engine.step(step, [run.fault.sites(step, healthy)])
        if (step + 1) % CHECKSUM_EVERY_STEPS == 0:
            found[str(step + 1)] = weights_sha256(engine.model.state_dict())
    return found


def adopt(runs: list[Stored]) -> list[str]:
    """Find out by training which stale runs today's sources reproduce, and enter it; a line about each kind of run.

    An old digest is entered only where all its kinds of runs are reproduced. Runs of a stack are not adopted: their
    bits depend on the company.
    """
    said: list[str] = []
    harmless: dict[Any, Any] = {}
    evidence: dict[Any, dict[str, int]] = {}
    candidates = sorted((s for s in runs if _can_adopt(s)), key=_first_faulty_step, reverse=True)
    sentinels = {(*s.kind, s.manifest["source_sha256"], s.manifest["fault_sha256"]): s for s in candidates}
    for (_, fault, *old), stored in sentinels.items():
        run = run_of(stored.manifest)
        known = stored.manifest["weights_sha256"]
        steps = sentinel_steps(stored)
        found = first_checksums(run, steps)
        same = bool(found) and all(known.get(step) == own for step, own in found.items())
        said.append(f"{stored.folder.name} ({fault}): {'the same' if same else 'another trajectory'} in {steps} steps")
        for name, digest in zip(("source_sha256", "fault_sha256"), old, strict=True):
            pair = run.identity[name], digest
            harmless[pair] = harmless.get(pair, True) and same
            evidence.setdefault(pair, {})[stored.folder.name] = steps
    for (new, old), same in harmless.items():
        if same and new != old:
            equivalences.add(new, old, {"steps of runs": evidence[new, old]})
    return said


def _first_faulty_step(stored: Stored) -> int:
    return stored.manifest["onset_step"] or 0


def sentinel_steps(stored: Stored) -> int:
    """How many steps of a run show whether it is trained as before: past its fault's onset, to the next checksum."""
    wanted = max(SENTINEL_STEPS, _first_faulty_step(stored) + CHECKSUM_EVERY_STEPS)
    wanted = -(-wanted // CHECKSUM_EVERY_STEPS) * CHECKSUM_EVERY_STEPS
    return min(wanted, stored.manifest["steps_done"])


def _can_adopt(stored: Stored) -> bool:
    manifest = stored.manifest
    steps = int(max(manifest.get("weights_sha256", {"0": ""}), key=int, default=0))
    changed = stored.stale.startswith("changed since")
    acts = steps > (manifest.get("onset_step") or 0)  # before a fault's onset all sources train alike
    return changed and manifest["config"]["train"]["stack"] == 1 and steps >= CHECKSUM_EVERY_STEPS and acts


def main(arguments: list[str]) -> None:
    show_help(arguments, __doc__)
    command = arguments[0] if arguments and "=" not in arguments[0] else "list"
    given = dict(argument.split("=", 1) for argument in arguments if "=" in argument)
    if command not in COMMANDS or len(given) + (command in arguments[:1]) != len(arguments):
        misused(USAGE)
    folder, delete = given.pop("out", "runs"), given.pop("delete", "false")
    if given or delete not in ("true", "false"):
        misused(USAGE)
    try:
        runs = stored_in(check_folder_to_read(folder, "out"))
    except (ValueError, OSError) as error:
        fail(str(error))
    if command == "adopt":
        print("\n".join(adopt(runs)) or "no finished run of other sources can be adopted")
        return
    if command == "prune":
        runs = [stored for stored in runs if stored.stale and not stored.stale.startswith(UNJUDGED)]
    Console().print(table_of(runs))
    if command == "prune" and delete == "true":
        for stored in runs:
            try:
                with checkpoint.locked(stored.folder):  # which nobody trains now
                    shutil.rmtree(stored.folder)
            except (checkpoint.RunError, OSError) as error:
                fail(str(error))
    elif command == "prune" and runs:
        print(f"delete=true deletes these {len(runs)} runs")


if __name__ == "__main__":
    main(sys.argv[1:])
