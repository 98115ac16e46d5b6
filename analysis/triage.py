"""A benchmark dips while the loss looks fine: where does the dip come from?

    foreshock triage old=runs/a new=runs/b old_harness="python eval.py {weights}" new_harness="python eval.py {weights}"

Five steps, the cheapest cause first, each says what it compared:
  evaluation artefacts   old_evaluation=, new_evaluation=: files or folders (prompts, tokenizer, decoding, scripts)
  data drift             old_data=, new_data=: samples of the training data, a document a line or a file
  internal drift         old=, new=: run folders, as foreshock train and foreshock.attach(out=...) write them;
                         healthy=: the folder of a band of foreshock canary
  architecture           old_weights=, new_weights=: safetensors files; those of the runs where they are left out
  the cross              old_harness=, new_harness=: commands that print a number, or a JSON list of one an item, on
                         their last line, higher is better; {weights} stands for the path of the weights

alpha=0.05    false-alarm rate of each step
tolerance=    what a score may fall by; without it a single number is only shown
limit_s=600   seconds that a harness may take
out=DIR       triage.csv: a row a finding

The last line is the verdict. Exit code 0: triage came to its end; 2: an input is wrong.
"""

from __future__ import annotations

import csv
import sys
from collections.abc import Mapping, Sequence
from io import StringIO
from pathlib import Path

from foreshock.analysis.probes import architecture, band, cross, data_drift, evaluation, internal_drift
from foreshock.analysis.probes.cross import Cross, check_number
from foreshock.analysis.probes.step import Step, lacking
from foreshock.experiments import trace
from foreshock.experiments.files import write_whole
from foreshock.experiments.places import check_file_to_read, check_folder_to_read, check_folder_to_write, check_there
from foreshock.experiments.trace import WEIGHTS, Trace, TraceError
from foreshock.experiments.usage import fail, show_help
from foreshock.experiments.validation import check_named

PAIRED = ("evaluation", "data", "weights", "harness")
OPTIONS = (
    "old",
    "new",
    *(f"{age}_{what}" for what in PAIRED for age in ("old", "new")),
    "healthy",
    "alpha",
    "tolerance",
    "limit_s",
    "out",
)
PLACES = {
    **dict.fromkeys(("old", "new", "healthy"), check_folder_to_read),
    **{f"{age}_{what}": check_there for what in ("evaluation", "data") for age in ("old", "new")},
    **{f"{age}_weights": check_file_to_read for age in ("old", "new")},
    "out": check_folder_to_write,
}
"""By option that names a file or folder, what it is held against."""
OF_THE_MODEL = (data_drift.NAME, internal_drift.NAME, architecture.NAME)
"""Steps that a cause in the weights may come from."""


def options(arguments: Sequence[str]) -> dict[str, str]:
    """The given options. Raises ValueError in one line: an unknown one, or half of a pair."""
    given = {}
    for argument in arguments:
        key, equals, value = argument.partition("=")
        check_named([key], OPTIONS, "option")
        if not equals or not value:
            raise ValueError(f"{argument!r} is not allowed: key=value")
        given[key] = value
    for old, new in [("old", "new"), *((f"old_{what}", f"new_{what}") for what in PAIRED)]:
        if (old in given) != (new in given):
            lone, other = (old, new) if old in given else (new, old)
            raise ValueError(f"{lone}= has no {other}= beside it: triage compares two")
    for key, needed in (("healthy", "old"), ("tolerance", "old_harness"), ("limit_s", "old_harness")):
        if key in given and needed not in given:
            raise ValueError(f"{key}={given[key]} has no effect without {needed}=")
    for key, check in PLACES.items():
        if key in given:
            check(given[key], key)
    if not given.keys() - {"alpha", "out"}:
        raise ValueError("there is nothing to compare: give old= and new=, two run folders, and what else there is")
    return given


def triage(given: Mapping[str, str]) -> tuple[list[Step], Cross | None]:
    """Every step in its order. Raises ValueError, TraceError or OSError where an input is wrong."""
    alpha = check_number(given.get("alpha", "0.05"), "alpha")
    if alpha >= 1:
        raise ValueError(f"alpha={given['alpha']} is not allowed: below 1")
    runs = _runs(given)
    weights = _weights(given, runs)
    steps = [
        evaluation.compare(*_paths(given, "evaluation"))
        if "old_evaluation" in given
        else lacking(evaluation.NAME, "old_evaluation", "new_evaluation"),
        data_drift.compare(*_paths(given, "data"), alpha)
        if "old_data" in given
        else lacking(data_drift.NAME, "old_data", "new_data"),
        _internal(given, runs, alpha),
        architecture.compare(runs, weights) if runs or weights else lacking(architecture.NAME, "old", "new"),
    ]
    crossed = _cross(given, weights, alpha)
    return [*steps, lacking(cross.NAME, "old_harness", "new_harness") if crossed is None else crossed.step], crossed


