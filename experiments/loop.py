"""The training loop, with every injection and observation point marked.

    for step in range(steps):                        # updates applied so far
        sites = fault.sites(step, healthy)           # all that a fault may change
        batch = corpus.batch(seed, step, sites.batch_size)  # INJECT: batch
        for micro_batch in batch:
            loss, auxiliary, routings = model.objective(micro_batch, sites.numerics, ...)  # INJECT: forward
            (loss + auxiliary).backward()            # INJECT: backward, sites.modules in both; TAP: activations
        grad_norm = update(lr(step) * sites.lr_scale)  # INJECT: learning rates, of a clipped AdamW step
        model.update_balance(routings)               # routers with a balancing bias
        history.record(step + 1)                     # weights that a monitor will ask for later
        monitor.observe(view of step + 1)            # OBSERVE: read-only, when a signal is due
        held-out loss                                # LABEL: the same batch for every run
        part, checkpoint                             # what a kill cannot take away

A reading at step s was taken after s updates; the label also has a reading at step 0. The held-out
batch runs through the faulty kernel, if any: it is the loss that the trainer would see. Taps, routings and the
objective at other weights are those of an update's last micro-batch; loss and gradients are the whole batch's.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from experiments import trace
from experiments.build import Run
from experiments.checkpoint import locked
from experiments.gradients import backward, micro_batches
from experiments.ledger import Ledger, drawup_limit, early_ends
from experiments.manifest import manifest_in
from experiments.memory import out_of_memory_named
from experiments.optimizer import adamw, update
from experiments.stopping import Stopped, asked, held
from faults.base import Sites
from models.compiled import CompiledObjective
from models.corruption import Corrupted
from models.objective import objective_at
from models.precision import accumulate_in_fp32
from monitors.base import Reading, Signal, StepView, tapped

Progress = Callable[[int, Tensor, Mapping[str, Reading]], None]
"""Called after every update with the step, the loss (0-dim, on the device) and this step's readings."""


def train(run: Run, out: Path, progress: Progress | None = None) -> dict[str, Any]:
    """Train a run into ``out/<run id>`` and return its manifest; a finished run is skipped, a broken one resumed.

    A non-finite loss ends the run as data. After ``train.piece_s`` seconds the run is left as ``interrupted``, with a
    checkpoint, and the next call goes on; likewise on SIGTERM or SIGHUP, which is delivered after that. Raises
    RunError, TraceError or OSError where the folder cannot be used; what it already holds stays.
    """
    folder = out / run.run_id
    with held(), locked(folder):
        manifest = manifest_in(folder, run)
        if manifest["end_reason"] in trace.FINAL_REASONS:
            return manifest
        manifest["end_reason"] = "running"
        try:
            with out_of_memory_named(run):
                _train(run, folder, manifest, progress)
        except BaseException as error:
            manifest["end_reason"] = "interrupted" if isinstance(error, (KeyboardInterrupt, Stopped)) else "failed"
            with suppress(OSError):  # the first error is the one to report
                trace.write_manifest(folder, manifest)
            raise
        return manifest


def _train(run: Run, folder: Path, manifest: dict[str, Any], progress: Progress | None) -> None:
    config, device = run.train, run.device
    torch.set_num_threads(config.threads)
    accumulate_in_fp32()
    model, healthy = run.new_model(), run.healthy_sites()
    optimizer, history = adamw(model, config), run.new_history()
    ledger = Ledger(run, folder, manifest, model, optimizer, history)
    due = {name: cadence(monitor.signals) for name, monitor in run.monitors.items()}
    held_out = torch.from_numpy(run.corpus.held_out_batch(config.held_out_sequences)).to(device)
    parameters = list(model.parameters())
    at_a_time = config.micro_batch or config.batch_size
    unwatched = CompiledObjective(model) if config.compile else model.objective
    started = time.monotonic()

    def label(step: int, sites: Sites) -> Tensor:
        with torch.no_grad(), Corrupted(model, sites.modules):
            losses = [model.loss(chunk, sites.numerics) * len(chunk) for chunk in held_out.split(at_a_time)]
        loss = torch.stack(losses).sum() / len(held_out)
        ledger.label(step, loss)
        return loss

    state, first = ledger.resume(), 0
    if state is None:
        history.record(0, model)
        ledger.best_held_out = label(0, healthy)
    else:
        first = state["step"]
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        history.load_state_dict(state["history"])

    end_reason = "completed"
    for step in range(first, config.steps):
        sites = run.fault.sites(step, healthy)
        batch = torch.from_numpy(run.corpus.batch(run.seed, step, sites.batch_size)).to(device)
        ledger.tokens += batch[:, 1:].numel()

        now = step + 1
        observers = [monitor for name, monitor in run.monitors.items() if due[name](now)]
        optimizer.zero_grad(set_to_none=True)
        with Corrupted(model, sites.modules):
            parts = micro_batches(batch, config.micro_batch, config.watched_sequences)
            done = backward(model, parts, sites, tapped(observers), unwatched)
        grad_norm = update(parameters, optimizer, config, step, sites.lr_scale)
        model.update_balance(done.routings, sites.balance_scale)

        history.record(now, model)
        ledger.finite = ledger.finite & torch.isfinite(done.loss)
        objective = partial(objective_at, model, done.watched, sites.balance_scale)
        view = StepView(
            now,
            ledger.tokens,
            done.loss,
            grad_norm,
            model,
            history,
            done.routings,
            done.taps,
            optimizer,
            sites.numerics,
            objective,
        )
        readings, loss = ledger.observe(observers, view), done.loss
        del view, done  # its taps are as large as the step's activations: the next step is to find that memory free
        if progress is not None:
            progress(now, loss, readings)

        if now % config.held_out_every_steps == 0:
            held_out_loss = label(now, sites)
            ledger.best_held_out = torch.minimum(ledger.best_held_out, held_out_loss)
            (early,) = early_ends(drawup_limit(config), ledger.finite, held_out_loss, ledger.best_held_out)
            if early is not None:
                end_reason = early
                break
        over = config.piece_s is not None and time.monotonic() - started >= config.piece_s
        if now < config.steps and (over or asked()):
            ledger.save(now, "interrupted")
            return
        if now % config.checkpoint_every_steps == 0 and now < config.steps:
            ledger.save(now, "running")
    if end_reason == "completed" and not bool(ledger.finite):  # broke after the last evaluation
        end_reason = "non_finite"
    ledger.save(now, end_reason)


def cadence(signals: Iterable[Signal]) -> Callable[[int], bool]:
    """Whether any of these signals is due at a step."""
    cadences = {signal.every_steps for signal in signals}
    return lambda step: any(step % every == 0 for every in cadences)
