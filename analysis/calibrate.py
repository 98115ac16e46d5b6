"""Thresholds for live alarms from healthy runs of one's own: foreshock calibrate runs=DIR out=FILE.json

runs=DIR        run folders, as foreshock.attach(out=...) and foreshock train write them; faulty runs are left out
out=FILE.json   thresholds, for foreshock.attach(alarms=FILE.json)
alpha=0.1       the probability that a healthy run alarms
track=self      self: against the run's own past; reference: against these runs, step by step; floor: ratios to
                predicted noise as they are
chart=ewma      a file of conf/rule that is followed live: shewhart, ewma, cusum, glr
joint=true      alpha holds for all signals together, which takes 10 runs more; false: for each signal by itself
allow_alarms=false  an error where a run's training raised SEV0 or SEV1; true: it is taken as healthy
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from foreshock.analysis.detect.calibration import CALIBRATED_TRACKS, ONLINE_CHARTS, SELF, calibrated
from foreshock.analysis.detect.thresholds import Thresholds
from foreshock.analysis.runs import reduced
from foreshock.analysis.runs.conf import conf
from foreshock.experiments import trace
from foreshock.experiments.places import check_file_to_write, check_folder_to_read
from foreshock.experiments.trace import Trace, TraceError
from foreshock.experiments.usage import fail, show_help
from foreshock.experiments.validation import check_named

DEFAULTS = {
    "runs": "",
    "out": "",
    "alpha": "0.1",
    "track": SELF,
    "chart": "ewma",
    "joint": "true",
    "allow_alarms": "false",
}

ALARMS = "alarms.jsonl"
"""In a run's folder, its alarms, a line of JSON each (``foreshock.alarms``)."""


def healthy_runs(folder: Path, allow_alarms: bool = False) -> list[Trace]:
    """The finished healthy runs in a folder. Raises TraceError where there is none, and ValueError for alarmed ones."""
    if reduced.is_reduced(folder):
        runs = list(reduced.read(folder).values())
    else:
        folders = sorted(path.parent for path in folder.glob("*/manifest.json"))
        runs = [trace.read(path) for path in folders if trace.manifest_of(path)["end_reason"] == "completed"]
    healthy = [run for run in runs if run.onset is None and run.end_reason == "completed"]
    if not healthy:
        raise TraceError(f"runs={folder} holds no finished healthy run")
    alarmed = {} if allow_alarms else {run.run_id: alarm for run in healthy if (alarm := worst_alarm(run)) is not None}
    if alarmed:
        name, alarm = next(iter(alarmed.items()))
        raise ValueError(
            f"{len(alarmed)} of {len(healthy)} runs raised SEV0 or SEV1 and may be faulty, such as {name}: {alarm}. "
            "Look at them, then move them away or set allow_alarms=true"
        )
    return healthy


def worst_alarm(run: Trace) -> str | None:
    """The most severe alarm of SEV0 or SEV1 that a run's training raised, or None.

    A SEV1 of the watch itself, such as a writer that failed, says nothing of the training.
    """
    path = run.folder / ALARMS
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    alarms = [json.loads(line) for line in lines]
    severe = [a for a in alarms if a["severity"] == "SEV0" or (a["severity"] == "SEV1" and a["rule"] != "watch")]
    if not severe:
        return None
    worst = min(severe, key=lambda alarm: alarm["severity"])
    return f"{worst['severity']} {worst['signal']} at step {worst['step']}"


def left_out(folder: Path) -> list[str]:
    """Names of runs that did not complete, with how they ended."""
    if reduced.is_reduced(folder):
        return []
    folders = sorted(path.parent for path in folder.glob("*/manifest.json"))
    ends = {path.name: trace.manifest_of(path)["end_reason"] for path in folders}
    return [f"{name} ({end})" for name, end in ends.items() if end != "completed"]


def options(arguments: Sequence[str]) -> dict[str, str]:
    """The given options over ``DEFAULTS``. Raises ValueError in one line."""
    given = dict(DEFAULTS)
    for argument in arguments:
        key, _, value = argument.partition("=")
        check_named([key], tuple(DEFAULTS), "option")
        given[key] = value
    for key in ("runs", "out"):
        if not given[key]:
            raise ValueError(f"{key}= is missing: foreshock calibrate runs=DIR out=FILE.json")
    check_named([given["track"]], CALIBRATED_TRACKS, "track")
    check_named([given["chart"]], ONLINE_CHARTS, "chart")
    for key in ("joint", "allow_alarms"):
        check_named([given[key]], ("true", "false"), key)
    return given


def calibrate(given: dict[str, str]) -> Thresholds:
    """Thresholds of the options, written to ``out``. Raises ValueError, TraceError or OSError."""
    try:
        alpha = float(given["alpha"])
    except ValueError:
        raise ValueError(f"alpha={given['alpha']} is not allowed: a number between 0 and 1") from None
    out = check_file_to_write(given["out"], "out")
    runs = healthy_runs(check_folder_to_read(given["runs"], "runs"), given["allow_alarms"] == "true")
    thresholds = calibrated(
        runs,
        alpha=alpha,
        track=given["track"],
        chart=conf("rule", given["chart"]),
        joint=given["joint"] == "true",
    )
    thresholds.write(out)
    return thresholds


def main(arguments: Sequence[str]) -> None:
    show_help(arguments, __doc__)
    try:
        given = options(arguments)
        made = calibrate(given)
    except (ValueError, TraceError, OSError) as error:
        fail(str(error))
    console = Console(highlight=False, soft_wrap=True)
    console.print(
        f"{given['out']}: {len(made.signals)} signals on the {made.track} track, {made.chart['chart']}; "
        f"{len(made.runs)} runs set thresholds at alpha={made.alpha:g} a run of {made.horizon_steps:,} steps, the "
        f"length of {made.horizon_run}; {made.per_million_steps:.3g} false alarms a million steps at most"
    )
    unfinished = left_out(Path(given["runs"]))
    if unfinished:
        console.print(f"  left out, since they did not complete: {', '.join(unfinished)}")
    if made.joint and made.widest is not None:
        name, ratio = made.widest
        console.print(f"  joint=true raises a signal's limit up to {ratio:.3g} times over its own, that of {name}")
    for reason in made.declined.values():
        console.print(f"  without a threshold: {reason}")


if __name__ == "__main__":
    main(sys.argv[1:])
