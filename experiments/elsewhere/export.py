"""The rows of an export, before anybody asks what they mean; and each format's own way to them."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd

from foreshock.experiments.elsewhere.events import read_events
from foreshock.experiments.elsewhere.known_signals import SPELLINGS, plain

NAME_COLUMNS = ("signal", "metric", "tag", "name", "key")
"""Columns of a long table that name what is measured."""


@dataclass(frozen=True)
class Export:
    """Rows of one file. table: cells as they are written, '' where there is none, indexed by line (or entry).

    names, values: of a long table, the columns that name a metric and hold its value; row: what a row is called.
    run, cell, seed: of the file, where its format or its path says so. spellings: what its columns are guessed to be.
    """

    table: pd.DataFrame
    names: str | None = None
    values: str | None = None
    row: str = "line"
    run: str | None = None
    cell: str | None = None
    seed: int | None = None
    spellings: Mapping[str, tuple[str, ...]] = field(default_factory=lambda: SPELLINGS)

    @property
    def metrics(self) -> list[str]:
        """What may be a signal: names in a long table, columns in a wide one."""
        return list(self.table if self.names is None else dict.fromkeys(self.table[self.names]))


def read_csv(path: Path) -> Export:
    """A CSV file with a header: wide, a column a metric; or long, with a column of names and one called ``value``."""
    try:
        table = pd.read_csv(path, dtype=str, keep_default_na=False, encoding="utf-8")
    except pd.errors.EmptyDataError:
        raise ValueError(f"{path} is empty: a CSV with a header is needed") from None
    except UnicodeDecodeError:
        raise ValueError(f"{path} is no CSV in UTF-8: it holds other bytes") from None
    except pd.errors.ParserError as error:
        raise ValueError(f"{path} is no CSV: {' '.join(str(error).split())}") from None
    table.index = pd.RangeIndex(2, len(table) + 2)  # the header is line 1
    by_plain = {plain(column): column for column in reversed(table.columns)}
    names = next((by_plain[name] for name in NAME_COLUMNS if name in by_plain), None)
    if names is None or "value" not in by_plain:
        return Export(table)
    for axis in ("layer", "head"):
        inner = table.index[~table[axis].isin(["", "-1"])] if axis in table else []
        if len(inner):
            said = table.loc[inner[0], axis]
            raise ValueError(f"{path}: {axis}={said} in line {inner[0]} is not allowed: signals of a whole run only")
    return Export(table, names, by_plain["value"])


def read_wandb(path: Path) -> Export:
    """A history of Weights & Biases: ``run.history().to_csv(...)``, or one JSON object a line."""
    if path.suffix not in (".jsonl", ".json", ".ndjson"):
        return read_csv(path)
    rows, numbers = [], []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        if line.strip():
            rows.append(_json(line, path, f"line {number}"))
            numbers.append(number)
    return Export(_table(rows, numbers, path))


def read_trainer_state(path: Path) -> Export:
    """``trainer_state.json`` of a Hugging Face Trainer: its ``log_history``, an entry a row.

    The run is named by its folder. ``loss`` is of training; ``train_loss``, in the last entry, is a mean of all.
    """
    state = _json(path.read_text(encoding="utf-8"), path, "the file")
    history = state.get("log_history")
    if not isinstance(history, list) or not all(isinstance(entry, dict) for entry in history):
        raise ValueError(f"{path} has no log_history: trainer_state.json of a Hugging Face Trainer is needed")
    table = _table(history, list(range(1, len(history) + 1)), path)
    folder = path.parent.parent if path.parent.name.startswith("checkpoint-") else path.parent
    name = folder.resolve().name if path.name == "trainer_state.json" else None
    return Export(table, row="entry", run=name, spellings={**SPELLINGS, "train_loss_raw": ("loss",)})


def read_tensorboard(path: Path) -> Export:
    """Scalars of a TensorBoard event file, or of a folder of them, as a long table."""
    table = read_events(path)
    run = path.resolve().name if path.is_dir() else path.resolve().parent.name
    return Export(table, "tag", "value", row="event", run=run)


def read_algoperf(path: Path) -> Export:
    """``measurements.csv`` of an AlgoPerf submission; cell and seed from its path, where that is as published.

    .../<tuning>/<submission>/<study>/<workload>/<trial>/measurements.csv: runs of a workload, submission and trial are
    seed twins, a study is a seed. ``loss`` is of a minibatch, ``train/loss`` of a larger evaluation: the first counts.
    """
    export = read_csv(path)
    parts = path.resolve().parts[-6:-1]
    ours = {**SPELLINGS, "train_loss_raw": ("loss", "train_loss"), "held_out_loss": ("validation/loss",)}
    if len(parts) == 5 and parts[2].startswith("study_") and parts[4].startswith("trial_"):
        tuning, submission, study, workload, trial = parts
        cell, seed = f"{workload} {submission} {tuning} {trial}", int(study.removeprefix("study_"))
        return Export(export.table, run=f"{cell} {study}".replace(" ", "-"), cell=cell, seed=seed, spellings=ours)
    return Export(export.table, spellings=ours)


FORMATS: dict[str, Callable[[Path], Export]] = {
    "csv": read_csv,
    "wandb": read_wandb,
    "tensorboard": read_tensorboard,
    "trainer_state": read_trainer_state,
    "algoperf": read_algoperf,
}
"""By format, what reads a file of it. Each raises ValueError in one line that names the file."""


def read_export(kind: str, path: Path) -> Export:
    """The rows of a file. Raises ValueError in one line where it cannot be read or has no rows."""
    try:
        export = FORMATS[kind](path)
    except FileNotFoundError:
        raise ValueError(f"{path} does not exist") from None
    except UnicodeDecodeError:
        raise ValueError(f"{path} is no text in UTF-8: it holds other bytes") from None
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}") from None
    if export.table.empty:
        raise ValueError(f"{path} has no rows")
    return export


def _json(text: str, path: Path, where: str) -> dict[str, Any]:
    try:
        node = json.loads(text)
    except ValueError as error:
        raise ValueError(f"{path}: {where} is no JSON: {error}") from None
    if not isinstance(node, dict):
        raise ValueError(f"{path}: {where} is no JSON object")
    return node


def _table(rows: list[dict[str, Any]], numbers: list[int], path: Path) -> pd.DataFrame:
    """Objects as rows of cells; what is neither number nor text (a histogram) is no reading."""
    if not rows:
        raise ValueError(f"{path} has no rows")
    columns = dict.fromkeys(key for row in rows for key in row)
    return pd.DataFrame({key: [_cell(row.get(key)) for row in rows] for key in columns}, index=numbers, dtype=str)


def _cell(value: Any) -> str:
    return str(value) if isinstance(value, (int, float, str)) and not isinstance(value, bool) else ""
