"""Score saved runs again, in seconds, with any detector: python -m analysis.score runs=DIR out=DIR

runs=DIR            reduced folders, folders with experiment.json beside their runs, or bare run folders
out=DIR             tables: leaderboard, runs, labels, charts, halves, selectivity, cross_talk, diagnosis, confusion
detector=FILE.py    one's own detector (analysis/detect/entrants.py); may be given again
time_limit_s=120    what a detector's answers may take together, on one track of one experiment
memory_limit_gib=4  what its process may have
alarms=FILE.csv     one's own alarms: run_id, monitor, step; may be given again
config_dir=DIR      a folder like conf/ with rules and tracks of one's own; --config-dir DIR is the same
plugins=A,B         modules whose classes its files may name
rule=NAME           a file of conf/rule for every signal, instead of the experiment's own
alpha=NUMBER        false-alarm rate of a run, instead of the experiment's own
threshold=maximum   the largest of all calibration runs; without it conformal, at the rate of alpha
tracks=A,B          of reference, self, floor, published, universal and one's own; all by default
singles=true        every signal by itself too
allow_mixed=true    accept runs of different sources, data or torch, and say so

Runs that were trained elsewhere (foreshock import) and have no role are scored against their seed twins, by
leave-one-out in a cell and pooled over cells: runs, out and alpha are their options (docs/elsewhere.md).
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from rich.console import Console

from foreshock.analysis.detect.isolation import DEFAULT_LIMITS, Limits
from foreshock.analysis.reports.boards import Request, score_runs
from foreshock.analysis.reports.elsewhere import print_findings, score_imported
from foreshock.analysis.reports.leaderboard_print import print_board
from foreshock.analysis.runs.conf import own_conf
from foreshock.analysis.runs.elsewhere import imported_runs
from foreshock.analysis.scores.outcome import score
from foreshock.experiments.places import check_file_to_read, check_folder_to_read, check_folder_to_write
from foreshock.experiments.trace import Trace, TraceError
from foreshock.experiments.usage import fail, show_help
from foreshock.experiments.validation import nearest

__all__ = ["main", "score"]

LIMITS = {"time_limit_s": DEFAULT_LIMITS.time_s, "memory_limit_gib": DEFAULT_LIMITS.memory_gib}


def _number(key: str, given: str | float) -> float:
    try:
        return float(given)
    except ValueError:
        raise ValueError(f"{key}={given} is not allowed: a number above 0") from None


def _request(arguments: Sequence[str]) -> Request:
    conf, others = own_conf(arguments)
    given: dict[str, list[str]] = {}
    for argument in others:
        key, _, value = argument.partition("=")
        given.setdefault(key, []).append(value)
    several = {"detector": "detectors", "alarms": "alarms"}
    single = {"runs", "out", "rule", "alpha", "threshold", "tracks", "singles", "allow_mixed", *LIMITS}
    for key, values in given.items():
        if key not in several and key not in single:
            options = sorted({*several, *single, "config_dir", "plugins"})
            raise ValueError(f"{key} is not an option{nearest(key, options)}: {', '.join(options)}")
        if key in single and len(values) > 1:
            raise ValueError(f"{key} is given {len(values)} times")
    for key in ("runs", "out"):
        if not given.get(key, [""])[0]:
            raise ValueError(f"{key}=DIR is missing: python -m analysis.score runs=DIR out=DIR")
    for key in ("singles", "allow_mixed"):
        if given.get(key, ["false"])[0] not in ("true", "false"):
            raise ValueError(f"{key}={given[key][0]} is not allowed: true or false")
    if given.get("threshold", ["conformal"])[0] not in ("conformal", "maximum"):
        raise ValueError(f"threshold={given['threshold'][0]} is not allowed: conformal or maximum")
    if "alpha" in given and given.get("threshold") == ["maximum"]:
        raise ValueError("alpha has no effect with threshold=maximum: the calibration runs are all that sets it")
    alpha = given.get("alpha", [None])[0]
    try:
        rate = None if alpha is None else float(alpha)
    except ValueError:
        raise ValueError(f"alpha={alpha} is not allowed: between 0 and 1") from None
    if rate is not None and not 0 < rate < 1:
        raise ValueError(f"alpha={alpha} is not allowed: between 0 and 1")
    limits = Limits(*(_number(key, given.get(key, [default])[0]) for key, default in LIMITS.items()))
    return Request(
        runs=check_folder_to_read(given["runs"][0], "runs"),
        out=check_folder_to_write(given["out"][0], "out"),
        detectors=tuple(check_file_to_read(path, "detector") for path in given.get("detector", ())),
        alarms=tuple(check_file_to_read(path, "alarms") for path in given.get("alarms", ())),
        rule=given.get("rule", [None])[0],
        alpha=rate,
        tracks=tuple(given["tracks"][0].split(",")) if "tracks" in given else None,
        maximum=given.get("threshold") == ["maximum"],
        singles=given.get("singles", ["false"])[0] == "true",
        allow_mixed=given.get("allow_mixed", ["false"])[0] == "true",
        limits=limits,
        conf=conf,
    )


def _score_elsewhere(runs: Sequence[Trace], request: Request, arguments: Sequence[str]) -> None:
    """Score runs that were trained elsewhere and have no role. Raises ValueError for an option that is not theirs."""
    for key in (argument.partition("=")[0] for argument in arguments):
        if key not in ("runs", "out", "alpha"):
            raise ValueError(f"{key} is not an option for runs from elsewhere: runs, out, alpha")
    result = score_imported(runs, request.alpha)
    result.write(request.out)
    print_findings(result, Console(width=None if sys.stdout.isatty() else 150))
    print(f"{request.out}: runs.csv, detectors.csv, left_out.csv")


def main(arguments: Sequence[str]) -> None:
    show_help(arguments, __doc__)
    try:
        request = _request(arguments)
        elsewhere = imported_runs(request.runs)
        if elsewhere is not None:
            _score_elsewhere(elsewhere, request, arguments)
            return
        tables = score_runs(request)
    except (ValueError, OSError, TraceError) as error:
        fail(str(error))
    console = Console(width=None if sys.stdout.isatty() else 150)  # of the lines between its tables
    print_board(tables.get("leaderboard"), console)
    written = ", ".join(f"{name}.csv" for name in tables.parts)
    console.print(f"{request.out}: {written}", highlight=False, markup=False)


if __name__ == "__main__":
    main(sys.argv[1:])
