"""The training loop of ``experiments.loop`` for runs along a model axis, with the same files a run.

    for step in range(steps):
        sites = [fault.sites(step, healthy) of each run]
        batch = the runs' batches, (N, B, T + 1)      # of (seed, step), as ever
        losses = model.objective(batch, numerics)     # INJECT: each run's faults in its own rows
        losses.sum().backward()                       # no loss reaches another run's weights
        grad_norm = clip(each run's gradient)
        optimizer.step(each run's learning rates)     # INJECT: learning rates
        monitor.observe(each run's view)              # OBSERVE, LABEL, part, checkpoint: as in a single run

A monitor sees a slice: a plain transformer, taps, history and optimizer that are views of the stacked ones. One that is
``stackable`` sees all slices in one call (``experiments.stacked_monitors``), and nothing else that is done for every
run at every step takes an operation of torch. A run that ends early writes its last files and records no more; its
rows are still computed, and reach no other's.

Sums round differently in a stacked LayerNorm and, by shape, processor and device, in a stacked matrix product, so
``train.stack`` is part of a run's identity. A stack that is stopped and goes on with the same runs keeps its bits.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from experiments import checkpoint, trace
from experiments.build import Run
from experiments.ledger import HELD_OUT, Ledger, drawup_limit, early_ends
from experiments.loop import cadence
from experiments.manifest import manifest_in
from experiments.memory import out_of_memory_named
from experiments.recorder import Recorder
from experiments.stacked_history import SliceHistory, load_history
from experiments.stacked_monitors import StackedMonitors, slice_view
from experiments.stacked_optimizer import StackedAdamW
from experiments.stopping import Stopped, asked, held
from faults.base import Fault, Sites
from models.objective import objective_at
from models.stacked import StackedNumerics, StackedTransformer
from models.taps import Taps
from monitors.base import Reading, StepView, tapped

StackProgress = Callable[[int, dict[Path, int], Tensor, dict[str, Reading]], None]
"""Called after every update with the step; by run folder, the place in the stack of every run that still records; the
losses (N,); and the step's readings of the monitors that watch the stack in one call, a run axis in front."""


def train_stack(runs: Sequence[Run], out: Path, progress: StackProgress | None = None) -> list[dict[str, Any]]:
    """Train runs that ``experiments.stacking.why_single`` lets together, and return their manifests, in order.

    Each run has the folder, files, skipping and resuming of ``experiments.loop.train``, and its errors. Runs whose
    checkpoints are of different steps go on in stacks of their own.
    """
    with held(), ExitStack() as locks:
        manifests, unfinished = [], []
        for run in runs:
            folder = out / run.run_id
            locks.enter_context(checkpoint.locked(folder))
            manifest = manifest_in(folder, run)
            manifests.append(manifest)
            if manifest["end_reason"] not in trace.FINAL_REASONS:
                manifest["end_reason"] = "running"
                unfinished.append((run, folder, manifest))
        unfinished.sort(key=lambda member: _saved_step(member[1]))
        try:
            piece_s = runs[0].train.piece_s
            until = None if piece_s is None else time.monotonic() + piece_s
            for _, members in groupby(unfinished, key=lambda member: _saved_step(member[1])):
                with out_of_memory_named(runs[0]):
                    _train_together(list(members), until, progress)
        except BaseException as error:
            end_reason = "interrupted" if isinstance(error, (KeyboardInterrupt, Stopped)) else "failed"
            for _, folder, manifest in unfinished:
                if manifest["end_reason"] == "running":
                    manifest["end_reason"] = end_reason
                    with suppress(OSError):  # the first error is the one to report
                        trace.write_manifest(folder, manifest)
            raise
        return manifests


def _saved_step(folder: Path) -> int:
    """The step of a folder's checkpoint, -1 for none."""
    state = checkpoint.load(folder, torch.device("cpu"))
    return -1 if state is None else state["step"]


def _distinct(faults: Sequence[Fault]) -> list[tuple[Fault, list[int]]]:
    """Each fault once, with the runs that have it."""
    kinds: list[tuple[Fault, list[int]]] = []
    for index, fault in enumerate(faults):
        own = next((runs for other, runs in kinds if other == fault), None)
        if own is None:
            kinds.append((fault, [index]))
        else:
            own.append(index)
    return kinds


def _sites(kinds: Sequence[tuple[Fault, Sequence[int]]], step: int, healthy: Sites) -> list[Sites]:
    """What each run's fault does at a step; runs of one fault share the answer, which is pure."""
    of_run: dict[int, Sites] = {}
    for fault, runs in kinds:
        of_run |= dict.fromkeys(runs, fault.sites(step, healthy))
    return [of_run[index] for index in range(len(of_run))]


