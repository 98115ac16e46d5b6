"""The training loop, with every injection and observation point marked.

    for step in range(steps):                        # updates applied so far
        sites = fault.sites(step, healthy)           # all that a fault may change
        batch = corpus.batch(seed, step, sites.batch_size)  # INJECT: batch
        for micro_batch in batch:
            loss, auxiliary, routings = model.objective(micro_batch, sites.numerics, ...)  # INJECT: forward
            (loss + auxiliary).backward()            # INJECT: backward, sites.modules in both; TAP: activations
        grad_norm = clip(gradients)
        optimizer.step(lr(step) * sites.lr_scale)    # INJECT: learning rates
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

import fcntl
import hashlib
import io
import platform
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save as safetensors_bytes
from torch import Tensor

from experiments import trace
from experiments.build import ROOT, Run
from experiments.gradients import backward
from experiments.memory import out_of_memory_named
from experiments.optimizer import adamw, learning_rate, set_learning_rate
from faults.base import Sites
from models.compiled import CompiledObjective
from models.corruption import Corrupted
from models.objective import objective_at
from monitors.base import Masked, Reading, Signal, StepView, state_of, tapped

HELD_OUT = Signal("held_out_loss", "nats/token", "up")
"""The label signal: mean NLL on the fixed held-out batch."""

Progress = Callable[[int, Tensor, Mapping[str, Reading]], None]
"""Called after every update with the step, the loss (0-dim, on the device) and this step's readings."""


class RunError(Exception):
    """A run folder that cannot be used: held by another process, or with a damaged checkpoint."""


