"""Turn exports of runs that were trained elsewhere into traces: foreshock import FORMAT FILE... out=DIR

    foreshock import wandb history.csv out=runs/elsewhere cell=baseline
    foreshock import trainer_state runs/*/trainer_state.json out=runs/elsewhere cell=baseline
    foreshock score runs=runs/elsewhere out=report/elsewhere

FORMAT           wandb (CSV or JSON lines), tensorboard (event file or folder), trainer_state, csv (wide or long),
                 algoperf (measurements.csv)
out=DIR          a folder a run, with manifest and trace
columns=FILE     which column is what (YAML: experiments/elsewhere/columns.py); guessed and shown without it
cell=NAME        runs of one cell are seed twins: alike in all but the seed. Without it, and without a column or a path
                 that says so, every run stands alone
seed=N           seed of the first run, the next ones count on; without it from 0
role=ROLE        reference, calibration, test or faulty; without it scoring takes the run's own loss
allow_gaps=true  take a signal that leaves out steps of its cadence
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from foreshock.experiments.elsewhere.columns import Columns, columns_of, read_choice
from foreshock.experiments.elsewhere.export import FORMATS, read_export
from foreshock.experiments.elsewhere.readings import check_role, runs_of, whole
from foreshock.experiments.elsewhere.traces import ImportedRun
from foreshock.experiments.files import sha256
from foreshock.experiments.places import check_file_to_read, check_folder_to_write, check_there
from foreshock.experiments.usage import fail, misused, show_help
from foreshock.experiments.validation import check_named, did_you_mean

OPTIONS = ("out", "columns", "cell", "seed", "role", "allow_gaps")
USAGE = "foreshock import FORMAT FILE... out=DIR [columns=FILE.yaml] [cell=NAME] [seed=N] [role=ROLE]"


def import_files(kind: str, paths: Sequence[Path], options: Mapping[str, str]) -> Iterator[tuple[ImportedRun, Columns]]:
    """Every run of these files, and what its columns were taken for.

    kind: of ``FORMATS``; options: of ``OPTIONS`` without ``out``. Raises ValueError in one line that names the file.
    """
    check_named([kind], FORMATS, "format")
    check_role(options.get("role"), "role")
    allow_gaps = options.get("allow_gaps", "false")
    if allow_gaps not in ("true", "false"):
        raise ValueError(f"allow_gaps={allow_gaps} is not allowed: true or false")
    choice = read_choice(Path(options["columns"])) if "columns" in options else None
    next_seed = whole(options.get("seed", "0"), "seed")
    names = _names(paths)
    for path in paths:
        export = read_export(kind, path)
        columns = columns_of(list(export.table), export.metrics, str(path), choice, export.spellings)
        for rows in runs_of(export, columns, str(path), allow_gaps == "true"):
            name = rows.name or export.run or names[path]
            run_id = name.replace("/", "_").strip()
            seed = rows.seed if rows.seed is not None else next_seed if "seed" in options else export.seed
            signals = {signal.name: signal for signal in columns.signals.values()}
            yield (
                ImportedRun(
                    run_id,
                    options.get("cell") or rows.cell or export.cell or run_id,
                    next_seed if seed is None else seed,
                    options.get("role") or rows.role,
                    signals,
                    rows.readings,
                    _source(kind, path, name, rows.readings),
                ),
                columns,
            )
            next_seed += 1


def _names(paths: Sequence[Path]) -> dict[Path, str]:
    """A name for each file: its own, with its folder's before it where two files have one name."""
    stems = [path.stem for path in paths]
    return {path: path.stem if stems.count(path.stem) == 1 else f"{path.parent.name}-{path.stem}" for path in paths}


def _source(kind: str, path: Path, name: str, readings: Mapping[str, Any]) -> dict[str, Any]:
    """Where a run comes from, as its manifest says it. A folder's checksum is of its files' bytes, in order."""
    files = sorted(path.rglob("*")) if path.is_dir() else [path]
    data = b"".join(file.read_bytes() for file in files if file.is_file())
    columns = {signal: of_run.column for signal, of_run in readings.items()}
    return {"format": kind, "file": path.name, "sha256": sha256(data), "run": name, "columns": columns}


def main(arguments: Sequence[str]) -> None:
    show_help(arguments, __doc__)
    given = dict(argument.split("=", 1) for argument in arguments if argument.split("=", 1)[0] in OPTIONS)
    free = [argument for argument in arguments if argument.split("=", 1)[0] not in OPTIONS]
    if len(free) < 2 or not given.get("out") or len(free) + len(given) != len(arguments):
        misused(USAGE)
    kind, paths, out = free[0], [Path(path) for path in free[1:]], Path(given.pop("out"))
    try:
        unknown = next((path for path in free[1:] if "=" in path and not Path(path).exists()), None)
        if unknown:
            key = unknown.split("=", 1)[0]
            raise ValueError(f"{key} is not an option{did_you_mean(key, OPTIONS)}")
        check_named([kind], FORMATS, "format")
        check_folder_to_write(out, "out")
        for path in paths:
            check_there(path, "FILE")
        if "columns" in given:
            check_file_to_read(given["columns"], "columns")
        runs = list(import_files(kind, paths, given))
        ids = [run.run_id for run, _ in runs]
        twice = next((run_id for run_id in ids if ids.count(run_id) > 1), None)
        if twice:
            raise ValueError(f"two runs are named {twice}: name them in a column, run: COLUMN in columns=FILE.yaml")
        for run, _ in runs:
            run.check_free(out)
        for run, columns in runs:
            folder = run.write(out)
            _report(run, columns, folder)
    except (ValueError, OSError) as error:
        fail(str(error))


def _report(run: ImportedRun, columns: Columns, folder: Path) -> None:
    how = "guessed" if columns.guessed else "as told"
    print(f"{folder}: cell {run.cell}, seed {run.seed}, step from column {columns.step}, signals {how}")
    for name, readings in run.readings.items():
        steps = readings.steps
        span = f"{len(steps):,} readings, steps {steps[0]:,} to {steps[-1]:,}, every {readings.every_steps:,}"
        print(f"  {readings.column} -> {name}: {span}")
    if columns.unread:
        print(f"  not read: {', '.join(columns.unread)}")


if __name__ == "__main__":
    main(sys.argv[1:])
