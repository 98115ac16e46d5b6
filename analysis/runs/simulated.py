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
    design: Mapping[str, Any] | None = None,
    **manifest: Any,
) -> None:
    """One run of moving-average noise around 2 in every signal of ``signals`` (as a manifest describes them).

    shows: the step from which the last layer and head of a signal stand 5 off in its bad direction. The held-out
    and training losses fall exponentially to 1 nat, and rise by 2 at ``diverges``. design: further keys of the
    configuration's fault. Further keywords replace entries of the manifest.
    """
    generator = np.random.default_rng(seed)
    every: dict[str, Any] = {"held_out_loss": LOSS, "train_loss_raw": LOSS}
    parts = []
    for name, meta in (every | dict(signals)).items():
        cadence = Cadence(meta["every_steps"], meta.get("jittered", False))
        at = np.array([step for step in range(1, steps + 1) if cadence.is_due(step)], int)
        layers, heads = 2 if "layer" in meta["axes"] else 1, 2 if "head" in meta["axes"] else 1
        noise = generator.normal(size=(len(at), layers, heads))
        values = 2.0 + 0.1 * noise
        values[1:] += 0.05 * noise[:-1]
        if name in every:
            values = 1.0 + np.exp(-at / 200.0)[:, None, None] + 1e-3 * noise[:, :1, :1]
            values[at >= (diverges or np.inf)] += 2.0
        elif shows and name in shows:
            values[at >= shows[name], -1, -1] += 5.0 if meta["bad"] != "down" else -5.0
        index = np.indices(values.shape).reshape(3, -1)
        parts.append(
            {
                "step": at[index[0]],
                "tokens": TOKENS_PER_STEP * at[index[0]],
                "signal": np.full(values.size, name, object),
                "layer": index[1] if "layer" in meta["axes"] else np.full(values.size, -1),
                "head": index[2] if "head" in meta["axes"] else np.full(values.size, -1),
                "value": values.ravel(),
                "undefined": np.zeros(values.size, bool),
            }
        )
    folder.mkdir(parents=True)
    trace.write_part(folder, 0, steps, {name: np.concatenate([part[name] for part in parts]) for name in parts[0]})
    fault = "faults.none.NoFault" if onset is None else "simulated.fault.Simulated"
    trace.write_manifest(
        folder,
        {
            "schema": trace.SCHEMA_VERSION,
            "run_id": folder.name,
            "seed": seed,
            "config": {
                "train": {"steps": steps},
                "model": {"d_model": 8, "moe": None},
                "data": {},
                "seed": seed,
                "fault": {"_target_": fault, **(design or {})},
            },
            "onset_step": onset,
            "signals": every | dict(signals),
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
            **manifest,
        },
    )


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

    counts: seeds a role; faults: name -> the ``shows``, ``diverges``, ``onset`` and ``design`` of ``simulate_run``. A
    seed has its own noise under every fault.
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
