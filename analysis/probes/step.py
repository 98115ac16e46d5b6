"""One step of a triage: what it compared, and what came out."""

from __future__ import annotations

from dataclasses import dataclass

DIFFERS, ALIKE, NOT_COMPARED = "differs", "alike", "not compared"
OUTCOMES = (DIFFERS, ALIKE, NOT_COMPARED)
MOST_SHOWN = 4
"""Findings that a line names."""


@dataclass(frozen=True)
class Step:
    """name: of the step; compared: what was held against what; outcome: of ``OUTCOMES``.

    findings: what differs, the most telling first; where nothing was compared, what to give. notes: what is worth
    knowing and decides nothing.
    """

    name: str
    compared: str
    outcome: str
    findings: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def differs(self) -> bool:
        return self.outcome == DIFFERS

    def line(self) -> str:
        said = "; ".join(self.findings[:MOST_SHOWN])
        more = f"; and {len(self.findings) - MOST_SHOWN} more" if len(self.findings) > MOST_SHOWN else ""
        return f"{self.name}: compared {self.compared}: {self.outcome}{f' ({said}{more})' if said else ''}"


def judged(name: str, compared: str, findings: list[str], notes: tuple[str, ...] = ()) -> Step:
    """A step that differs where there is a finding."""
    return Step(name, compared, DIFFERS if findings else ALIKE, tuple(findings), notes)


def lacking(name: str, *keys: str) -> Step:
    """A step that nobody gave the inputs of."""
    return Step(name, "nothing", NOT_COMPARED, (f"give {' and '.join(f'{key}=' for key in keys)}",))
