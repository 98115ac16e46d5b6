"""The runs of an experiment that are not there yet, trained by an executor, with their progress."""

from __future__ import annotations

import shlex
import time
import traceback
from collections import Counter
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from foreshock.experiments import trace
from foreshock.experiments.build import Run, build_run
from foreshock.experiments.cli import USER_ERRORS
from foreshock.experiments.executors import Executor
from foreshock.experiments.machine import check_machine
from foreshock.experiments.pieces import Unfinished, in_pieces
from foreshock.experiments.places import check_folder_to_write
from foreshock.experiments.plan import PlannedRun
from foreshock.experiments.progress import RunInSweep, StackProgress, SweepProgress
from foreshock.experiments.train import signals_of, train_shown
from foreshock.experiments.training.checkpoint import RunError
from foreshock.experiments.training.data import load_once
from foreshock.experiments.training.loop import train_stack
from foreshock.experiments.training.missing_readings import is_complete
from foreshock.experiments.training.stacking import stacks, why_single
from foreshock.experiments.training.stopping import asked, end_if_orphaned, end_with_parent, launching

Config = Mapping[str, Any]
"""What ``build_run`` takes."""


def train_job(configs: Sequence[Config], out: Path) -> list[dict[str, Any]]:
    """What an executor's worker does: train one run or a stack, without a bar; a mistake is one line for every run."""
    end_with_parent()
    if asked():
        return []
    try:
        return train_runs([build_run(config, load_once) for config in configs], out)
    except USER_ERRORS as error:
        return [{"error": " ".join(str(error).split())}] * len(configs)
    except Exception as error:
        traceback.print_exc()
        return [{"error": repr(error)}] * len(configs)
    finally:
        end_if_orphaned()


def train_runs(runs: Sequence[Run], out: Path) -> list[dict[str, Any]]:
    """Train a stack, or the one run that is by itself; their manifests."""
    check_machine(runs[0])
    if runs[0].train.stack == 1 or why_single(runs[0]) is not None:
        return [train_shown(runs[0], out, show=False)]
    with StackProgress(signals_of(runs[0])) as progress:
        return train_stack(runs, out, progress)


def in_pieces_of(config: Config, piece_s: float | None) -> Config:
    """A run's configuration that leaves off after so many seconds."""
    return {**config, "train": {**config["train"], "piece_s": piece_s}}


def left_to_train(planned: Sequence[PlannedRun], runs: Sequence[Run], out: Path) -> list[tuple[PlannedRun, Run]]:
    """The runs that are not finished. Raises RunError where finished ones are damaged, and names them all."""
    pending, damaged, errors = [], [], []
    for cell, run in zip(planned, runs, strict=True):
        folder = out / run.run_id
        try:
            if not is_complete(folder, run):
                pending.append((cell, run))
        except trace.TraceError as error:
            damaged.append(shlex.quote(str(folder)))
            errors.append(error)
    if len(damaged) == 1:
        raise errors[0]
    if damaged:
        raise RunError(
            f"{len(damaged)} of {len(runs)} runs are damaged: rm -r {' '.join(damaged)}, then the same command trains "
            f"them again; the first: {errors[0]}"
        )
    return pending


def check_can_train(runs: Sequence[Run], out: Path, executor: Executor) -> None:
    """Raises ValueError where the folder cannot be written, or where this machine is to train what it cannot."""
    check_folder_to_write(out, "out")
    if executor.is_here:
        for run in {(run.model_config, run.train): run for run in runs}.values():
            check_machine(run)


def _cpu_s(folder: Path) -> float:
    """What earlier commands have spent on a run."""
    manifest = trace.read_manifest(folder)
    return 0.0 if manifest is None else manifest["cpu_s"]


def sweep(planned: Sequence[PlannedRun], runs: Sequence[Run], out: Path, executor: Executor) -> dict[str, Any] | None:
    """Train the runs that are not there yet; how long that took and how busy the cores were, or None.

    Raises RunError where runs failed, after all others are done, or where finished ones are damaged, and Unfinished
    where ``train.piece_s`` is over.
    """
    pending = left_to_train(planned, runs, out)
    if not pending:
        return None
    check_can_train([run for _, run in pending], out, executor)
    jobs = [[pending[index] for index in stack] for stack in stacks([run for _, run in pending])]
    for reason, count in Counter(why_single(run) for _, run in pending if run.train.stack > 1).items():
        if reason is not None:
            print(f"{count} runs train by themselves: {reason}")
    started, spent_s = time.monotonic(), sum(_cpu_s(out / run.run_id) for _, run in pending)
    processes, piece_s = min(executor.at_once, len(jobs)), pending[0][1].train.piece_s
    shown = {
        out / run.run_id: RunInSweep(f"{cell.fault or 'healthy'} {cell.seed}", run.train.steps)
        for cell, run in zip(planned, runs, strict=True)
    }
    with SweepProgress(shown, processes * max(map(len, jobs))), launching() as folder:
        executor.start(folder)

        def trained(some: Sequence[Sequence[tuple[PlannedRun, Run]]], left_s: float | None) -> list[Any]:
            configs = [[in_pieces_of(run.asked, left_s) for _, run in job] for job in some]
            return executor.run(partial(train_job, out=out), configs)

        done = trained(jobs, None) if piece_s is None else in_pieces(jobs, processes, piece_s, trained)
    if asked():  # in a job of -m, which ends with the others
        raise Unfinished("runs are left after a signal; the same command goes on")
    wall_s = time.monotonic() - started
    results = [
        (run, result)
        for job, returned in zip(jobs, done, strict=False)  # a piece may be over before every job's turn
        for (_, run), result in zip(job, returned, strict=True)
    ]
    failed = [(run, result) for run, result in results if "error" in result]
    if failed:
        run, result = failed[0]
        raise RunError(
            f"{len(failed)} of {len(pending)} runs failed and can be resumed by the same command; "
            f"the first, {run.run_id} (seed {run.seed}): {result['error']}"
        )
    unfinished = sum(not is_complete(out / run.run_id, run) for _, run in pending)
    if unfinished:
        why = "a signal to their process" if piece_s is None else f"train.piece_s={piece_s:g} seconds"
        raise Unfinished(f"{unfinished} runs are left after {why}; the same command goes on")
    cpu_s = sum(result["cpu_s"] for _, result in results) - spent_s
    return {
        "trained": len(pending),
        "wall_s": round(wall_s, 1),
        "processes": processes,
        "busy": round(cpu_s / (processes * wall_s), 3),
    }
