"""The record of a borrowed GPU: written after every piece, so that nothing measured is lost, within a time limit."""

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
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parent.parent
SMI_FIELDS = ("driver_version", "clocks.sm", "clocks.mem", "clocks.max.sm", "power.limit", "temperature.gpu")


def write_json(path: Path, results: dict[str, Any]) -> None:
    """Whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    part.write_text(json.dumps(results, indent=1) + "\n")
    os.replace(part, path)


def file_name(device: str, suffix: str = "") -> str:
    """``NVIDIA H200`` -> ``nvidia-h200<suffix>.json``."""
    return re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-") + f"{suffix}.json"


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


def first_line(error: Exception) -> str:
    """``ValueError: what it says``, up to the end of the line."""
    return f"{type(error).__name__}: {error}".splitlines()[0]


def attempt(work: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """What a piece of work returns; one that raises has failed, with the first line of its error."""
    try:
        return work()
    except Exception as error:
        return {"ok": False, "error": first_line(error)}


class Record:
    """The results of this machine, written after every piece, and the time that is left for more.

    parts: the headings that pieces stand under; limit_s: when all is to be over; longest_piece_s: no piece begins
    later than so long before that.
    """

    def __init__(
        self,
        path: Path,
        found: dict[str, Any],
        parts: Sequence[str],
        limit_s: float,
        longest_piece_s: float,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.path, self._parts, self._clock, self._start = path, tuple(parts), clock, clock()
        self._last_begin_s = limit_s - longest_piece_s
        self.results: dict[str, Any] = {
            "machine": found,
            "complete": False,
            **{part: {} for part in parts},
            "not_reached": [],
        }
        write_json(path, self.results)

    @property
    def spent_s(self) -> float:
        return self._clock() - self._start

    def piece(self, part: str, name: str, work: Callable[[], dict[str, Any]], from_s: float | None = None) -> bool:
        """Do a piece and write it down; False where it is too late to begin: after from_s, or near the limit."""
        if self.spent_s > self._last_begin_s or (from_s is not None and self.spent_s > from_s):
            return False
        result = self.results[part][name] = attempt(work)
        write_json(self.path, self.results)
        print(f"{self.spent_s:4.0f} s  {name}: {result.get('error', result.get('ok', 'measured'))}", flush=True)
        return True

    def finish(self, not_reached: list[str]) -> list[str]:
        """Say what was left out, and return the names of what failed."""
        self.results |= {"complete": not not_reached, "not_reached": not_reached, "wall_s": self.spent_s}
        write_json(self.path, self.results)
        pieces = [piece for part in self._parts for piece in self.results[part].items()]
        return [name for name, result in pieces if result.get("ok") is False]


def check_gpu(who: str, instead: str = "") -> None:
    """Exit with one line, and code 2, where the Triton kernels cannot run on a GPU; instead: what could be done."""
    for there, what in (
        (torch.cuda.is_available(), "a CUDA device that torch sees"),
        (importlib.util.find_spec("triton") is not None, "the package triton"),
    ):
        if not there:
            print(f"error: {who} needs {what}{instead}", file=sys.stderr)
            sys.exit(2)


def begin(arguments: list[str], module: str, suffix: str = "") -> tuple[Path, dict[str, Any]]:
    """Where a command ``python3 -m experiments.<module> [out=FOLDER]`` writes, and ``machine``.

    Exits with one line where the arguments are others, or nothing can be measured.
    """
    given = dict(argument.split("=", 1) for argument in arguments if "=" in argument)
    if set(given) - {"out"} or len(given) != len(arguments):
        print(f"usage: python3 -m experiments.{module} [out=FOLDER]", file=sys.stderr)
        sys.exit(2)
    check_gpu(module.replace("_", "-"))
    found = machine()
    return Path(given.get("out", ROOT / "results" / "gpu")) / file_name(found["device"], suffix), found


def end(path: Path, failed: Sequence[str]) -> None:
    """Say where the record is, and exit with code 1 if anything failed."""
    print(path)
    if failed:
        print(f"error: {len(failed)} failed: {'; '.join(failed)}", file=sys.stderr)
        sys.exit(1)
