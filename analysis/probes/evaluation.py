"""Evaluation artefacts: prompts, tokenizer, decoding parameters and scripts of two evaluations, file by file."""

from __future__ import annotations

from itertools import zip_longest
from pathlib import Path

from foreshock.analysis.probes.step import Step, judged
from foreshock.experiments.files import sha256

NAME = "evaluation artefacts"
LONGEST = 60
"""Characters of a line that a finding repeats."""


def compare(old: Path, new: Path) -> Step:
    """Hold every file of a folder, or one file, against its namesake by SHA-256.

    Raises ValueError where a path does not exist or holds no file.
    """
    before, after = contents(old, "old_evaluation"), contents(new, "new_evaluation")
    if old.is_file() != new.is_file():
        raise ValueError(f"old_evaluation={old} and new_evaluation={new}: one is a file and the other a folder")
    findings = [f"{name} is gone" for name in sorted(before.keys() - after.keys())]
    findings += [f"{name} is new" for name in sorted(after.keys() - before.keys())]
    findings += [
        f"{name} has changed{_where(before[name], after[name])}"
        for name in sorted(before.keys() & after.keys())
        if sha256(before[name]) != sha256(after[name])
    ]
    return judged(NAME, f"{len(before)} files of {old} with {len(after)} of {new} by SHA-256", findings)


def contents(path: Path, key: str) -> dict[str, bytes]:
    """The bytes of a file, named ``it``, or of every file of a folder, by its path within."""
    if not path.exists():
        raise ValueError(f"{key}={path} does not exist")
    if path.is_file():
        return {"it": path.read_bytes()}
    files = sorted(file for file in path.rglob("*") if file.is_file() and "__pycache__" not in file.parts)
    if not files:
        raise ValueError(f"{key}={path} holds no file")
    return {file.relative_to(path).as_posix(): file.read_bytes() for file in files}


def _where(before: bytes, after: bytes) -> str:
    """The first line that differs, where both are text."""
    try:
        lines = zip_longest(before.decode().splitlines(), after.decode().splitlines(), fillvalue="")
    except UnicodeDecodeError:
        return ""
    for number, (old, new) in enumerate(lines, start=1):
        if old != new:
            return f" in line {number}: {_cut(old)!r} -> {_cut(new)!r}"
    return " in its line ends"


def _cut(line: str) -> str:
    text = line.strip()
    return text if len(text) <= LONGEST else f"{text[:LONGEST]}..."
