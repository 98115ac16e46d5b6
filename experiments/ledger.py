"""What one run writes down while it trains: trace parts, checkpoint, manifest, final weights."""

from __future__ import annotations

import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save as safetensors_bytes
from torch import Tensor

from experiments import checkpoint, trace
from experiments.build import Run
from experiments.optimizer import TrainConfig
from experiments.recorder import Recorder
from models.transformer import Transformer
from monitors.base import Monitor, Reading, Signal, StepView, WeightHistory, due_readings, state_of

HELD_OUT = Signal("held_out_loss", "nats/token", "up", family="evaluation", reference="val_loss")
"""The label signal: mean NLL on the fixed held-out batch."""


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

        The trace is cut back to it, and the monitors have their memory again. Raises TraceError where the checkpoint
        or a part before it is missing or damaged.
        """
        state = checkpoint.load(self._folder, self._run.device)
        if state is None and self.manifest["steps_done"] > 0:
            raise trace.damaged(self._folder / checkpoint.CHECKPOINT, "is missing", self._folder)
        self.manifest["files"] = {} if state is None else state["files"]
        trace.cut_back(self._folder, self.manifest["files"])
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
        """Part, then checkpoint or weights, then manifest: a resume cuts the trace back to the checkpoint it finds."""
        files = self.manifest["files"]
        if self._recorder.first_step is not None:
            files |= trace.write_part(self._folder, self._recorder.first_step, step, self._recorder.columns())
            self._recorder.clear()
        if end_reason not in trace.FINAL_REASONS:
            checkpoint.save(
                self._folder,
                {
                    "step": step,
                    "files": files,
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
            files |= trace.write_file(self._folder, trace.WEIGHTS, safetensors_bytes(weights))
        news = {
            "steps_done": step,
            "tokens_done": self.tokens,
            "end_reason": end_reason,
            "wall_s": self._spent["wall_s"] + (time.monotonic() - self._started) / self._share,
            "cpu_s": self._spent["cpu_s"] + (time.process_time() - self._cpu_started) / self._share,
        }
        trace.write_manifest(self._folder, self.manifest | news)
        self.manifest.update(news)  # after the write: where the disk is full, the run has not come this far
        if end_reason in trace.FINAL_REASONS:
            (self._folder / checkpoint.CHECKPOINT).unlink(missing_ok=True)


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
