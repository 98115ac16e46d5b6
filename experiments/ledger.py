"""What one run writes down while it trains: readings, trace parts, checkpoint, manifest, final weights."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save as safetensors_bytes
from torch import Tensor

from experiments import checkpoint, trace
from experiments.build import Run
from experiments.optimizer import TrainConfig
from models.transformer import Transformer
from monitors.base import Masked, Monitor, Reading, Signal, StepView, WeightHistory, state_of

HELD_OUT = Signal("held_out_loss", "nats/token", "up")
"""The label signal: mean NLL on the fixed held-out batch."""


class Recorder:
    """Readings since the last part; they stay on the device until the part is written.

    One of a stack takes readings with a run axis in front, and has the columns of each of its runs. stack: the one of
    the stack that this run is in, if any, at ``row``: what it took for all runs is this run's too.
    """

    def __init__(self, stack: Recorder | None = None, row: int | None = None) -> None:
        self._stack, self._row = stack, row
        self.clear()

    def clear(self) -> None:
        """Forget this one's own readings."""
        self._first_step: int | None = None
        self._readings: dict[str, list[tuple[int, int, Reading]]] = {}
        self._on_host: dict[str, Samples] = {}

    @property
    def first_step(self) -> int | None:
        """The first step that has a reading, None without any."""
        steps = [one._first_step for one in (self, self._stack) if one is not None and one._first_step is not None]
        return min(steps, default=None)

    def add(self, step: int, tokens: int, name: str, reading: Reading) -> None:
        self._first_step = step if self._first_step is None else self._first_step
        self._readings.setdefault(name, []).append((step, tokens, reading))
        self._on_host.pop(name, None)

    def samples(self) -> Mapping[str, Samples]:
        """All readings by signal, copied to the host once."""
        for name in self._readings.keys() - self._on_host.keys():
            self._on_host[name] = Samples.of(self._readings[name])
        return self._on_host

    def columns(self) -> dict[str, Any]:
        """The columns of a part."""
        samples = [(name, samples) for name, samples in self.samples().items()]
        if self._stack is not None:
            samples += [(name, stacked.of_run(self._row)) for name, stacked in self._stack.samples().items()]
        blocks = [one.columns(name) for name, one in samples]
        return {column: np.concatenate([block[column] for block in blocks]) for column in trace.SCHEMA.names}


@dataclass(frozen=True)
class Samples:
    """One signal's readings on the host: steps and tokens (S,), values and undefined (S, ...)."""

    steps: np.ndarray
    tokens: np.ndarray
    values: np.ndarray
    undefined: np.ndarray

    @classmethod
    def of(cls, readings: Sequence[tuple[int, int, Reading]]) -> Samples:
        """From step, tokens and reading of each; one copy from the device."""
        steps, tokens, taken = zip(*readings, strict=True)
        masked = isinstance(taken[0], Masked)
        values = torch.stack([one.value for one in taken] if masked else taken).double().cpu().numpy()
        undefined = (
            torch.stack([one.undefined for one in taken]).cpu().numpy() if masked else np.zeros_like(values, bool)
        )
        return cls(np.array(steps), np.array(tokens), values, undefined)

    def of_run(self, index: int) -> Samples:
        """One run's, of readings with a run axis."""
        return replace(self, values=self.values[:, index], undefined=self.undefined[:, index])

    def columns(self, name: str) -> dict[str, Any]:
        index, size = np.indices(self.values.shape).reshape(self.values.ndim, -1), self.values.size
        return {
            "step": self.steps[index[0]],
            "tokens": self.tokens[index[0]],
            "signal": np.full(size, name, dtype=object),
            "layer": index[1] if self.values.ndim > 1 else np.full(size, -1),
            "head": index[2] if self.values.ndim > 2 else np.full(size, -1),
            "value": self.values.ravel(),
            "undefined": self.undefined.ravel(),
        }


