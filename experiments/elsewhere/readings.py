"""Runs and their readings out of an export's rows, held against what a trace can be."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import pandas as pd

from foreshock.experiments.elsewhere.columns import Columns
from foreshock.experiments.elsewhere.export import Export
from foreshock.experiments.plan import ROLES

MIXED = "several runs in one file need a column that names the run (run: COLUMN in columns=FILE.yaml)"
REGULAR = 0.9
"""A signal is read at a regular cadence where this share of its differences is one number of steps."""

ALL_ROLES = (*ROLES, "faulty")


@dataclass(frozen=True)
class Readings:
    """One signal of one run: steps (N,), increasing, tokens (N,), 0 where none are known, and values (N,)."""

    column: str
    steps: np.ndarray
    tokens: np.ndarray
    values: np.ndarray

    @property
    def every_steps(self) -> int:
        """The cadence: the median difference of steps, at least 1."""
        return max(1, int(np.median(np.diff(self.steps)))) if len(self.steps) > 1 else 1


@dataclass(frozen=True)
class RunRows:
    """One run of an export: its name, None where the file is one run; cell, seed and role as its columns say."""

    name: str | None
    cell: str | None
    seed: int | None
    role: str | None
    readings: dict[str, Readings]


def runs_of(export: Export, columns: Columns, where: str, allow_gaps: bool = False) -> Iterator[RunRows]:
    """Every run of an export, in the file's order.

    Raises ValueError in one line that begins with ``where``: steps that are missing, no integers, unsorted, twice
    there, or lacking at a regular cadence (unless ``allow_gaps``); several runs without a column that names them; a
    value that is no number; a run with two cells, seeds or roles.
    """
    table, row = export.table, export.row
    steps = _integers(table[columns.step], columns.step, where, row)
    tokens = None
    if columns.tokens is not None:
        tokens = _integers(table[columns.tokens].replace("", "0"), columns.tokens, where, row)
    names = table[columns.run] if columns.run is not None else pd.Series("", table.index)
    for name, rows in table.groupby(names, sort=False):
        said = where if columns.run is None else f"{where}: run {name}"
        if columns.run is not None and not str(name).strip():
            raise ValueError(f"{where}: {row} {rows.index[0]} names no run in column {columns.run}")
        readings = {}
        for signal, cells in _signals(export, columns, rows):
            kept = cells.index
            values = _numbers(cells, str(cells.name), said, row)
            at = steps.loc[kept]
            _check_order(at, values, str(cells.name), said, row, named=columns.run is not None)
            seen = np.zeros(len(at), np.int64) if tokens is None else tokens.loc[kept].to_numpy()
            readings[signal] = Readings(str(cells.name), at.to_numpy(), seen, values)
            if not allow_gaps:
                _check_gaps(at.to_numpy(), str(cells.name), said)
        if not readings:
            raise ValueError(f"{said} has no reading of {', '.join(columns.signals)}")
        seed = _only(rows, columns.seed, said)
        role = _only(rows, columns.role, said)
        check_role(role, f"{said}: {columns.role}")
        yield RunRows(
            str(name) if columns.run is not None else None,
            _only(rows, columns.cell, said),
            None if seed is None else whole(seed, f"{said}: {columns.seed}"),
            role,
            readings,
        )


def check_role(role: str | None, where: str) -> None:
    """Raises ValueError for a role that no run can have."""
    if role is not None and role not in ALL_ROLES:
        raise ValueError(f"{where}={role!r} is not allowed: one of {', '.join(ALL_ROLES)}")


def whole(text: str, where: str) -> int:
    """An integer from 0 on, also written as ``3.0``. Raises ValueError."""
    try:
        number = float(text)
    except ValueError:
        number = -1.0
    if number < 0 or number != int(number):
        raise ValueError(f"{where}={text!r} is not allowed: an integer from 0 on")
    return int(number)


def _signals(export: Export, columns: Columns, rows: pd.DataFrame) -> Iterator[tuple[str, pd.Series]]:
    """By signal its cells that are not empty, indexed by row and named by column."""
    for column, signal in columns.signals.items():
        if export.names is None:
            cells = rows[column]
        else:
            cells = rows.loc[rows[export.names] == column, export.values].rename(column)
        cells = cells[cells.str.strip() != ""]
        if len(cells):
            yield signal.name, cells


def _only(rows: pd.DataFrame, column: str | None, where: str) -> str | None:
    """What a column says of a run; None without a column, or where it says nothing."""
    if column is None:
        return None
    values = [value for value in rows[column].unique() if value.strip()]
    if len(values) > 1:
        raise ValueError(f"{where} has {column}={values[0]!r} and {values[1]!r}: one run has one")
    return values[0] if values else None


def _integers(cells: pd.Series, column: str, where: str, row: str) -> pd.Series:
    """Whole numbers from 0 on."""
    empty = cells.index[cells.str.strip() == ""]
    if len(empty):
        raise ValueError(f"{where}: {row} {empty[0]} has no {column}")
    numbers = pd.to_numeric(cells, errors="coerce")
    wrong = cells.index[~((numbers >= 0) & (numbers % 1 == 0))]
    if len(wrong):
        said = f"{column}={cells.loc[wrong[0]]!r} in {row} {wrong[0]}"
        raise ValueError(f"{where}: {said} is not allowed: an integer from 0 on")
    return numbers.astype(np.int64)


def _numbers(cells: pd.Series, column: str, where: str, row: str) -> np.ndarray:
    """Readings as FP64; ``nan`` and ``inf`` are readings too."""
    values = np.empty(len(cells))
    for i, (number, text) in enumerate(cells.items()):
        try:
            values[i] = float(text)
        except ValueError:
            raise ValueError(f"{where}: {column}={text!r} in {row} {number} is not allowed: a number") from None
    return values


def _check_order(at: pd.Series, values: np.ndarray, column: str, where: str, row: str, named: bool) -> None:
    """Steps rise. A step that is lower than the one before it is out of order, or another run begins there."""
    step, rows = at.to_numpy(), at.index
    falls = np.flatnonzero(np.diff(step) <= 0)
    if not len(falls):
        return
    before, after = falls[0], falls[0] + 1
    place = f"{row}s {rows[before]} and {rows[after]}"
    hint = "" if named else f": {MIXED}"
    if step[before] == step[after]:
        raise ValueError(f"{where}: {column} has two readings at step {step[after]} ({place}){hint}")
    if len(np.unique(step)) == len(step):
        raise ValueError(
            f"{where}: {column} at step {step[after]} comes after step {step[before]} ({place}): sort the rows by step"
        )
    raise ValueError(
        f"{where}: {column} begins again at step {step[after]} after step {step[before]} ({place})"
        f"{hint or ': leave out what a resumed run has repeated'}"
    )


def _check_gaps(step: np.ndarray, column: str, where: str) -> None:
    """Raises ValueError where a regular cadence leaves a step out."""
    gaps = np.diff(step)
    if len(gaps) < 3:
        return
    sizes, counts = np.unique(gaps, return_counts=True)
    every = int(sizes[counts.argmax()])
    lacking = np.flatnonzero((gaps > every) & (gaps % every == 0))
    if counts.max() >= REGULAR * len(gaps) and len(lacking):
        missing = int(step[lacking[0]]) + every
        raise ValueError(
            f"{where}: {column} has no reading at step {missing}, one every {every} steps around it: allow_gaps=true "
            "takes it as it is"
        )