def _train_together(
    members: Sequence[tuple[Run, Path, dict[str, Any]]], until: float | None, progress: StackProgress | None
) -> None:
    """until: when to leave off, on the monotonic clock."""
    runs, folders = [run for run, _, _ in members], [folder for _, folder, _ in members]
    config, device = runs[0].train, runs[0].device
    torch.set_num_threads(config.threads)
    model, healthy = StackedTransformer([run.new_model() for run in runs]), runs[0].healthy_sites()
    optimizer, history = StackedAdamW(model, [run.train for run in runs]), runs[0].new_history()
    histories = [SliceHistory(history, index) for index in range(len(runs))]
    record = Recorder()
    recorders = [Recorder(record, index) for index in range(len(runs))]
    ledgers = [
        Ledger(run, folder, manifest, *parts, share=len(runs))
        for (run, folder, manifest), *parts in zip(
            members, model.slices, optimizer.slices, histories, recorders, strict=True
        )
    ]
    kinds_of_fault = _distinct([run.fault for run in runs])
    due = {name: cadence(monitor.signals) for name, monitor in runs[0].monitors.items()}
    held_out = torch.from_numpy(runs[0].corpus.held_out_batch(config.held_out_sequences)).to(device)
    limit_N = torch.tensor([drawup_limit(run.train) for run in runs], device=device)
    recording = list(range(len(runs)))
    seeds = [run.seed for run in runs]
    tokens_a_step = config.batch_size * runs[0].model_config.context_length

    def label(step: int, tokens: int, sites: Sequence[Sites]) -> Tensor:
        numerics = StackedNumerics(tuple(site.numerics for site in sites))
        with torch.no_grad():
            losses = [
                model.loss(chunk.expand(len(runs), -1, -1), numerics) * len(chunk)
                for chunk in held_out.split(config.batch_size)
            ]
        losses_N = torch.stack(losses).sum(0) / len(held_out)
        record.add(step, tokens, HELD_OUT.name, losses_N)
        return losses_N

    def save(index: int, step: int, end_reason: str) -> None:
        ledger = ledgers[index]
        ledger.tokens, ledger.finite, ledger.best_held_out = tokens, finite_N[index], best_held_out_N[index]
        together.hand_back(index)
        ledger.save(step, end_reason)

    states, first = [ledger.resume() for ledger in ledgers], 0
    if states[0] is None:
        history.record(0, model)
        best_held_out_N = label(0, 0, [healthy] * len(runs))
    else:
        first = states[0]["step"]
        for index, state in enumerate(states):
            model.slices[index].load_state_dict(state["model"])
            optimizer.load_state_dict(index, state["optimizer"])
        load_history(history, [state["history"] for state in states])
        best_held_out_N = torch.stack([ledger.best_held_out for ledger in ledgers])
    finite_N, tokens = torch.stack([ledger.finite for ledger in ledgers]), ledgers[0].tokens
    together = StackedMonitors([run.monitors for run in runs])

    for step in range(first, config.steps):
        sites = _sites(kinds_of_fault, step, healthy)
        batch = torch.from_numpy(runs[0].corpus.batches(seeds, step, config.batch_size))
        if device.type == "cuda":  # so that the copy waits for no kernel, and the host goes on meanwhile
            batch = batch.pin_memory()
        batch = batch.to(device, non_blocking=True)
        tokens += tokens_a_step

        now = step + 1
        observed = [name for name, is_due in due.items() if is_due(now)]
        numerics = StackedNumerics(tuple(site.numerics for site in sites))
        with Taps(model, tapped(runs[0].monitors[name] for name in observed)) as taps:
            losses_N, _, _ = model.objective(batch, numerics)
            losses_N.sum().backward()
        losses_N = losses_N.detach()
        model.take_gradients()
        grad_norms_N = optimizer.clip()
        optimizer.step(step, [site.lr_scale for site in sites])

        history.record(now, model)
        finite_N = finite_N & torch.isfinite(losses_N)
        objective = partial(objective_at, model, batch, 1.0)
        view = StepView(now, tokens, losses_N, grad_norms_N, model, history, (), taps, optimizer, numerics, objective)
        readings = together.observe(observed, view)
        for name, reading in readings.items():
            record.add(now, tokens, name, reading)
        by_themselves = [name for name in observed if name not in together.names]
        for index in recording if by_themselves else ():
            ledgers[index].observe(
                [runs[index].monitors[name] for name in by_themselves],
                slice_view(view, index, histories[index], sites[index].numerics, batch[index]),
            )
        del taps, view, objective  # as large as the step's activations: the next step is to find that memory free
        if progress is not None:
            progress(now, {folders[index]: index for index in recording}, losses_N, readings)

        if now % config.held_out_every_steps == 0:
            held_out_N = label(now, tokens, sites)
            best_held_out_N = torch.minimum(best_held_out_N, held_out_N)
            ends = early_ends(limit_N, finite_N, held_out_N, best_held_out_N)
            for index in [index for index in recording if ends[index] is not None]:
                save(index, now, ends[index])
                recording.remove(index)
            if not recording:
                return
        over = until is not None and time.monotonic() >= until
        if now < config.steps and (over or asked()):
            for index in recording:
                save(index, now, "interrupted")
            return
        if now % config.checkpoint_every_steps == 0 and now < config.steps:
            for index in recording:
                save(index, now, "running")
            record.clear()
    for index in recording:
        save(index, now, "completed" if bool(finite_N[index]) else "non_finite")
