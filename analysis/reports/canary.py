"""What a canary says: a few lines, and a table of where its runs leave the band."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from dataclasses import asdict, fields
from io import StringIO
from pathlib import Path

import numpy as np

from foreshock.analysis.probes.band import Band
from foreshock.analysis.probes.canary import HELD_OUT, LEVEL, Breach, Canary, Verdict
from foreshock.analysis.probes.changes import COMMIT, Change, changes
from foreshock.experiments.files import write_whole

MOST_SHOWN = 8
"""Changes that are named in the lines."""
DIGITS = 10
"""Of a commit."""


def lines(band: Band, verdict: Verdict) -> list[str]:
    """What was compared, what has changed, where each run stands, and the verdict, which is the last."""
    count, made = len(verdict.canaries), band.thresholds
    of_runs = "1 run" if count == 1 else f"{count} runs"
    return [
        f"compared {of_runs} of {band.steps:,} steps with {len(band.runs)} healthy ones, in {len(made.signals)} "
        f"signals (alpha = {made.alpha:g})",
        _changed(band, verdict),
        *(_line(canary) for canary in verdict.canaries),
        *_not_compared(verdict.canaries),
        *_held_out(band, verdict),
        conclusion(verdict),
    ]


def conclusion(verdict: Verdict) -> str:
    """The verdict in one sentence."""
    count, outside = len(verdict.canaries), sum(canary.outside for canary in verdict.canaries)
    of_runs = f"{outside} of {count} runs stand outside the healthy band"
    if verdict.outside:
        breaches = sorted(verdict.breaches, key=lambda breach: (breach.step, -breach.over_limit))
        first = f", first {_named(breaches[0])}" if breaches else ""
        return f"OUTSIDE: {of_runs}{first}"
    if verdict.identical:
        return "IDENTICAL: every reading is that of the healthy run with the same seed, bit for bit"
    shifted = f". Held-out loss has shifted all the same: {_shift(verdict)}" if verdict.shifted else ""
    return f"INSIDE: {of_runs}; {verdict.needed} would have to{shifted}"


def _changed(band: Band, verdict: Verdict) -> str:
    first = verdict.canaries[0]
    before = first.twin or next(iter(band.runs.values()))
    found = changes(before.manifest, first.run.manifest)
    if not found:
        return "changed: nothing that the manifests know of"
    said = "; ".join(map(_change, found[:MOST_SHOWN]))
    more = f"; and {len(found) - MOST_SHOWN} more" if len(found) > MOST_SHOWN else ""
    return f"changed: {said}{more}"


def _change(change: Change) -> str:
    key = change.key.removeprefix("config.").removeprefix("sources.")
    if change.key.startswith("sources.") or "sha256" in change.key:
        return key
    before, after = ((side[:DIGITS] if key == COMMIT else side) for side in (change.before, change.after))
    return f"{key} {before} -> {after}"


def _line(canary: Canary) -> str:
    seed = canary.run.manifest["seed"]
    name = canary.run.run_id if seed < 0 else f"seed {seed}"
    return f"  {name}: {_state(canary)}{_twin(canary)}"


def _state(canary: Canary) -> str:
    parts = [] if canary.ended is None else [canary.ended]
    if canary.breaches:
        others = len(canary.breaches) - 1
        more = f" and {others} more signal{'s' * (others > 1)}" if others else ""
        parts.append(f"{_named(canary.breaches[0])}{more}")
    return f"outside, {', '.join(parts)}" if parts else "inside"


def _named(breach: Breach) -> str:
    at = [f"layer {breach.layer}"] * (breach.layer is not None) + [f"head {breach.head}"] * (breach.head is not None)
    place = f" ({', '.join(at)})" if at else ""
    size = f" at {breach.over_limit:.3g} times its limit" if np.isfinite(breach.over_limit) else ""
    return f"{breach.signal}{place} at step {breach.step:,}{size}"


def _twin(canary: Canary) -> str:
    if canary.twin is None:
        return "; no healthy run of its seed"
    if canary.difference is None:
        return "; the same numbers as its healthy twin"
    signals = canary.difference.signals
    more = f" and {len(signals) - 1} more" if len(signals) > 1 else ""
    return f"; other numbers than its healthy twin from step {canary.difference.step:,} ({signals[0]}{more})"


def _not_compared(canaries: Sequence[Canary]) -> list[str]:
    names = sorted({name for canary in canaries for name in canary.not_compared})
    return [f"  not compared: {', '.join(names)}"] if names else []


def _held_out(band: Band, verdict: Verdict) -> list[str]:
    """Held-out loss against the same seeds, beside the spread that healthy seeds have by themselves."""
    found = verdict.held_out_changes
    if not found:
        return []
    last = [run.signals[HELD_OUT].values[-1].item() for run in band.runs.values() if HELD_OUT in run.signals]
    return [
        f"  held-out loss at the end over healthy runs of the same seeds: {_shift(verdict)}; healthy seeds by "
        f"themselves spread by {np.std(last, ddof=1):.4f}"
    ]


def _shift(verdict: Verdict) -> str:
    changes_in_nats = verdict.held_out_changes
    interval = verdict.held_out_interval
    said = f"{np.mean(changes_in_nats):+.4f} nats"
    if interval is None:
        return said
    low, high = interval
    return f"{said} ({low:+.4f} to {high:+.4f}, {100 * LEVEL:g} % interval of Student's t over {len(changes_in_nats)})"


def write_table(path: Path, verdict: Verdict) -> None:
    """A row a breach: run, signal, step, layer, head, value, statistic, limit."""
    text = StringIO(newline="")
    writer = csv.DictWriter(text, [field.name for field in fields(Breach)], lineterminator="\n")
    writer.writeheader()
    writer.writerows(asdict(breach) for breach in verdict.breaches)
    write_whole(path, text.getvalue().encode())
