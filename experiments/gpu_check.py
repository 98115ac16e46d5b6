"""Check and time the Triton attention on this machine's GPU: ``make gpu-check``, ``python3 -m experiments.gpu_check``.

    python3 -m experiments.gpu_check [out=results/gpu]

Needs torch, triton and numpy alone. Writes ``<out>/<device>.json`` after every piece, so that what is measured is not
lost, and stops by itself within nine minutes. Exit code: 0, 1 if a check failed, 2 where nothing can be checked.
"""

from __future__ import annotations

import importlib.util
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from experiments.gpu_correctness import checks
from experiments.gpu_speed import Case, cases, measure

ROOT = Path(__file__).resolve().parent.parent
LIMIT_S = 540.0
SPEED_FROM_S = 300.0
"""Checks that have not begun by then are left to the end, so that there is time for the speed."""

LONGEST_PIECE_S = 45.0
SMI_FIELDS = ("driver_version", "clocks.sm", "clocks.mem", "clocks.max.sm", "power.limit", "temperature.gpu")


def write_json(path: Path, results: dict[str, Any]) -> None:
    """Whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    part.write_text(json.dumps(results, indent=1) + "\n")
    os.replace(part, path)


def file_name(device: str) -> str:
    """``NVIDIA H200`` -> ``nvidia-h200.json``."""
    return re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-") + ".json"


def machine() -> dict[str, Any]:
    """Versions, and what nvidia-smi says of driver and clocks where there is one."""
    import triton

    found: dict[str, Any] = {
        "device": torch.cuda.get_device_name(),
        "capability": torch.cuda.get_device_capability(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
    }
    if shutil.which("nvidia-smi"):
        command = ["nvidia-smi", f"--query-gpu={','.join(SMI_FIELDS)}", "--format=csv,noheader", "--id=0"]
        answer = subprocess.run(command, capture_output=True, text=True, timeout=30)
        if answer.returncode == 0:
            found |= dict(zip(SMI_FIELDS, (word.strip() for word in answer.stdout.split(",")), strict=False))
    return found


def attempt(check: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """What a check returns; one that raises has failed, with the first line of its error."""
    try:
        return check()
    except Exception as error:
        return {"ok": False, "error": f"{type(error).__name__}: {error}".splitlines()[0]}


class Record:
    """The results of this machine, written after every piece, and the time that is left for more."""

    def __init__(self, path: Path, found: dict[str, Any], clock: Callable[[], float] = time.monotonic) -> None:
        self.path, self._clock, self._start = path, clock, clock()
        self.results: dict[str, Any] = {
            "machine": found,
            "complete": False,
            "checks": {},
            "speed": {},
            "not_reached": [],
        }
        write_json(path, self.results)

    @property
    def spent_s(self) -> float:
        return self._clock() - self._start

    def piece(self, part: str, name: str, work: Callable[[], dict[str, Any]], from_s: float = LIMIT_S) -> bool:
        """Do a piece and write it down; False where it is too late to begin: after from_s, or near the limit."""
        if self.spent_s > min(from_s, LIMIT_S - LONGEST_PIECE_S):
            return False
        result = self.results[part][name] = attempt(work)
        write_json(self.path, self.results)
        print(f"{self.spent_s:4.0f} s  {name}: {result.get('error', result.get('ok', 'measured'))}", flush=True)
        return True

    def finish(self, not_reached: list[str]) -> list[str]:
        """Say what was left out, and return the names of what failed."""
        self.results |= {"complete": not not_reached, "not_reached": not_reached, "wall_s": self.spent_s}
        write_json(self.path, self.results)
        pieces = {**self.results["checks"], **self.results["speed"]}
        return [name for name, result in pieces.items() if result.get("ok") is False]


def _name(case: Case) -> str:
    return f"{case.length} tokens, d_head {case.d_head}"


def check_machine(record: Record) -> list[str]:
    """Checks, speed, the checks that had to wait; the names of what failed."""
    device = torch.device("cuda")
    every = dict(checks(device))
    waiting = {n: check for n, check in every.items() if not record.piece("checks", n, check, SPEED_FROM_S)}
    sizes = {_name(case): case for case in cases()}
    late = [n for n, case in sizes.items() if not record.piece("speed", n, lambda case=case: measure(case, device))]
    late += [n for n, check in waiting.items() if not record.piece("checks", n, check)]
    return record.finish(late)


def main(arguments: list[str]) -> None:
    given = dict(argument.split("=", 1) for argument in arguments if "=" in argument)
    if set(given) - {"out"} or len(given) != len(arguments):
        sys.exit("usage: python3 -m experiments.gpu_check [out=FOLDER]")
    for there, what in (
        (torch.cuda.is_available(), "a CUDA device that torch sees"),
        (importlib.util.find_spec("triton") is not None, "the package triton"),
    ):
        if not there:
            print(f"error: gpu-check needs {what}", file=sys.stderr)
            sys.exit(2)
    found = machine()
    path = Path(given.get("out", ROOT / "results" / "gpu")) / file_name(found["device"])
    failed = check_machine(Record(path, found))
    print(path)
    if failed:
        print(f"error: {len(failed)} failed: {'; '.join(failed)}", file=sys.stderr)
        sys.exit(1)


if __name__ == "__main__":
    main(sys.argv[1:])
