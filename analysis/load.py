"""Readings of saved runs, one CSV a run: foreshock load runs=DIR csv=DIR

    foreshock load runs=runs csv=tables signals=train_loss_raw,grad_global_norm

runs=DIR      run folders, a reduced set, or runs from elsewhere
csv=DIR       <run_id>.csv with columns run_id, step, tokens, signal, layer, head, value, undefined, fault, seed, role
signals=A,B   these alone
only=A,B      the runs of these ids alone

In Python, foreshock.load("runs") gives the same as one pandas table.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from foreshock.analysis.runs.frame import write_csv
from foreshock.experiments.places import check_folder_to_read, check_folder_to_write
from foreshock.experiments.trace import TraceError
from foreshock.experiments.usage import fail, misused, show_help

USAGE = "foreshock load runs=DIR csv=DIR [signals=A,B] [only=A,B]"


def main(arguments: Sequence[str]) -> None:
    show_help(arguments, __doc__)
    given = dict(argument.split("=", 1) for argument in arguments if "=" in argument)
    known = {"runs", "csv", "signals", "only"}
    if not {"runs", "csv"} <= set(given) <= known or len(given) != len(arguments) or not all(given.values()):
        misused(USAGE)
    signals, only = (given[key].split(",") if key in given else None for key in ("signals", "only"))
    try:
        runs, tables = check_folder_to_read(given["runs"], "runs"), check_folder_to_write(given["csv"], "csv")
        written = write_csv(runs, tables, signals, only)
    except (ValueError, OSError, TraceError) as error:
        fail(str(error))
    if written.left_out:
        print(f"left out: {'; '.join(f'{run}: {why}' for run, why in written.left_out.items())}", file=sys.stderr)
    print(f"{given['csv']}: {written.files} runs")


if __name__ == "__main__":
    main(sys.argv[1:])
