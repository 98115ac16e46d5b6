"""The training loop, of one run or of a stack of runs.

    for step in range(steps):                        # updates applied so far
        stop and resume                              # INJECT: resume, and checkpoints of system
        sites = [fault.sites(step, healthy) of each run]
        view = engine.step(step, sites, places)      # INJECT and TAP (``experiments.training.engine``)
        watch.record(step + 1)                       # weights that a monitor will ask for later
        watch.observe(view)                          # OBSERVE: read-only, when a signal is due
        telemetry.arrived(readings)                  # INJECT: system, between monitors and recorder
        engine.held_out_loss(sites)                  # LABEL: the same batch for every run, and clean
        part, checkpoint                             # what a kill cannot take away

A reading at step s was taken after s updates; the label also has a reading at step 0. The held-out
batch runs through the faulty kernel, if any: it is the loss that the trainer would see. Where the fault changes the
forward, the label is also taken clean, through healthy sites with the same weights, and a run ends as diverged by that
one: a mask that leaks would lower the other, and raise it again as it ends. Taps, routings and the objective at other
weights are those of an update's last micro-batch; loss and gradients are the whole batch's.

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
from foreshock.experiments.training.missing_readings import (
    finish_replacing,
    is_whole,
    take_its_place,
    take_over,
    trained_again,
    without_readings,
)
from foreshock.experiments.training.out_of_memory import out_of_memory_named
from foreshock.experiments.training.recorder import Recorder
from foreshock.experiments.training.restart import Stops, go_back, log_forgotten
from foreshock.experiments.training.run_writer import CLEAN, HELD_OUT, RunWriter
from foreshock.experiments.training.stacked_engine import StackedEngine
from foreshock.experiments.training.stacked_watch import StackedWatch
from foreshock.experiments.training.stopping import Stopped, asked, held
from foreshock.experiments.training.telemetry import Telemetry
from foreshock.faults.base import Fault, Sites
from foreshock.faults.resume_lossy import Resume
from foreshock.monitors.base import Reading
from foreshock.monitors.cadence import is_due
from foreshock.monitors.watch import Watch

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
            finish_replacing(folder)
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
        manifest.pop("error", None)
    try:
        for together in _alike(members) if stacked else [[member] for member in members]:
            with out_of_memory_named(together[0][0]):
                _Together(together, stacked).train(until, progress)
    except BaseException as error:
        end_reason = "interrupted" if isinstance(error, (KeyboardInterrupt, Stopped)) else "failed"
        for _, folder, manifest in members:
            if manifest["end_reason"] == "running":
                manifest["end_reason"] = end_reason
                if end_reason == "failed":
                    manifest["error"] = " ".join(str(error).split()) or type(error).__name__
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
            elif is_whole(manifest):
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
        stack = StackedEngine(models, configs, runs[0].corpus, [run.seed for run in runs])
        return stack, StackedWatch(stack.anatomy, stack.optimizer, [run.monitors for run in runs])
    single = runs[0].new_engine()
    return single, Watch(single.anatomy, single.optimizer, runs[0].monitors)


class _Together:
    """Runs in training: one, or those of a stack; each goes on from its checkpoint."""

    def __init__(self, members: Sequence[Member], stacked: bool) -> None:
        self.members, self.stacked = members, stacked
        self.runs, self.folders = [run for run, _, _ in members], [folder for _, folder, _ in members]
        self.config, device = self.runs[0].train, self.runs[0].device
        self.healthy = self.runs[0].healthy_sites()
        torch.set_num_threads(self.config.threads)
        self.faults = _distinct([run.fault for run in self.runs])
        self.stops = None if stacked else Stops(self.runs[0])  # no run of a stack has such a fault
        self.limits = torch.tensor([drawup_limit(run.train) for run in self.runs], device=device)
        self.recording = list(range(len(members)))
        self.records_clean = any(CLEAN.name in manifest["signals"] for _, _, manifest in members)
        self.go_on()

    def go_on(self, lossy: Resume | None = None) -> None:
        """Begin, or go on from the checkpoints, with engine and watch built anew. lossy: what the resume forgets."""
        (self.engine, self.watch), self.recorder = _begin(self.runs, self.stacked), Recorder()
        self.telemetry = Telemetry(self.runs[0].seed)
        self.writers = [
            RunWriter(*member, self.engine, self.watch, self.recorder, row if self.stacked else None, len(self.members))
            for row, member in enumerate(self.members)
        ]
        states = [state for state in (writer.resume() for writer in self.writers) if state is not None]
        if not states:  # which all have, or none
            self.first = 0
            self.finite = torch.ones(len(self.runs), dtype=torch.bool, device=self.limits.device)
            _, self.best_held_out = self.label(0, [self.healthy] * len(self.runs))
        else:
            self.first = states[0]["step"]
            self.engine.load(states if lossy is None else [lossy.remembered(states[0], self.engine.state_of(0))])
            self.watch.load(states)
            self.telemetry.load_state_dict(states[0].get("late", {}))
            self.finite, self.best_held_out = (
                torch.stack([state[key] for state in states]) for key in ("finite", "best_held_out")
            )
            if lossy is not None:
                log_forgotten(self.engine, lossy, states[0], self.first)
        self.watch.record(self.first)  # again, for monitors that now look back to other steps than at the checkpoint

    def train(self, until: float | None, progress: Progress | None) -> None:
        """To the end, or to ``until``, on the monotonic clock, or until others ask for an end."""
        steps, now = self.config.steps, self.first
        while now < steps:
            now = self.stop(now)
            self.step(now, progress)
            now += 1
            if not self.recording:
                return
            over = until is not None and time.monotonic() >= until
            if now < steps and (over or asked()):
                self.save(now, "interrupted")
                return
            if now < steps and is_due(now, self.config.checkpoint_every_steps):
                self.save(now, "running")
        for row in self.recording:  # a loss may have broken after the last evaluation
            self.write(row, now, "completed" if bool(self.finite[row]) else "non_finite")

    def stop(self, step: int) -> int:
        """Stop and resume the run before an update where its fault does; the update that it goes on with."""
        if self.stops is None:
            return step
        (folder,), events = self.folders, self.writers[0].events
        if step in self.stops.to_keep(events):
            self.save(step, "running")
            checkpoint.keep(folder, step)
        loss, resume = self.stops.losses_ahead(events).get(step), self.stops.resumes.get(step)
        if loss is not None:
            self.save(step, "running")
            go_back(folder, step, loss, self.engine.logs[0], events)
            self.end()
            self.go_on()
            checkpoint.discard_kept(folder, but=self.stops.to_keep(self.writers[0].events))
            return self.stop(self.first)
        if resume is not None:
            self.save(step, "running")
            self.end()
            self.go_on(resume)
            self.writers[0].note(step, "resume", forgotten=list(resume.forget))
        return step

    def end(self) -> None:
        """Throw away all that a stopped process takes with it."""
        del self.engine, self.watch, self.recorder, self.telemetry, self.writers

    def step(self, step: int, progress: Progress | None) -> None:
        """Take a step, observe it and, where it is due, evaluate; runs that end then record no more."""
        now, sites = step + 1, _sites(self.faults, step, self.healthy)
        due = self.watch.due(now)
        view = self.engine.step(step, sites, self.watch.places(due))
        self.watch.record(now)
        loss, readings = view.loss, self.watch.observe(view, due, self.recording)
        if not self.stacked:
            readings = self.telemetry.arrived(step, readings, sites[0], self.engine.logs[0])
        del view  # its taps are as large as the step's activations: the next step is to find that memory free
        self.recorder.add(now, self.engine.tokens, readings)
        self.finite = self.finite & torch.isfinite(loss)
        if progress is not None:
            progress(now, loss, readings, {self.folders[row]: row for row in self.recording})
        if is_due(now, CHECKSUM_EVERY_STEPS):
            for row in self.recording:
                self.writers[row].checksum(now)
        if is_due(now, self.config.held_out_every_steps):
            own, clean = self.label(now, sites)
            self.best_held_out = torch.minimum(self.best_held_out, clean)
            ends = early_ends(self.limits, self.finite & torch.isfinite(own), clean, self.best_held_out)
            for row in list(self.recording):
                if (reason := ends[row]) is not None:
                    self.write(row, now, reason)
                    self.recording.remove(row)

    def label(self, step: int, sites: Sequence[Sites]) -> tuple[Tensor, Tensor]:
        """The held-out loss of each run, own and clean, (N,) each, recorded; the same without a faulty forward."""
        own = clean = self.engine.held_out_loss(sites)
        changed = [site.changes_forward for site in sites]
        if any(changed):
            healthy = self.engine.held_out_loss([self.healthy] * len(sites))
            clean = torch.where(torch.tensor(changed, device=own.device).view(own.shape), healthy, own)
        self.recorder.add(step, self.engine.tokens, {HELD_OUT.name: own})
        if self.records_clean:
            self.recorder.add(step, self.engine.tokens, {CLEAN.name: clean})
        return own.view(-1), clean.view(-1)

    def save(self, step: int, end_reason: str) -> None:
        """Write what a kill cannot take away, of all runs that still record."""
        for row in self.recording:
            self.write(row, step, end_reason)
        self.recorder.clear()

    def write(self, row: int, step: int, end_reason: str) -> None:
        late = self.telemetry.state_dict()
        self.writers[row].save(step, end_reason, self.finite[row], self.best_held_out[row], late)


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
