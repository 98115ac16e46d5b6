"""The training loop, of one run or of a stack of runs.

    for step in range(steps):                        # updates applied so far
        sites = [fault.sites(step, healthy) of each run]
        view = engine.step(step, sites, places)      # INJECT and TAP (``experiments.training.engine``)
        watch.record(step + 1)                       # weights that a monitor will ask for later
        watch.observe(view)                          # OBSERVE: read-only, when a signal is due
        engine.held_out_loss(sites)                  # LABEL: the same batch for every run
        part, checkpoint                             # what a kill cannot take away

A reading at step s was taken after s updates; the label also has a reading at step 0. The held-out
batch runs through the faulty kernel, if any: it is the loss that the trainer would see. Taps, routings and the
objective at other weights are those of an update's last micro-batch; loss and gradients are the whole batch's.

A run of a stack that ends early writes its last files and records no more; its rows are still computed, and reach no
other's.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from foreshock.experiments import trace
from foreshock.experiments.build import Run
from foreshock.experiments.training import checkpoint
from foreshock.experiments.training.early_end import drawup_limit, early_ends
from foreshock.experiments.training.engine import Engine
from foreshock.experiments.training.manifest import manifest_in
from foreshock.experiments.training.missing_readings import take_its_place, take_over, trained_again, without_readings
from foreshock.experiments.training.out_of_memory import out_of_memory_named
from foreshock.experiments.training.recorder import Recorder
from foreshock.experiments.training.run_writer import HELD_OUT, RunWriter
from foreshock.experiments.training.stacked_engine import StackedEngine
from foreshock.experiments.training.stacked_watch import StackedWatch
from foreshock.experiments.training.stopping import Stopped, asked, held
from foreshock.faults.base import Fault, Sites
from foreshock.monitors.base import Reading
from foreshock.monitors.watch import Watch, is_due

Progress = Callable[[int, Tensor, Mapping[str, Reading], Mapping[Path, int]], None]
"""Called after every update with the step, the loss, this step's readings, and the place in the stack of every run that
still records, by its folder. Loss and readings are on the device; of a stack they lead with an axis of runs."""

CHECKSUM_EVERY_STEPS = 100
"""Of the weights, so that a run trained again is known to be the same."""

Member = tuple[Run, Path, dict[str, Any]]
"""A run to be trained, its folder and its manifest."""


def train(run: Run, out: Path, progress: Progress | None = None) -> dict[str, Any]:
    """Train a run into ``out/<run id>`` and return its manifest; a finished run is skipped, a broken one resumed.

    A non-finite loss ends the run as data. After ``train.piece_s`` seconds the run is left as ``interrupted``, with a
    checkpoint, and the next call goes on; likewise on SIGTERM or SIGHUP, which is delivered after that. Raises
    RunError, TraceError or OSError where the folder cannot be used; what it already holds stays.
    """
    (manifest,) = _train_all([run], out, progress, stacked=False)
    return manifest


def train_stack(runs: Sequence[Run], out: Path, progress: Progress | None = None) -> list[dict[str, Any]]:
    """Train runs that ``experiments.training.stacking.why_single`` lets together; their manifests, in order.

    Each run has the folder, files, skipping, resuming and errors that it has by itself. Runs whose checkpoints are of
    different steps go on in stacks of their own.
    """
    return _train_all(runs, out, progress, stacked=True)


def _train_all(runs: Sequence[Run], out: Path, progress: Progress | None, stacked: bool) -> list[dict[str, Any]]:
    with held(), ExitStack() as locks:
        members = []
        for run in runs:
            folder = out / run.run_id
            locks.enter_context(checkpoint.locked(folder))
            members.append((run, folder, manifest_in(folder, run)))
        piece_s = runs[0].train.piece_s
        until = None if piece_s is None else time.monotonic() + piece_s
        _train_members([m for m in members if m[2]["end_reason"] not in trace.FINAL_REASONS], until, progress, stacked)
        finished = [member for member in members if member[2]["end_reason"] in trace.FINAL_REASONS]
        reasons = _add_missing_readings(finished, until, progress, stacked)
        return [manifest | reasons.get(run.run_id, {}) for run, _, manifest in members]


def _train_members(members: Sequence[Member], until: float | None, progress: Progress | None, stacked: bool) -> None:
    """Train unfinished runs on; until: when to leave off, on the monotonic clock."""
    for _, _, manifest in members:
        manifest["end_reason"] = "running"
    try:
        for together in _alike(members) if stacked else [[member] for member in members]:
            with out_of_memory_named(together[0][0]):
                _train_together(together, until, progress, stacked)
    except BaseException as error:
        end_reason = "interrupted" if isinstance(error, (KeyboardInterrupt, Stopped)) else "failed"
        for _, folder, manifest in members:
            if manifest["end_reason"] == "running":
                manifest["end_reason"] = end_reason
                with suppress(OSError):  # the first error is the one to report
                    trace.write_manifest(folder, manifest)
        raise


def _add_missing_readings(
    members: Sequence[Member], until: float | None, progress: Progress | None, stacked: bool
) -> dict[str, dict[str, str]]:
    """Train finished runs again where monitors have not read them; by run id, why one of these is not done yet."""
    left = {run.run_id: (run, folder, manifest) for run, folder, manifest in members if without_readings(run, manifest)}
    reasons: dict[str, dict[str, str]] = {}
    while left:
        again = {run_id: trained_again(*member) for run_id, member in left.items()}
        unfinished = [member for member in again.values() if member[2]["end_reason"] not in trace.FINAL_REASONS]
        _train_members(unfinished, until, progress, stacked)
        for run_id, (_, _, manifest) in again.items():
            run, folder, own = left[run_id]
            if manifest["end_reason"] not in trace.FINAL_REASONS:
                reasons[run_id] = {"end_reason": manifest["end_reason"]}
                del left[run_id]
            elif manifest["observations"] == run.observations:
                own |= take_its_place(folder)
                del left[run_id]
            elif take_over(run, folder, own):
                del left[run_id]
    return reasons


def _alike(members: Sequence[Member]) -> list[list[Member]]:
    """Runs whose checkpoints are of one step together, those without any first, and with the same monitors."""

    def kind(member: Member) -> tuple[int, list[str]]:
        state = checkpoint.load(member[1], torch.device("cpu"))
        return -1 if state is None else state["step"], sorted(member[0].monitors)

    kinds = [kind(member) for member in members]
    first = sorted({repr(one): one for one in kinds}.values())
    return [[member for member, other in zip(members, kinds, strict=True) if other == one] for one in first]


def _begin(runs: Sequence[Run], stacked: bool) -> tuple[Engine, Watch | StackedWatch]:
    """The engine of these runs, with their initial weights, and their monitors."""
    if stacked:
        models, configs = [run.new_model() for run in runs], [run.train for run in runs]
        stacked_engine = StackedEngine(models, configs, runs[0].corpus, [run.seed for run in runs])
        return stacked_engine, StackedWatch(stacked_engine.model, [run.monitors for run in runs])
    single = runs[0].new_engine()
    return single, Watch(single.model, runs[0].monitors)


def _train_together(members: Sequence[Member], until: float | None, progress: Progress | None, stacked: bool) -> None:
    """until: when to leave off, on the monotonic clock."""
    runs, folders = [run for run, _, _ in members], [folder for _, folder, _ in members]
    config, device, healthy = runs[0].train, runs[0].device, runs[0].healthy_sites()
    torch.set_num_threads(config.threads)
    (engine, watch), recorder = _begin(runs, stacked), Recorder()
    writers = [
        RunWriter(*member, engine, watch, recorder, row if stacked else None, len(runs))
        for row, member in enumerate(members)
    ]
    faults = _distinct([run.fault for run in runs])
    limits = torch.tensor([drawup_limit(run.train) for run in runs], device=device)
    recording = list(range(len(runs)))

    def label(step: int, sites: Sequence[Sites]) -> Tensor:
        loss = engine.held_out_loss(sites)
        recorder.add(step, engine.tokens, {HELD_OUT.name: loss})
        return loss.view(-1)

    def save(step: int, end_reason: str) -> None:
        for row in recording:
            writers[row].save(step, end_reason, finite[row], best_held_out[row])
        recorder.clear()

    states = [state for state in (writer.resume() for writer in writers) if state is not None]  # of all, or of none
    first = 0
    if not states:
        watch.record(0)
        finite, best_held_out = torch.ones(len(runs), dtype=torch.bool, device=device), label(0, [healthy] * len(runs))
    else:
        first = states[0]["step"]
        engine.load(states)
        watch.load(states)
        finite, best_held_out = (torch.stack([state[key] for state in states]) for key in ("finite", "best_held_out"))

    for step in range(first, config.steps):
        now, sites = step + 1, _sites(faults, step, healthy)
        due = watch.due(now)
        view = engine.step(step, sites, watch.places(due))
        watch.record(now)
        loss, readings = view.loss, watch.observe(view, due, recording)
        del view  # its taps are as large as the step's activations: the next step is to find that memory free
        recorder.add(now, engine.tokens, readings)
        finite = finite & torch.isfinite(loss)
        if progress is not None:
            progress(now, loss, readings, {folders[row]: row for row in recording})

        if is_due(now, [CHECKSUM_EVERY_STEPS]):
            for row in recording:
                writers[row].checksum(now)
        if is_due(now, [config.held_out_every_steps]):
            held_out = label(now, sites)
            best_held_out = torch.minimum(best_held_out, held_out)
            ends = early_ends(limits, finite, held_out, best_held_out)
            for row in list(recording):
                if (reason := ends[row]) is not None:
                    writers[row].save(now, reason, finite[row], best_held_out[row])
                    recording.remove(row)
            if not recording:
                return
        over = until is not None and time.monotonic() >= until
        if now < config.steps and (over or asked()):
            save(now, "interrupted")
            return
        if now < config.steps and is_due(now, [config.checkpoint_every_steps]):
            save(now, "running")
    for row in recording:  # a loss may have broken after the last evaluation
        writers[row].save(now, "completed" if bool(finite[row]) else "non_finite", finite[row], best_held_out[row])


def _distinct(faults: Sequence[Fault]) -> list[tuple[Fault, list[int]]]:
    """Each fault once, with the runs that have it."""
    kinds: list[tuple[Fault, list[int]]] = []
    for row, fault in enumerate(faults):
        rows = next((rows for other, rows in kinds if other == fault), None)
        if rows is None:
            kinds.append((fault, [row]))
        else:
            rows.append(row)
    return kinds


def _sites(faults: Sequence[tuple[Fault, Sequence[int]]], step: int, healthy: Sites) -> list[Sites]:
    """What each run's fault does at a step; runs of one fault share the answer, which is pure."""
    of_run: dict[int, Sites] = {}
    for fault, rows in faults:
        of_run |= dict.fromkeys(rows, fault.sites(step, healthy))
    return [of_run[row] for row in range(len(of_run))]