class Recorder:
    """Readings since the last part; they stay on the device until the part is written."""

    def __init__(self) -> None:
        self.clear()

    def clear(self) -> None:
        self.first_step: int | None = None
        self._readings: dict[str, list[tuple[int, int, Tensor, Tensor | None]]] = {}

    def add(self, step: int, tokens: int, name: str, reading: Reading) -> None:
        value, undefined = (reading.value, reading.undefined) if isinstance(reading, Masked) else (reading, None)
        self.first_step = step if self.first_step is None else self.first_step
        self._readings.setdefault(name, []).append((step, tokens, value, undefined))

    def columns(self) -> dict[str, Any]:
        """The columns of a part, one copy to the host a signal."""
        blocks: dict[str, list[np.ndarray]] = {name: [] for name in trace.SCHEMA.names}
        for name, readings in self._readings.items():
            values = torch.stack([value.double() for _, _, value, _ in readings]).cpu().numpy()
            undefined = np.zeros(values.shape, bool)
            if readings[0][3] is not None:
                undefined = torch.stack([mask for _, _, _, mask in readings]).cpu().numpy()
            index = np.indices(values.shape).reshape(values.ndim, -1)
            size = values.size
            blocks["step"].append(np.array([step for step, _, _, _ in readings])[index[0]])
            blocks["tokens"].append(np.array([tokens for _, tokens, _, _ in readings])[index[0]])
            blocks["signal"].append(np.full(size, name, dtype=object))
            blocks["layer"].append(index[1] if values.ndim > 1 else np.full(size, -1))
            blocks["head"].append(index[2] if values.ndim > 2 else np.full(size, -1))
            blocks["value"].append(values.ravel())
            blocks["undefined"].append(undefined.ravel())
        return {name: np.concatenate(parts) for name, parts in blocks.items()}


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold the run folder against a second process. Raises RunError at once if another one has it."""
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "lock", "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise RunError(f"run folder {folder} is in use by another process: wait for it, or stop it") from None
        yield


def _save_checkpoint(folder: Path, state: Mapping[str, Any]) -> None:
    buffer = io.BytesIO()
    torch.save(state, buffer)
    payload = buffer.getvalue()
    trace.write_whole(folder / "checkpoint.pt", hashlib.sha256(payload).digest() + payload)


def _load_checkpoint(folder: Path, device: torch.device) -> dict[str, Any] | None:
    path = folder / "checkpoint.pt"
    if not path.exists():
        return None
    data = path.read_bytes()
    if hashlib.sha256(data[32:]).digest() != data[:32]:
        raise RunError(f"checkpoint {path} is corrupted (checksum): delete the run's folder to run it again")
    return torch.load(io.BytesIO(data[32:]), map_location=device, weights_only=True)


def _git(*arguments: str) -> str | None:
    try:
        answer = subprocess.run(["git", "-C", str(ROOT), *arguments], capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return answer.stdout.strip() if answer.returncode == 0 else None


def new_manifest(run: Run) -> dict[str, Any]:
    """Provenance of a run: identity, versions, machine, and what each signal means."""
    dirty = _git("status", "--porcelain", "--untracked-files=no")
    onset = run.fault.onset
    signals = [*(signal for monitor in run.monitors.values() for signal in monitor.signals), HELD_OUT]
    return {
        "schema": trace.SCHEMA_VERSION,
        "run_id": run.run_id,
        **run.identity,
        "seed": run.seed,
        "onset_step": None if onset is None else onset + 1,
        "left_out_monitors": list(run.left_out_monitors),
        "signals": {signal.name: asdict(signal) for signal in signals},
        "git_commit": _git("rev-parse", "HEAD"),
        "git_dirty": None if dirty is None else bool(dirty),
        "versions": {"python": platform.python_version(), "torch": torch.__version__, "numpy": np.__version__},
        "device": torch.cuda.get_device_name() if run.device.type == "cuda" else platform.machine(),
        "steps_done": 0,
        "tokens_done": 0,
        "wall_s": 0.0,
        "cpu_s": 0.0,
        "end_reason": "running",
    }


def train(run: Run, out: Path, progress: Progress | None = None) -> dict[str, Any]:
    """Train a run into ``out/<run id>`` and return its manifest; a finished run is skipped, a broken one resumed.

    A non-finite loss ends the run as data. After ``train.piece_s`` seconds the run is left as ``interrupted``, with a
    checkpoint, and the next call goes on. Raises RunError, TraceError or OSError where the folder
    cannot be used; what it already holds stays.
    """
    folder = out / run.run_id
    with locked(folder):
        manifest = trace.read_manifest(folder) or new_manifest(run)
        if manifest["end_reason"] in trace.FINAL_REASONS:
            return manifest
        manifest["end_reason"] = "running"
        try:
            with out_of_memory_named(run):
                _train(run, folder, manifest, progress)
        except BaseException as error:
            manifest["end_reason"] = "interrupted" if isinstance(error, KeyboardInterrupt) else "failed"
            with suppress(OSError):  # the first error is the one to report
                trace.write_manifest(folder, manifest)
            raise
        return manifest


def _train(run: Run, folder: Path, manifest: dict[str, Any], progress: Progress | None) -> None:
    config, device = run.train, run.device
    torch.set_num_threads(config.threads)
    model, healthy = run.new_model(), run.healthy_sites()
    optimizer, history, recorder = adamw(model, config), run.new_history(), Recorder()
    due = {name: _cadence(monitor.signals) for name, monitor in run.monitors.items()}
    held_out = torch.from_numpy(run.corpus.held_out_batch(config.held_out_sequences)).to(device)
    finite = torch.ones((), dtype=torch.bool, device=device)
    best_held_out = torch.full((), torch.inf, device=device)
    parameters = list(model.parameters())
    at_a_time = config.micro_batch or config.batch_size
    unwatched = CompiledObjective(model) if config.compile else model.objective
    started, cpu_started = time.monotonic(), time.process_time()
    spent = {key: manifest[key] for key in ("wall_s", "cpu_s")}

    def label(step: int, sites: Sites) -> Tensor:
        with torch.no_grad(), Corrupted(model, sites.modules):
            losses = [model.loss(chunk, sites.numerics) * len(chunk) for chunk in held_out.split(at_a_time)]
        loss = torch.stack(losses).sum() / len(held_out)
        recorder.add(step, tokens, HELD_OUT.name, loss)
        return loss

    def save(step: int, end_reason: str) -> None:
        """Part, then checkpoint, then manifest: a resume cuts the trace back to the checkpoint it finds."""
        if recorder.first_step is not None:
            trace.write_part(folder, recorder.first_step, step, recorder.columns())
            recorder.clear()
        if end_reason not in trace.FINAL_REASONS:
            _save_checkpoint(
                folder,
                {
                    "step": step,
                    "tokens": tokens,
                    "model": model.state_dict(),
                    "optimizer": optimizer.state_dict(),
                    "history": history.state_dict(),
                    "finite": finite,
                    "best_held_out": best_held_out,
                    "monitors": {name: state_of(monitor) for name, monitor in run.monitors.items()},
                },
            )
        else:
            weights = {
                name: tensor
                for name, tensor in model.state_dict().items()
                if not (name == "head.weight" and run.model_config.tie_embeddings)
            }
            trace.write_whole(folder / "weights.safetensors", safetensors_bytes(weights))
        manifest.update(
            steps_done=step,
            tokens_done=tokens,
            end_reason=end_reason,
            wall_s=spent["wall_s"] + time.monotonic() - started,
            cpu_s=spent["cpu_s"] + time.process_time() - cpu_started,
        )
        trace.write_manifest(folder, manifest)
        if end_reason in trace.FINAL_REASONS:
            (folder / "checkpoint.pt").unlink(missing_ok=True)

    state = _load_checkpoint(folder, device)
    if state is None:
        first, tokens = 0, 0
        trace.cut_back(folder, -1)
        history.record(0, model)
        best_held_out = label(0, healthy)
    else:
        first, tokens, finite, best_held_out = (state[k] for k in ("step", "tokens", "finite", "best_held_out"))
        trace.cut_back(folder, first)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        history.load_state_dict(state["history"])
        for name, monitor in run.monitors.items():
            if state["monitors"][name] is not None:
                monitor.load_state_dict(state["monitors"][name])

    end_reason = "completed"
    for step in range(first, config.steps):
        sites = run.fault.sites(step, healthy)
        batch = torch.from_numpy(run.corpus.batch(run.seed, step, sites.batch_size)).to(device)
        tokens += batch[:, 1:].numel()

        now = step + 1
        observers = [monitor for name, monitor in run.monitors.items() if due[name](now)]
        optimizer.zero_grad(set_to_none=True)
        with Corrupted(model, sites.modules):
            loss, routings, taps, watched = backward(
                model, batch, sites, config.micro_batch, tapped(observers), unwatched
            )
        grad_norm = torch.nn.utils.get_total_norm([p.grad for p in parameters])
        if config.clip is not None:
            torch.nn.utils.clip_grads_with_norm_(parameters, config.clip, grad_norm)
        set_learning_rate(optimizer, learning_rate(config, step), sites.lr_scale)
        optimizer.step()
        model.update_balance(routings, sites.balance_scale)

        history.record(now, model)
        finite = finite & torch.isfinite(loss)
        objective = partial(objective_at, model, watched, sites.numerics, sites.modules, sites.balance_scale)
        view = StepView(
            now, tokens, loss, grad_norm, model, history, routings, taps, optimizer, sites.numerics, objective
        )
        readings: dict[str, Reading] = {}
        for monitor in observers:
            seen = monitor.observe(view)
            wanted = [s.name for s in monitor.signals if now % s.every_steps == 0 and s.name in seen]
            readings |= {signal: seen[signal] for signal in wanted}
        del view, taps  # as large as the step's activations: the next step is to find that memory free
        for signal, reading in readings.items():
            recorder.add(now, tokens, signal, reading)
        if progress is not None:
            progress(now, loss, readings)

        if now % config.held_out_every_steps == 0:
            held_out_loss = label(now, sites)
            best_held_out = torch.minimum(best_held_out, held_out_loss)
            if not bool(finite & torch.isfinite(held_out_loss)):
                end_reason = "non_finite"
                break
            if config.stop_drawup_nats is not None and bool(held_out_loss - best_held_out >= config.stop_drawup_nats):
                end_reason = "diverged"
                break
        if now < config.steps and config.piece_s is not None and time.monotonic() - started >= config.piece_s:
            save(now, "interrupted")
            return
        if now % config.checkpoint_every_steps == 0 and now < config.steps:
            save(now, "running")
    if end_reason == "completed" and not bool(finite):  # broke after the last evaluation
        end_reason = "non_finite"
    save(now, end_reason)


def _cadence(signals) -> Callable[[int], bool]:
    """Whether any of these signals is due at a step."""
    cadences = {signal.every_steps for signal in signals}
    return lambda step: any(step % every == 0 for every in cadences)
