"""Which column of an export is the step, which names the run, and which signals the others are.

A YAML file says so, all keys but ``signals`` may be left out:

    step: global_step
    run: run_name            # also seed, cell, role, tokens
    signals:
      train/loss: train_loss_raw
      probe/score: {signal: probe_score, unit: "1", bad: down}

Without a file the columns are guessed (``experiments.elsewhere.known_signals``).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml

from foreshock.experiments.elsewhere.known_signals import KEYS, KNOWN, SPELLINGS, spelled
from foreshock.experiments.names import check_name
from foreshock.experiments.validation import check_mapping, did_you_mean, nearest
from foreshock.monitors.signal import Signal


@dataclass(frozen=True)
class Columns:
    """Columns of an export. signals: by column; run, seed, cell, role, tokens: columns, or None.

    guessed: whether the signals are; unread: what is neither a signal nor a key.
    """

    step: str
    signals: Mapping[str, Signal]
    run: str | None = None
    seed: str | None = None
    cell: str | None = None
    role: str | None = None
    tokens: str | None = None
    guessed: bool = True
    unread: tuple[str, ...] = ()


def read_choice(path: Path) -> dict[str, Any]:
    """What a file of columns says. Raises ValueError in one line where it is none."""
    where = f"columns={path}"
    try:
        node = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"{where} does not exist") from None
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ValueError(f"{where} is no YAML: {' '.join(str(error).split())}") from None
    check_mapping(node, where)
    known = (*KEYS, "signals")
    for key in node:
        if key not in known:
            raise ValueError(f"{where}: {key} is not a key of it{did_you_mean(key, known)}")
    check_mapping(node.get("signals", {}), f"{where}: signals")
    return dict(node)


def columns_of(
    columns: Sequence[str],
    metrics: Sequence[str],
    where: str,
    choice: Mapping[str, Any] | None = None,
    spellings: Mapping[str, tuple[str, ...]] = SPELLINGS,
) -> Columns:
    """What the columns of an export are.

    columns: of the file; metrics: those that may be signals, or, of a long table, the names in its column of names;
    choice: of ``read_choice``, None to guess; spellings: what is guessed. Raises ValueError, beginning with ``where``,
    for a column that is not there, an unknown signal, and where there is no step or no signal.
    """
    choice = {} if choice is None else choice
    keys: dict[str, Any] = {}
    for key, ways in KEYS.items():
        keys[key] = choice[key] if key in choice else spelled(list(columns), ways)
        if key in choice and keys[key] not in columns:
            raise ValueError(f"{where}: {key}={keys[key]!r} is no column{nearest(keys[key], columns)}")
    if keys["step"] is None:
        raise ValueError(f"{where} has no column for the step: name it in columns=FILE.yaml (of {', '.join(columns)})")
    if "signals" in choice:
        signals = {column: _signal(column, said, metrics, where) for column, said in choice["signals"].items()}
    else:
        free = [metric for metric in metrics if metric not in keys.values()]
        guesses = {name: spelled(free, ways) for name, ways in spellings.items()}
        signals = {column: KNOWN[name] for name, column in guesses.items() if column is not None}
    if not signals:
        raise ValueError(
            f"{where} has no column that is a known signal: name one in columns=FILE.yaml (of {', '.join(metrics)})"
        )
    names = [signal.name for signal in signals.values()]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice:
        raise ValueError(f"{where}: two columns are {twice}: one is needed")
    unread = tuple(metric for metric in metrics if metric not in signals and metric not in keys.values())
    return Columns(signals=signals, guessed="signals" not in choice, unread=unread, **keys)


def _signal(column: str, said: Any, metrics: Sequence[str], where: str) -> Signal:
    """The signal that a file of columns says a column is."""
    if column not in metrics:
        raise ValueError(f"{where}: signals.{column} is no column{nearest(column, metrics)}")
    node = {"signal": said} if isinstance(said, str) else said
    check_mapping(node, f"{where}: signals.{column}")
    allowed = ("signal", "unit", "bad", "family")
    for key in node:
        if key not in allowed:
            raise ValueError(f"{where}: signals.{column}.{key} is not a key of it{did_you_mean(key, allowed)}")
    name = check_name(node.get("signal"), f"{where}: signals.{column}.signal")
    changes: dict[str, Any] = {key: value for key, value in node.items() if key != "signal"}
    if name in KNOWN:
        return replace(KNOWN[name], **changes)
    if "unit" not in node or "bad" not in node:
        raise ValueError(
            f"{where}: signals.{column}={name!r} is no known signal, so it needs unit and bad (up, down or both)"
            f"{did_you_mean(name, list(KNOWN))}"
        )
    changes["unit"] = str(node["unit"])
    return Signal(name, **changes)
