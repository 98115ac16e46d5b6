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
PART_STEPS = 200
"""Steps from one part of a trace to the next: what a kill can lose."""


class TraceWriter:
    """Writes a run's folder, which ``experiments.trace.read`` reads once it is closed.

    Raises ValueError for a folder that holds a run, OSError where the disk does not take a file.
    """

    def __init__(
        self, folder: str | Path, anatomy: Anatomy, monitors: Mapping[str, Monitor], nodes: Mapping[str, Any]
    ) -> None:
        self._folder, self._recorder = Path(folder), Recorder()
        if (self._folder / "manifest.json").exists():
            raise ValueError(f"out={str(folder)!r} is not allowed: it holds a run; name a new folder")
        self._folder.mkdir(parents=True, exist_ok=True)
        self._started, self._last = time.monotonic(), 0
        self._files: dict[str, str] = {}
        self._manifest = _manifest(self._folder.name, anatomy, monitors, nodes)
        self._write(0, 0, "running")

    def add(self, step: int, tokens: int, readings: Mapping[str, Reading]) -> None:
        self._recorder.add(step, tokens, readings)
        if step - self._last >= PART_STEPS:
            self._part(step)
            self._write(step, tokens, "running")

    def close(self, step: int, tokens: int, end_reason: str = "completed") -> None:
        """end_reason: of ``experiments.trace``, or ``stopped`` where the watch has stopped itself."""
        self._part(step)
        self._write(step, tokens, end_reason)

    def _part(self, step: int) -> None:
        if self._recorder.first_step is not None:
            self._files |= trace.write_part(self._folder, self._recorder.first_step, step, self._recorder.columns())
        self._recorder.clear()
        self._last = step

    def _write(self, step: int, tokens: int, end_reason: str) -> None:
        news = {"steps_done": step, "tokens_done": tokens, "end_reason": end_reason, "files": self._files}
        config = {**self._manifest["config"], "train": {"steps": step}}
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
