"""Check and time the Triton attention on this machine's GPU: ``make gpu-check``, ``python3 -m experiments.gpu_check``.

    python3 -m experiments.gpu_check [out=results/gpu]

Needs torch, triton and numpy alone. Writes ``<out>/<device>.json`` after every piece, so that what is measured is not
lost, and stops by itself within nine minutes. Exit code: 0, 1 if a check failed, 2 where nothing can be checked.
"""

from __future__ import annotations

import sys
from functools import partial

import torch

from foreshock.experiments.gpu_correctness import checks
from foreshock.experiments.gpu_record import Record, begin, end
from foreshock.experiments.gpu_speed import Case, cases, measure
from foreshock.experiments.usage import show_help

LIMIT_S = 540.0
SPEED_FROM_S = 300.0
"""Checks that have not begun by then are left to the end, so that there is time for the speed."""

LONGEST_PIECE_S = 45.0

new_record = partial(Record, parts=("checks", "speed"), limit_s=LIMIT_S, longest_piece_s=LONGEST_PIECE_S)


def _name(case: Case) -> str:
    return f"{case.length} tokens, d_head {case.d_head}"


def check_machine(record: Record) -> list[str]:
    """Checks, speed, the checks that had to wait; the names of what failed."""
    device = torch.device("cuda")
    every = dict(checks(device))
    waiting = {n: check for n, check in every.items() if not record.piece("checks", n, check, SPEED_FROM_S)}
    sizes = {_name(case): case for case in cases()}
    late = [n for n, case in sizes.items() if not record.piece("speed", n, partial(measure, case, device))]
    late += [n for n, check in waiting.items() if not record.piece("checks", n, check)]
    return record.finish(late)


def main(arguments: list[str]) -> None:
    show_help(arguments, __doc__)
    path, found = begin(arguments, "gpu_check")
    end(path, check_machine(new_record(path, found)))


if __name__ == "__main__":
    main(sys.argv[1:])