def _runs(given: Mapping[str, str]) -> tuple[Trace, Trace] | None:
    return (trace.read(given["old"]), trace.read(given["new"])) if "old" in given else None


def _paths(given: Mapping[str, str], what: str) -> tuple[Path, Path]:
    return Path(given[f"old_{what}"]), Path(given[f"new_{what}"])


def _weights(given: Mapping[str, str], runs: tuple[Trace, Trace] | None) -> tuple[Path, Path] | None:
    """Those that are given, else those of the runs where both have them."""
    if "old_weights" in given:
        return _paths(given, "weights")
    if runs is None:
        return None
    old, new = (run.folder / WEIGHTS for run in runs)
    return (old, new) if old.exists() and new.exists() else None


def _internal(given: Mapping[str, str], runs: tuple[Trace, Trace] | None, alpha: float) -> Step:
    if runs is None:
        return lacking(internal_drift.NAME, "old", "new")
    healthy = band.read(Path(given["healthy"])) if "healthy" in given else None
    return internal_drift.compare(*runs, healthy, alpha)


def _cross(given: Mapping[str, str], weights: tuple[Path, Path] | None, alpha: float) -> Cross | None:
    if "old_harness" not in given:
        return None
    if weights is None:
        raise ValueError("old_harness= needs weights: give old_weights= and new_weights=, or runs that have theirs")
    tolerance = check_number(given["tolerance"], "tolerance") if "tolerance" in given else None
    limit_s = check_number(given.get("limit_s", "600"), "limit_s")
    return cross.compare(weights, (given["old_harness"], given["new_harness"]), alpha, tolerance, limit_s)


def verdict(steps: Sequence[Step], crossed: Cross | None) -> str:
    """Whose the dip is by the cross, and the first step that differs and fits; or what is lacking to say so."""
    differing = [step.name for step in steps[:-1] if step.differs]
    if crossed is None or crossed.cause == cross.UNKNOWN:
        lacks = "old_harness= and new_harness=" if crossed is None else "tolerance="
        first = f"{differing[0]} is the first step that differs" if differing else "no step differs"
        return f"NOT CONFIRMED: {first}; give {lacks} to see whether the dip follows the harness or the weights"
    if crossed.cause == cross.NO_DIP:
        return "NO DIP: the new weights under the new harness score as the old under the old"
    if crossed.cause == cross.TOGETHER:
        return "TOGETHER: it takes the new weights and the new harness; look at what both read, such as the tokenizer"
    artefacts = evaluation.NAME in differing
    of_the_model = [name for name in differing if name in OF_THE_MODEL]
    causes = []
    if crossed.cause in (cross.HARNESS, cross.BOTH):
        why = f", and its {evaluation.NAME} differ" if artefacts else "; no difference of its artefacts was seen"
        causes.append(f"the harness: old weights dip under it as well{why}")
    if crossed.cause in (cross.MODEL, cross.BOTH):
        why = f"; the first step that differs is {of_the_model[0]}" if of_the_model else "; no step above says why"
        causes.append(f"the weights: they dip under the old harness as well{why}")
    return f"CAUSE: {' and '.join(causes)}"


def write_table(path: Path, steps: Sequence[Step]) -> None:
    """A row a finding or note, at least one a step."""
    text = StringIO(newline="")
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["step", "compared", "outcome", "kind", "what"])
    for step in steps:
        rows = [("finding", each) for each in step.findings] + [("note", each) for each in step.notes] or [("", "")]
        writer.writerows([step.name, step.compared, step.outcome, *row] for row in rows)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, text.getvalue().encode())


def main(arguments: Sequence[str]) -> None:
    show_help(arguments, __doc__)
    try:
        given = options(arguments)
        steps, crossed = triage(given)
        if "out" in given:
            write_table(Path(given["out"]) / "triage.csv", steps)
    except (ValueError, TraceError, OSError) as error:
        fail(str(error))
    for step in steps:
        print(step.line())
        for note in step.notes[:3]:
            print(f"  note: {note}")
    print(verdict(steps, crossed))


if __name__ == "__main__":
    main(sys.argv[1:])
