"""Experiments found in a folder: by their indices, or, for bare run folders, one made from the runs' manifests."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from foreshock.analysis.runs.conf import conf
from foreshock.analysis.runs.experiment import Experiment
from foreshock.analysis.runs.index import read_index
from foreshock.analysis.runs.load import label_runs
from foreshock.experiments import trace
from foreshock.experiments.elsewhere.traces import ELSEWHERE
from foreshock.experiments.plan import FIRST_SEED, ROLES
from foreshock.experiments.trace import TraceError

ALPHAS = (0.05, 0.10, 0.20, 0.5)


def find(folder: Path, allow_mixed: bool = False) -> list[Experiment]:
    """Every model of every experiment in a folder, labelled, on its first axis.

    The folder, or folders below it, hold ``experiment.json`` beside the runs (as a reduced folder does); without
    any, its run folders are taken together. Raises TraceError where there is no finished run, or as ``load`` does.
    """
    indices = sorted(folder.rglob("experiment.json"))
    if not indices:
        index = index_of_runs(folder)
        return [label_runs(index, folder, allow_mixed, model) for model in index["experiment"]["models"]]
    experiments = []
    for path in indices:
        runs = path.parent / "runs" if (path.parent / "runs").is_dir() else path.parent
        index = read_index(path.parent)
        experiments += [label_runs(index, runs, allow_mixed, model) for model in index["experiment"]["models"]]
    keys = [(experiment.index["experiment"]["name"], experiment.model) for experiment in experiments]
    twice = next((key for key in keys if keys.count(key) > 1), None)
    if twice:
        raise TraceError(f"{folder} holds experiment {twice[0]!r} on {twice[1]} twice: score them apart")
    return experiments


def role_of(seed: int, fault: str | None) -> str:
    """The role that ``experiments.plan`` gives a seed: by its thousand for healthy runs."""
    if fault is not None:
        return "faulty"
    return max((role for role in ROLES if FIRST_SEED[role] <= seed), key=FIRST_SEED.__getitem__)


def fault_names(faults: Sequence[Mapping[str, Any]]) -> list[str]:
    """A name for each fault's configuration: its class, and the keys in which the faults of that class differ."""
    of_class: dict[str, list[dict[str, Any]]] = {}
    flat = [_flat(fault) for fault in faults]
    for fault in flat:
        of_class.setdefault(fault["_target_"], []).append(fault)
    names = []
    for fault in flat:
        kind = fault["_target_"].rsplit(".", 1)[-1]
        differing = sorted(k for k in fault if len({repr(o.get(k)) for o in of_class[fault["_target_"]]}) > 1)
        names.append(" ".join([kind, *(f"{key}={fault[key]}" for key in differing)]))
    return names


def _flat(node: Mapping[str, Any], path: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in node.items():
        flat |= _flat(value, f"{path}{key}.") if isinstance(value, Mapping) else {f"{path}{key}": value}
    return flat


def index_of_runs(folder: Path) -> dict[str, Any]:
    """An index for a folder's finished runs: roles by seed, faults by configuration, the reference set's detectors.

    The rate is the smallest of ``ALPHAS`` that the calibration runs support. Raises TraceError without runs.
    """
    manifests = {}
    for path in sorted(folder.glob("[!.]*/manifest.json")):
        manifest = trace.manifest_of(path.parent)
        if manifest["end_reason"] in trace.FINAL_REASONS:
            manifests[path.parent.name] = manifest
    if not manifests:
        raise TraceError(f"{folder} holds neither experiment.json nor a finished run")
    healthy = {run_id for run_id, manifest in manifests.items() if manifest["onset_step"] is None}
    names = fault_names([manifest["config"]["fault"] for manifest in manifests.values()])
    models: dict[str, str] = {}
    cells = []
    for (run_id, manifest), name in zip(manifests.items(), names, strict=True):
        fault = None if run_id in healthy else name
        key = json.dumps(manifest["config"]["model"], sort_keys=True)
        model = models.setdefault(key, _unused(_model_name(manifest["config"]["model"]), models.values()))
        seed = manifest["seed"]
        role = manifest.get(ELSEWHERE, {}).get("role") or role_of(seed, fault)
        cells.append({"run_id": run_id, "model": model, "fault": fault, "seed": seed, "role": role})
    calibration = min(
        sum(cell["role"] == "calibration" and cell["model"] == model for cell in cells) for model in models.values()
    )
    base, moe = conf("experiment/base", "reference_set"), conf("experiment", "reference_set_moe")
    return {
        "experiment": {
            "name": folder.resolve().name,
            "title": folder.resolve().name,
            "models": list(models.values()),
            "align": ["steps"],
            "score_every": base["score_every"],
            "faults": {name: {"label": name} for name in dict.fromkeys(c["fault"] for c in cells) if name},
            "detectors": base["detectors"] | moe["detectors"],
            "baseline": base["baseline"],
            "figure": {},
        },
        "scale": {"name": "as found", "alpha": next((a for a in ALPHAS if a * (calibration + 1) >= 1), ALPHAS[0])},
        "label": conf("label", "drawup"),
        "rule": conf("rule", "ewma"),
        "runs": cells,
    }


def _model_name(model: Mapping[str, Any]) -> str:
    """What a model is called: by its kind and width, or, of runs from elsewhere, by its cell."""
    kind = "moe" if model.get("moe") else "dense"
    return str(model["cell"]) if "cell" in model else f"{kind} d_model={model.get('d_model')}"


def _unused(name: str, taken) -> str:
    taken, number, free = set(taken), 1, name
    while free in taken:
        number += 1
        free = f"{name} ({number})"
    return free
