"""Where a run comes from: identity, versions, machine, and what each of its signals means."""

from __future__ import annotations

import platform
import subprocess
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch

from foreshock.experiments import trace
from foreshock.experiments.build import ROOT, Run
from foreshock.experiments.training.identity import trajectory_sources
from foreshock.experiments.training.run_writer import CLEAN, HELD_OUT
from foreshock.experiments.training.source_code import digest_of
from foreshock.monitors.base import described_signals
from foreshock.monitors.cadence import is_due


def _git(*arguments: str) -> str | None:
    try:
        answer = subprocess.run(["git", "-C", str(ROOT), *arguments], capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return answer.stdout.strip() if answer.returncode == 0 else None


def _versions(run: Run) -> dict[str, str]:
    versions = {"python": platform.python_version(), "torch": torch.__version__, "numpy": np.__version__}
    if run.model_config.backend == "triton":
        import triton  # most machines without a GPU do not have it

        versions["triton"] = triton.__version__
    return versions


def manifest_in(folder: Path, run: Run) -> dict[str, Any]:
    """The manifest in a run's folder, or a new one, written there before anything is measured.

    Raises TraceError where a finished run is damaged, or where the folder has lost the manifest of what it holds.
    """
    manifest = trace.read_manifest(folder)
    if manifest is None:
        if (folder / trace.TRACE).exists() or (folder / trace.WEIGHTS).exists():
            raise trace.damaged(folder / "manifest.json", "is missing", folder)
        manifest = new_manifest(run)
        trace.write_manifest(folder, manifest)
    trace.check_files(folder, manifest)
    return manifest


def changes_an_evaluation(run: Run) -> bool:
    """Whether the fault changes the forward at a step after which the held-out loss is taken."""
    healthy, every_steps = run.healthy_sites(), run.train.held_out_every_steps
    evaluated = (step for step in range(run.train.steps) if is_due(step + 1, every_steps))
    return any(run.fault.sites(step, healthy).changes_forward for step in evaluated)


def new_manifest(run: Run) -> dict[str, Any]:
    """Provenance of a run: identity, versions, machine, and what each signal means."""
    dirty = _git("status", "--porcelain", "--untracked-files=no")
    first = run.fault.describe().first_step
    signals = [*(signal for monitor in run.monitors.values() for signal in described_signals(monitor)), HELD_OUT]
    signals += [CLEAN] if changes_an_evaluation(run) else []
    return {
        "schema": trace.SCHEMA_VERSION,
        "run_id": run.run_id,
        **run.identity,
        "config": run.nodes,
        "sources": {name: digest_of([(name, path)]) for name, path in sorted(set(trajectory_sources(run.nodes)))},
        "plugins": list(run.asked.get("plugins", ())),
        "observations": run.observations,
        "emitted": {name: [signal.name for signal in monitor.signals] for name, monitor in run.monitors.items()},
        "weights_sha256": {},
        "seed": run.seed,
        "onset_step": None if first is None else first + 1,
        "injection": asdict(run.fault.describe()),
        "injected": [],
        "events": [],
        "left_out_monitors": list(run.left_out_monitors),
        "signals": {signal.name: asdict(signal) for signal in signals},
        "git_commit": _git("rev-parse", "HEAD"),
        "git_dirty": None if dirty is None else bool(dirty),
        "versions": _versions(run),
        "device": torch.cuda.get_device_name() if run.device.type == "cuda" else platform.machine(),
        "files": {},
        "steps_done": 0,
        "tokens_done": 0,
        "wall_s": 0.0,
        "cpu_s": 0.0,
        "end_reason": "running",
    }
