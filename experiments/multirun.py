"""The jobs of ``-m``: a bad one does not end the others, and the sweep ends with a line for each bad one.

A launcher may run jobs in processes of their own and Hydra hands nothing of theirs back, so that a job notes how it
failed in a file of the sweep's folder. A job on another machine, which cannot, fails as Hydra has it.
"""

from __future__ import annotations

import json
import sys
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode

from foreshock.experiments.files import write_whole
from foreshock.experiments.pieces import UNFINISHED_CODE, Unfinished
from foreshock.experiments.training.stopping import asked, end_if_orphaned, end_with_parent, launching, sweep_folder

BAD_JOB = "bad-job-"


def in_multirun() -> bool:
    """Whether Hydra runs a job of a sweep here."""
    return HydraConfig.initialized() and HydraConfig.get().mode is RunMode.MULTIRUN


def run_job(task: Callable[..., None], *arguments: object, expected: tuple[type[Exception], ...]) -> None:
    """Run one job and note its failure. expected: errors that a person can mend; others also show their traceback."""
    end_with_parent()
    if asked():
        return
    try:
        task(*arguments)
    except Exception as error:
        folder = sweep_folder()
        if folder is None:
            raise
        if not isinstance(error, (*expected, Unfinished)):
            traceback.print_exc()
        _note(folder, error)
    finally:
        end_if_orphaned()


def _note(folder: Path, error: Exception) -> None:
    job = HydraConfig.get()
    said = " ".join(str(error).split()) or type(error).__name__
    kind = "unfinished" if isinstance(error, Unfinished) else "error"
    bad = {"number": job.job.num, "overrides": list(job.overrides.task), "kind": kind, "said": said}
    write_whole(folder / f"{BAD_JOB}{job.job.num:06d}", json.dumps(bad).encode())


def _line(bad: Mapping[str, Any]) -> str:
    """One line for a bad job, with those of its overrides that are not the whole sweep's."""
    given = {argument.lower() for argument in sys.argv}
    own = [line for line in bad["overrides"] if line.lower() not in given]
    return f"{bad['kind']}: job {bad['number']} ({' '.join(own)}): {bad['said']}"


def run_jobs(main: Callable[[], None]) -> None:
    """Run a Hydra command with ``-m``; afterwards a line for every bad job, and exit code 2.

    75 where jobs are unfinished (``train.piece_s``) and none is bad.
    """
    with launching() as folder:
        try:
            main()
        finally:
            bad = []
            for path in sorted(folder.glob(f"{BAD_JOB}*")):
                bad.append(json.loads(path.read_text()))
                print(_line(bad[-1]), file=sys.stderr)
                path.unlink()
    if bad:
        sys.exit(2 if any(job["kind"] == "error" for job in bad) else UNFINISHED_CODE)
