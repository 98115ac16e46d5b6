"""The command ``foreshock``: its first argument names what is done, the others are that command's own.

foreshock train fault=bf16_shift seed=1
foreshock reproduce scale=desk
foreshock train --help
"""

from __future__ import annotations

import difflib
import os
import runpy
import sys

from foreshock.starting import TRAINING, answer_signals

COMMANDS = {
    "reproduce": ("experiments.reproduce", "train the runs of an experiment and report on them"),
    "train": ("experiments.train", "train one run, or a grid of runs with -m"),
    "compare": ("experiments.compare", "monitors against the dose of one fault"),
    "report": ("analysis.report", "draw the report of an experiment again"),
    "score": ("analysis.score", "score saved runs, with a detector of your own"),
    "import": ("experiments.import_runs", "turn exports of runs trained elsewhere into traces"),
    "load": ("analysis.load", "readings of runs as a table, one CSV a run"),
    "external": ("analysis.external", "score detectors on public training logs with real failures"),
    "faults": ("experiments.faults", "list the faults that a run can have"),
    "campaign": ("experiments.campaign", "many faults in one command, with what each really changed"),
    "canary": ("experiments.canary", "a few short runs after a change, against a healthy band"),
    "triage": ("analysis.triage", "a benchmark dips: evaluation, data, training, model or weights"),
    "calibrate": ("analysis.calibrate", "set thresholds of live alarms on healthy runs of your own"),
    "runs": ("experiments.runs", "list the runs in a folder, adopt or prune them"),
    "bench": ("experiments.bench", "measure what steps and monitors cost"),
}
"""By command, its module and what it does."""


def usage() -> str:
    lines = [f"  {name:<11}{does}" for name, (_, does) in COMMANDS.items()]
    return "\n".join(["usage: foreshock COMMAND ..., COMMAND one of", *lines, "foreshock COMMAND --help says more"])


def main() -> None:
    name = sys.argv[1] if len(sys.argv) > 1 else ""
    if name in ("", "-h", "--help"):
        print(usage())
        sys.exit(0 if name else 2)
    if name not in COMMANDS:
        near = difflib.get_close_matches(name, COMMANDS, n=1)
        meant = f"; did you mean {near[0]!r}?" if near else ""
        print(f"error: {name!r} is no command: one of {', '.join(COMMANDS)}{meant}", file=sys.stderr)
        sys.exit(2)
    if name in TRAINING:
        answer_signals()
    sys.argv = [f"foreshock {name}", *sys.argv[2:]]
    sys.path.insert(0, os.getcwd())  # as python -m does, for plugins
    runpy.run_module(f"foreshock.{COMMANDS[name][0]}", run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
