"""Made-up experiments on disk, with a known answer: for tests, for the cost of scoring, for trying a detector."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from foreshock.experiments import trace
from foreshock.monitors.cadence import Cadence

TOKENS_PER_STEP = 64
LABEL = {"ema_span": 5, "min_drawup_nats": 0.10, "healthy_factor": 1.5, "consecutive": 5}
FIRST_SEED = {"reference": 0, "calibration": 1000, "test": 2000, "faulty": 3000}
LOSS = {"unit": "nats/token", "bad": "up", "axes": [], "every_steps": 10}


def simulate_run(
    folder: Path,
    seed: int,
    signals: Mapping[str, Mapping[str, Any]],
    *,
    steps: int,
    shows: Mapping[str, int] | None = None,
    diverges: int | None = None,
    onset: int | None = None,
    **manifest: Any,
) -> None:
    """One run of moving-average noise around 2 in every signal of ``signals`` (as a manifest describes them).

    shows: the step from which the last layer and head of a signal stand 5 off in its bad direction. The held-out
    and training losses fall exponentially to 1 nat, and rise by 2 at ``diverges``. Further keywords replace entries of
    the manifest, such as ``injection``, the card of its fault.
    """
    generator = np.random.default_rng(seed)
    losses: dict[str, Mapping[str, Any]] = {"held_out_loss": LOSS, "train_loss_raw": LOSS}
    described = losses | dict(signals)
    parts = []
    for name, meta in described.items():
        cadence = Cadence(meta["every_steps"], meta.get("jittered", False))
        at = np.array([step for step in range(1, steps + 1) if cadence.is_due(step)], int)
        noise = generator.normal(size=(len(at), _length(meta, "layer"), _length(meta, "head")))
        if name in losses:
            values = _loss(at, noise, diverges)
        else:
            values = _signal(at, noise, meta["bad"], (shows or {}).get(name))
        parts.append(_columns(name, meta, at, values))
    folder.mkdir(parents=True)
    trace.write_part(folder, 0, steps, {name: np.concatenate([part[name] for part in parts]) for name in parts[0]})
    trace.write_manifest(folder, {**_manifest(folder.name, seed, steps, onset), "signals": described, **manifest})


def _length(meta: Mapping[str, Any], axis: str) -> int:
    return 2 if axis in meta["axes"] else 1


def _loss(at: np.ndarray, noise: np.ndarray, diverges: int | None) -> np.ndarray:
    """(T, 1, 1): a fall to 1 nat, and 2 more from ``diverges`` on. at: (T,) steps."""
    values = 1.0 + np.exp(-at / 200.0)[:, None, None] + 1e-3 * noise
    values[at >= (diverges or np.inf)] += 2.0
    return values


def _signal(at: np.ndarray, noise: np.ndarray, bad: str, shows: int | None) -> np.ndarray:
    """(T, layers, heads): correlated noise around 2, the last layer and head 5 off from step ``shows`` on."""
    values = 2.0 + 0.1 * noise
    values[1:] += 0.05 * noise[:-1]
    if shows is not None:
        values[at >= shows, -1, -1] += 5.0 if bad != "down" else -5.0
    return values


def _columns(name: str, meta: Mapping[str, Any], at: np.ndarray, values: np.ndarray) -> dict[str, np.ndarray]:
    """The rows of a signal as a part of a trace has them. at: (T,) steps; values: (T, layers, heads)."""
    sample, layer, head = np.indices(values.shape).reshape(3, -1)
    return {
        "step": at[sample],
        "tokens": TOKENS_PER_STEP * at[sample],
        "signal": np.full(values.size, name, object),
        "layer": layer if "layer" in meta["axes"] else np.full(values.size, -1),
        "head": head if "head" in meta["axes"] else np.full(values.size, -1),
        "value": values.ravel(),
        "undefined": np.zeros(values.size, bool),
    }


def _manifest(run_id: str, seed: int, steps: int, onset: int | None) -> dict[str, Any]:
    """All but the signals of a completed run's manifest."""
    fault = "faults.none.NoFault" if onset is None else "simulated.fault.Simulated"
    return {
        "schema": trace.SCHEMA_VERSION,
        "run_id": run_id,
        "seed": seed,
        "config": {
            "train": {"steps": steps},
            "model": {"d_model": 8, "moe": None},
            "data": {},
            "seed": seed,
            "fault": {"_target_": fault},
        },
        "onset_step": onset,
        "injection": {"family": "healthy" if onset is None else "other", "injections": []},
        "end_reason": "completed",
        "source_sha256": "s" * 64,
        "data_sha256": "d" * 64,
        "torch": "2",
        "steps_done": steps,
        "tokens_done": TOKENS_PER_STEP * steps,
        "git_commit": None,
        "git_dirty": None,
        "versions": {"python": "3"},
        "device": "cpu",
    }


def simulate_experiment(
    folder: Path,
    counts: Mapping[str, int],
    signals: Mapping[str, Mapping[str, Any]],
    detectors: Mapping[str, list[str]],
    faults: Mapping[str, Mapping[str, Any]],
    *,
    baseline: str,
    steps: int = 1000,
    alpha: float = 0.10,
) -> Path:
    """An experiment and its runs in one folder, ready for ``analysis.runs.experiment.load(folder, folder)``.

    counts: seeds a role; faults: name -> the ``shows``, ``diverges``, ``onset`` and ``injection`` of
    ``simulate_run``. A seed has its own noise under every fault.
    """
    cells = []
    for role, count in counts.items():
        for fault, how in faults.items() if role == "faulty" else [(None, {})]:
            for seed in range(FIRST_SEED[role], FIRST_SEED[role] + count):
                run_id = f"{fault or role}{seed}"
                noise = seed if fault is None else 100_000 * (1 + list(faults).index(fault)) + seed
                simulate_run(folder / run_id, noise, signals, steps=steps, **how)
                manifest = trace.manifest_of(folder / run_id)
                manifest["config"]["seed"] = manifest["seed"] = seed
                trace.write_manifest(folder / run_id, manifest)
                cells.append({"model": "mha_nano", "role": role, "fault": fault, "seed": seed, "run_id": run_id})
    experiment = {
        "name": folder.name,
        "title": "A made-up fault",
        "models": ["mha_nano"],
        "align": ["steps"],
        "score_every": 10,
        "draw": "leads",
        "faults": {fault: {"label": fault} for fault in faults},
        "detectors": dict(detectors),
        "baseline": baseline,
        "figure": {},
    }
    index = {
        "experiment": experiment,
        "scale": {"name": "tiny", "alpha": alpha},
        "label": LABEL,
        "rule": {"chart": "ewma", "weight": 0.2},
        "sweep": None,
        "runs": cells,
    }
    (folder / "experiment.json").write_text(json.dumps(index))
    return folder
