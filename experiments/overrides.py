"""The overrides of a command line, each held against the form ``key=value`` and against what it can change.

Hydra's own messages for these name a class of its parser, or no key at all.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import DictConfig, OmegaConf

from foreshock.experiments.validation import nearest

KEY = re.compile(r"[a-z_$][\w$-]*([./]([a-z_$][\w$-]*|\d+))*(@[\w$.:-]*)?", re.ASCII | re.IGNORECASE)
"""A key of a configuration: names with dots or slashes between, and a package where a group's place is another."""
NOTHING = ("", "null", "[]", "{}")
"""Values that choose nothing of a group."""
BRACKETS = {"[": "]", "{": "}", "(": ")"}


def check_form(line: str, known: Collection[str]) -> None:
    """Raises ValueError for an override whose key is none: empty, with spaces, or with a dot too many.

    known: the keys of the configuration, of which the nearest is named.
    """
    key, equals, _ = line.lstrip("+~" if line[:1] in ("+", "~") else "").partition("=")
    if KEY.fullmatch(key):
        return
    form = "key=value, or ~key to drop one"
    if not key.strip():
        raise ValueError(f"{line!r} is not allowed: no key stands before {'=' if equals else 'the end'!r}; {form}")
    close = nearest(key.strip().split(".")[0], known)
    raise ValueError(
        f"{line!r} is not allowed: {key!r} is no key, which is names of ASCII letters with dots between; {form}{close}"
    )


def why_unread(line: str, said: str) -> str:
    """Why an override of a right key cannot be read. said: by Hydra, in one line."""
    value = line.partition("=")[2]
    if not _closes(value):
        return f"{line} cannot be read: a bracket or a quote of its value {value!r} has no partner"
    return f"{line} cannot be read: {said}" if "Exception" not in said else f"{line} cannot be read: quote {value!r}"


def _closes(value: str) -> bool:
    """Whether every bracket and quote of a value has its partner."""
    wanted: list[str] = []
    quote = ""
    for before, character in zip(f" {value}", value, strict=False):
        if before == "\\":
            continue
        if quote:
            quote = "" if character == quote else quote
        elif character in "'\"":
            quote = character
        elif character in BRACKETS:
            wanted.append(BRACKETS[character])
        elif character in BRACKETS.values() and (not wanted or wanted.pop() != character):
            return False
    return not quote and not wanted


def check_choices(lines: Iterable[str], choices: Mapping[str, Sequence[str]]) -> None:
    """Raises ValueError where nothing is chosen of a group: ``fault=null``, ``monitor=[]``, ``model=``.

    choices: by group, its options. Without a choice Hydra drops the group, and what needs it says that it is missing.
    """
    for line in lines:
        key, equals, value = line.partition("=")
        if not equals or "".join(value.split()).lower() not in NOTHING:
            continue
        if key in choices:
            raise ValueError(f"{line} is not allowed: one of {', '.join(choices[key])}")
        if re.fullmatch(r"hydra/\w+", key):
            raise ValueError(f"{line} is not allowed: {key}=NAME chooses one")


def check_merges(lines: Iterable[str], config: DictConfig) -> None:
    """Raises ValueError for ``key={}`` where the key has keys of its own: Hydra adds none to them and drops none.

    config: as composed, with the overrides.
    """
    for line in lines:
        key, _, value = line.partition("=")
        if key.startswith("~") or not _is_empty_mapping(line, value):
            continue
        key = key.lstrip("+")
        there: Any = OmegaConf.select(config, key, throw_on_resolution_failure=False)
        if isinstance(there, DictConfig) and len(there):
            names = list(map(str, there))
            drops = f"; '~{key}.NAME' drops one" if all(map(KEY.fullmatch, names)) else ""
            said = f"it adds no key to those that are there ({', '.join(names)}){drops}"
            raise ValueError(f"{line} has no effect: {said}")


def _is_empty_mapping(line: str, value: str) -> bool:
    if not value.strip().startswith("{"):
        return False
    (override,) = OverridesParser.create().parse_overrides([line])
    return override.value() == {}
