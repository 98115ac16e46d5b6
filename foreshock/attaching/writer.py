"""The files of an attached watch: the trace and the manifest of ``experiments.trace``."""

from __future__ import annotations

import platform
import time
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch

from foreshock.attaching.model_facts import model_facts
from foreshock.experiments import trace
from foreshock.experiments.training.recorder import Recorder
from foreshock.models.anatomy import Anatomy
from foreshock.monitors.base import Monitor, Reading, described_signals

UNKNOWN_SEED = -1
"""Of a run whose training is not ours."""
STOPPED = "stopped"
"""End reason of a run whose watch has stopped itself; how its training ended nobody knows."""


class TraceWriter:
    """Writes a run's folder, of which ``experiments.trace.read`` reads what is there, at any time.

    closed: whether all of it has been written. Raises ValueError for a folder that holds a run, OSError where the disk
    does not take a file.
    """

    def __init__(
        self, folder: str | Path, anatomy: Anatomy, monitors: Mapping[str, Monitor], nodes: Mapping[str, Any]
    ) -> None:
        self._folder, self._recorder = Path(folder), Recorder()
        if (self._folder / "manifest.json").exists():
            raise ValueError(f"out={str(folder)!r} is not allowed: it holds a run; name a new folder")
        self._folder.mkdir(parents=True, exist_ok=True)
        self._started, self._steps, self._tokens = time.monotonic(), 0, 0
        self._files: dict[str, str] = {}
        self._manifest = _manifest(self._folder.name, anatomy, monitors, nodes)
        self.closed = False
        self._write("running")

    def add(self, step: int, tokens: int, readings: Mapping[str, Reading]) -> None:
        self._recorder.add(step, tokens, readings)
        if step - self._steps >= trace.PART_STEPS:
            self._part(step, tokens)
            self._write("running")

    def close(self, step: int, tokens: int, end_reason: str = "completed") -> None:
        """Write what is left; may be called again after an error. end_reason: of ``experiments.trace``.

        Where the last part cannot be written, the manifest says so of the steps before it.
        """
        try:
            self._part(step, tokens)
        finally:
            self._write(end_reason)
        self.closed = True

    def stop(self, step: int, tokens: int) -> None:
        """Close as ``STOPPED``, without the signals whose readings cannot be written; may be called again."""
        try:
            self.close(step, tokens, STOPPED)
        except OSError:
            raise
        except Exception:
            self._recorder.forget_broken()
            self.close(step, tokens, STOPPED)

    def _part(self, step: int, tokens: int) -> None:
        if self._recorder.first_step is not None:
            self._files |= trace.write_part(self._folder, self._recorder.first_step, step, self._recorder.columns())
        self._recorder.clear()
        self._steps, self._tokens = step, tokens

    def _write(self, end_reason: str) -> None:
        news = {
            "steps_done": self._steps,
            "tokens_done": self._tokens,
            "end_reason": end_reason,
            "files": self._files,
        }
        config = {**self._manifest["config"], "train": {"steps": self._steps}}
        seconds = time.monotonic() - self._started
        trace.write_manifest(self._folder, {**self._manifest, **news, "config": config, "wall_s": seconds})


def _manifest(name: str, anatomy: Anatomy, monitors: Mapping[str, Monitor], nodes: Mapping[str, Any]) -> dict[str, Any]:
    model = anatomy.model
    device = next(model.parameters()).device
    return {
        "schema": trace.SCHEMA_VERSION,
        "run_id": name,
        trace.ATTACHED: model_facts(anatomy),
        "config": {
            "monitor": dict(nodes),
            "train": {"steps": 0},
            "model": {"cell": type(model).__name__, "d_model": None, "moe": None},
            "data": {},
            "seed": UNKNOWN_SEED,
            "fault": {"_target_": "faults.none.NoFault"},
        },
        "onset_step": None,
        "seed": UNKNOWN_SEED,
        "source_sha256": trace.ATTACHED,
        "data_sha256": trace.ATTACHED,
        "torch": torch.__version__,
        "emitted": {name: [signal.name for signal in monitor.signals] for name, monitor in monitors.items()},
        "signals": {signal.name: asdict(signal) for m in monitors.values() for signal in described_signals(m)},
        "versions": {"python": platform.python_version(), "torch": torch.__version__, "numpy": np.__version__},
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine(),
    }
