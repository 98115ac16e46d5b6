"""What one run writes down while it trains: trace parts, checkpoint, manifest, final weights."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import save as safetensors_bytes
from torch import Tensor

from foreshock.experiments import trace
from foreshock.experiments.build import Run
from foreshock.experiments.training import checkpoint
from foreshock.experiments.training.engine import Engine
from foreshock.experiments.training.recorder import Recorder
from foreshock.monitors.base import Signal
from foreshock.monitors.watch import Watch

HELD_OUT = Signal("held_out_loss", "nats/token", "up", family="evaluation", reference="val_loss")
"""Mean NLL on the fixed held-out batch, through the run's own kernels: what the trainer sees."""

CLEAN = Signal("held_out_loss.clean", "nats/token", "up", family="evaluation")
"""The same through healthy kernels, with the same weights; of runs whose fault changes the forward at an evaluation."""


class RunWriter:
    """The files of one run.

    row: the run's place in a stack, whose engine, watch and recorder it shares, or None for a run by itself; share: how
    many runs this process trains at once, each of which answers for its part of the time.
    """

    def __init__(
        self,
        run: Run,
        folder: Path,
        manifest: dict[str, Any],
        engine: Engine,
        watch: Watch,
        recorder: Recorder,
        row: int | None = None,
        share: int = 1,
    ) -> None:
        self._run, self._folder, self.manifest = run, folder, manifest
        self._engine, self._watch, self._recorder, self._row = engine, watch, recorder, row
        self._share = share
        self._started, self._cpu_started = time.monotonic(), time.process_time()
        self._spent = {key: manifest[key] for key in ("wall_s", "cpu_s")}

    @property
    def events(self) -> list[dict[str, Any]]:
        """What has happened to the run beside its training, in order: see ``experiments.trace``."""
        events: list[dict[str, Any]] = self.manifest["events"]
        return events

    def resume(self) -> dict[str, Any] | None:
        """The checkpoint, None for a new run; the trace is cut back to it.

        Raises TraceError where the checkpoint or a part before it is missing or damaged.
        """
        state = checkpoint.load(self._folder, self._run.device)
        if state is None and self.manifest["steps_done"] > 0:
            raise trace.damaged(self._folder / checkpoint.CHECKPOINT, "is missing", self._folder)
        self.manifest["files"] = {} if state is None else state["files"]
        self.manifest["weights_sha256"] = {} if state is None else state["weights_sha256"]
        self.manifest["events"] = [] if state is None else state.get("events", [])
        trace.cut_back(self._folder, self.manifest["files"])
        return state

    def note(self, step: int, event: str, **said: Any) -> None:
        """Add to the ``events`` of the manifest, which the next part brings to the disk."""
        self.manifest["events"] = [*self.events, {"step": step, "event": event, **said}]

    def checksum(self, step: int) -> None:
        """Note what the weights are, by which another run is known to be the same."""
        state = self._engine.state_of(self._row or 0)["model"]
        self.manifest["weights_sha256"][str(step)] = weights_sha256(state)

    def save(self, step: int, end_reason: str, finite: Tensor, best_held_out: Tensor, late: Mapping[str, Any]) -> None:
        """Part, then checkpoint or weights, then manifest: a resume cuts the trace back to the checkpoint it finds.

        finite: whether every training loss was; best_held_out: the lowest clean label loss so far; 0-dim; late:
        readings that have not arrived yet.
        Raises ValueError that names an injection which has changed nothing.
        """
        log = self._engine.logs[self._row or 0]
        if bool(finite):  # what is not finite already cannot be changed
            log.check(ended=end_reason in trace.FINAL_REASONS)
        files = self.manifest["files"]
        if self._recorder.first_step is not None:
            without = () if CLEAN.name in self.manifest["signals"] else (CLEAN.name,)  # another run's of the stack
            columns = self._recorder.columns(self._row, without)
            files |= trace.write_part(self._folder, self._recorder.first_step, step, columns)
        state = self._engine.state_of(self._row or 0)
        if end_reason not in trace.FINAL_REASONS:
            state |= self._watch.state_of(self._row or 0)
            state |= {"step": step, "files": files, "weights_sha256": self.manifest["weights_sha256"]}
            state |= {"events": self.manifest["events"], "late": late}
            state |= {"finite": finite, "best_held_out": best_held_out}
            checkpoint.save(self._folder, state)
        else:
            weights = {
                name: tensor
                for name, tensor in state["model"].items()
                if not (name == "head.weight" and self._run.model_config.tie_embeddings)
            }
            files |= trace.write_file(self._folder, trace.WEIGHTS, safetensors_bytes(weights))
        news = {
            "steps_done": step,
            "tokens_done": self._engine.tokens,
            "end_reason": end_reason,
            "injected": log.entries(),
            "wall_s": self._spent["wall_s"] + (time.monotonic() - self._started) / self._share,
            "cpu_s": self._spent["cpu_s"] + (time.process_time() - self._cpu_started) / self._share,
        }
        trace.write_manifest(self._folder, self.manifest | news)
        self.manifest.update(news)  # after the write: where the disk is full, the run has not come this far
        if end_reason in trace.FINAL_REASONS:
            checkpoint.discard(self._folder)


def weights_sha256(state: Mapping[str, Tensor]) -> str:
    """Of a model's ``state_dict``."""
    digest = hashlib.sha256()
    for tensor in state.values():
        digest.update(tensor.cpu().contiguous().numpy().data)
    return digest.hexdigest()
