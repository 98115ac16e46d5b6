"""Experiments found in a folder: by their indices, or, for bare run folders, one made from the runs' manifests."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from foreshock.analysis.runs.checks import NEEDED_ROLES
from foreshock.analysis.runs.conf import conf, experiment_named
from foreshock.analysis.runs.experiment import Experiment
from foreshock.analysis.runs.index import read_index
from foreshock.analysis.runs.load import label_runs
from foreshock.experiments import trace
from foreshock.experiments.plan import FIRST_SEED, ROLES
from foreshock.experiments.trace import ELSEWHERE, TraceError
from foreshock.faults.card import InjectionCard, read_card

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


def role_of(manifest: Mapping[str, Any], fault: str | None) -> str:
    """``attached``, or the role that ``experiments.plan`` gives a seed: by its thousand for healthy runs."""
    if fault is not None:
        return "faulty"
    if trace.ATTACHED in manifest:
        return trace.ATTACHED
    seed = manifest["seed"]
    return max((role for role in ROLES if FIRST_SEED[role] <= seed), key=FIRST_SEED.__getitem__)


def fault_names(manifests: Sequence[Mapping[str, Any]]) -> list[str]:
    """A name for each run's fault: its class, and what in the cards of the faults of that class differs.

    Faults of different configurations have different names.
    """
    kinds = [manifest["config"]["fault"]["_target_"].rpartition(".")[2] for manifest in manifests]
    cards = [_said(read_card(manifest["injection"])) for manifest in manifests]
    names: dict[str, str] = {}
    for kind, card, manifest in zip(kinds, cards, manifests, strict=True):
        alike = [other for of, other in zip(kinds, cards, strict=True) if of == kind]
        differing = sorted(key for key in card if len({repr(other.get(key)) for other in alike}) > 1)
        name = " ".join([kind, *(f"{key}={card[key]}" for key in differing)])
        names.setdefault(_key(manifest["config"]["fault"]), _unused(name, names.values()))
    return [names[_key(manifest["config"]["fault"])] for manifest in manifests]


def _said(card: InjectionCard) -> dict[str, Any]:
    """What a card says of each injection, by key; several injections are numbered."""
    said: dict[str, Any] = {}
    for number, injection in enumerate(card.injections):
        window = {f"window_{key}" if key == "phase" else key: value for key, value in asdict(injection.window).items()}
        keys = {"what": injection.what, **window, **injection.where, **injection.size}
        said |= {key if len(card.injections) == 1 else f"{number}.{key}": value for key, value in keys.items()}
    return said


def _key(node: Mapping[str, Any]) -> str:
    return json.dumps(node, sort_keys=True)


def index_of_runs(folder: Path) -> dict[str, Any]:
    """An index for a folder's finished runs: roles by seed, faults by configuration, the reference set's detectors.

    The rate is the smallest of ``ALPHAS`` that the calibration runs support. Raises TraceError without runs, and
    where a model has none of a role that scoring needs.
    """
    manifests = {}
    for path in sorted(folder.glob("[!.]*/manifest.json")):
        manifest = trace.manifest_of(path.parent)
        if trace.is_readable(manifest):
            manifests[path.parent.name] = manifest
    if not manifests:
        raise TraceError(f"{folder} holds neither experiment.json nor a finished run")
    attached = next((run_id for run_id, manifest in manifests.items() if trace.ATTACHED in manifest), None)
    if attached is not None:
        raise TraceError(
            f"run {attached} is of foreshock.attach and has no fault to score: foreshock calibrate reads it"
        )
    healthy = {run_id for run_id, manifest in manifests.items() if manifest["onset_step"] is None}
    names = fault_names(list(manifests.values()))
    models: dict[str, str] = {}
    cells = []
    for (run_id, manifest), name in zip(manifests.items(), names, strict=True):
        fault = None if run_id in healthy else name
        key = _key(manifest["config"]["model"])
        model = models.setdefault(key, _unused(_model_name(manifest["config"]["model"]), models.values()))
        role = manifest.get(ELSEWHERE, {}).get("role") or role_of(manifest, fault)
        cells.append({"run_id": run_id, "model": model, "fault": fault, "seed": manifest["seed"], "role": role})
    for model in models.values():
        _check_roles(folder, model, [cell["role"] for cell in cells if cell["model"] == model])
    calibration = min(
        sum(cell["role"] == "calibration" and cell["model"] == model for cell in cells) for model in models.values()
    )
    reference_set = experiment_named("reference_set_moe")  # its detectors are those of the dense half, and more
    return {
        "experiment": {
            "name": folder.resolve().name,
            "title": folder.resolve().name,
            "models": list(models.values()),
            "align": ["steps"],
            "score_every": reference_set["score_every"],
            "faults": {name: {"label": name} for name in dict.fromkeys(c["fault"] for c in cells) if name},
            "detectors": reference_set["detectors"],
            "baseline": reference_set["baseline"],
            "figure": {},
        },
        "scale": {"name": "as found", "alpha": next((a for a in ALPHAS if a * (calibration + 1) >= 1), ALPHAS[0])},
        "label": conf("label", "drawup"),
        "rule": conf("rule", "ewma"),
        "runs": cells,
    }


def _check_roles(folder: Path, model: str, roles: Sequence[str]) -> None:
    """Raises TraceError where a role that scoring needs has no run, with what its runs are told by."""
    counts = ", ".join(f"{roles.count(role)} {role}" for role in ROLES)
    for role in NEEDED_ROLES:
        if role in roles:
            continue
        first = FIRST_SEED[role]
        told = "with a fault" if role == "faulty" else f"healthy, with a seed from {first} to {first + 999}"
        rate = " (n of them support alpha=1/(n + 1), 19 support 0.05)" if role == "calibration" else ""
        raise TraceError(
            f"{folder} has no {role} run of {model}, {told}: at least 1 is needed{rate}; its healthy runs are {counts}"
        )


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