class Ledger:
    """One run's record, and its memory from step to step.

    tokens: seen so far; finite: whether every training loss was; best_held_out: the lowest label loss so far. The
    training loop keeps these three up to date. recorder: of a run in a stack, whose readings the loop records there;
    share: how many runs this process trains at once, each of which answers for its part of the time.
    """

    def __init__(
        self,
        run: Run,
        folder: Path,
        manifest: dict[str, Any],
        model: Transformer,
        optimizer: torch.optim.AdamW,
        history: WeightHistory,
        recorder: Recorder | None = None,
        share: int = 1,
    ) -> None:
        self._run, self._folder, self.manifest = run, folder, manifest
        self._model, self._optimizer, self._history = model, optimizer, history
        self._recorder = recorder or Recorder()
        self._share = share
        self._started, self._cpu_started = time.monotonic(), time.process_time()
        self._spent = {key: manifest[key] for key in ("wall_s", "cpu_s")}
        self.tokens = 0
        self.finite = torch.ones((), dtype=torch.bool, device=run.device)
        self.best_held_out = torch.full((), torch.inf, device=run.device)

    def resume(self) -> dict[str, Any] | None:
        """The checkpoint, its step, weights, optimizer and history still to be loaded; None for a new run.

        The trace is cut back to it, and the monitors have their memory again.
        """
        state = checkpoint.load(self._folder, self._run.device)
        trace.cut_back(self._folder, -1 if state is None else state["step"])
        if state is not None:
            self.tokens, self.finite, self.best_held_out = (state[k] for k in ("tokens", "finite", "best_held_out"))
            for name, monitor in self._run.monitors.items():
                if state["monitors"][name] is not None:
                    monitor.load_state_dict(state["monitors"][name])
        return state

    def label(self, step: int, loss: Tensor) -> None:
        self._recorder.add(step, self.tokens, HELD_OUT.name, loss)

    def observe(self, observers: Iterable[Monitor], view: StepView) -> dict[str, Reading]:
        """What these monitors read at this step, of the signals that are due; it is recorded."""
        readings: dict[str, Reading] = {}
        for monitor in observers:
            readings |= due_readings(monitor, view.step, monitor.observe(view))
        for signal, reading in readings.items():
            self._recorder.add(view.step, view.tokens, signal, reading)
        return readings

    def save(self, step: int, end_reason: str) -> None:
        """Part, then checkpoint, then manifest: a resume cuts the trace back to the checkpoint it finds."""
        if self._recorder.first_step is not None:
            trace.write_part(self._folder, self._recorder.first_step, step, self._recorder.columns())
            self._recorder.clear()
        if end_reason not in trace.FINAL_REASONS:
            checkpoint.save(
                self._folder,
                {
                    "step": step,
                    "tokens": self.tokens,
                    "model": self._model.state_dict(),
                    "optimizer": self._optimizer.state_dict(),
                    "history": self._history.state_dict(),
                    "finite": self.finite,
                    "best_held_out": self.best_held_out,
                    "monitors": {name: state_of(monitor) for name, monitor in self._run.monitors.items()},
                },
            )
        else:
            weights = {
                name: tensor
                for name, tensor in self._model.state_dict().items()
                if not (name == "head.weight" and self._run.model_config.tie_embeddings)
            }
            trace.write_whole(self._folder / "weights.safetensors", safetensors_bytes(weights))
        self.manifest.update(
            steps_done=step,
            tokens_done=self.tokens,
            end_reason=end_reason,
            wall_s=self._spent["wall_s"] + (time.monotonic() - self._started) / self._share,
            cpu_s=self._spent["cpu_s"] + (time.process_time() - self._cpu_started) / self._share,
        )
        trace.write_manifest(self._folder, self.manifest)
        if end_reason in trace.FINAL_REASONS:
            (self._folder / "checkpoint.pt").unlink(missing_ok=True)


def due_readings(monitor: Monitor, step: int, readings: Mapping[str, Reading]) -> dict[str, Reading]:
    """Of a monitor's readings, those of the signals that are due at a step."""
    due = (signal.name for signal in monitor.signals if step % signal.every_steps == 0)
    return {name: readings[name] for name in due if name in readings}


def drawup_limit(config: TrainConfig) -> float:
    """How far the label loss may stand above its lowest, in nats."""
    return torch.inf if config.stop_drawup_nats is None else config.stop_drawup_nats


def early_ends(limit: float | Tensor, finite: Tensor, held_out: Tensor, best: Tensor) -> list[str | None]:
    """For each run, why it ends at this evaluation, or None.

    limit: ``drawup_limit``; finite: whether its training losses all were; held_out, best: its label loss now and the
    lowest so far; each 0-dim, or one a run.
    """
    broken = (~(finite & torch.isfinite(held_out))).view(-1).tolist()
    above = (held_out - best >= limit).view(-1).tolist()
    return ["non_finite" if b else "diverged" if a else None for b, a in zip(broken, above, strict=True)]
