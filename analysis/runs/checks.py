"""Whether runs can be scored together: what an index must list, and what its runs must have alike."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from foreshock.experiments.trace import Trace, TraceError

NEEDED_ROLES = ("reference", "calibration", "faulty")
"""What scoring cannot do without: a label and thresholds are set by healthy runs."""


def check_roles(cells: Sequence[Mapping[str, Any]]) -> None:
    """Raises ValueError where a role that scoring needs has no run, or a seed or a run has two roles."""
    for role in NEEDED_ROLES:
        if not any(cell["role"] == role for cell in cells):
            raise ValueError(f"scale.seeds.{role}=0: scoring needs at least one {role} run")
    healthy_seeds = [cell["seed"] for cell in cells if cell["fault"] is None]
    if len(set(healthy_seeds)) != len(healthy_seeds):
        raise ValueError("a healthy seed serves two roles: reference, calibration and test must be disjoint")
    both = sorted(set(healthy_seeds) & {cell["seed"] for cell in cells if cell["role"] == "faulty"})
    if both:
        raise ValueError(f"seed {both[0]} is healthy and faulty: a faulty run must not share what set its threshold")
    ids = [cell["run_id"] for cell in cells]
    twice = next((run_id for run_id in ids if ids.count(run_id) > 1), None)
    if twice:
        raise ValueError(f"run {twice} is listed twice: every run has one role")


FAULTY_ALONE = ("fault.", "seed", "train.steps", "train.stop_drawup_nats")
"""Keys of a configuration in which a faulty run may differ from the healthy ones."""


def check_cells(cells: Sequence[Mapping[str, Any]], traces: Sequence[Trace]) -> None:
    """Raises TraceError where a run is not what the index says: another seed, healthy or not, another fault."""
    designs: dict[str, tuple[str, Any]] = {}
    for cell, run in zip(cells, traces, strict=True):
        if run.manifest.get("seed", cell["seed"]) != cell["seed"]:
            raise TraceError(f"run {run.run_id} has seed {run.manifest['seed']}, the index says {cell['seed']}")
        if (run.onset is None) != (cell["fault"] is None):
            said = "is healthy" if run.onset is None else "has a fault"
            raise TraceError(f"run {run.run_id} {said}, the index says {cell['fault'] or 'healthy'}")
        if cell["fault"] is not None:
            first, design = designs.setdefault(cell["fault"], (run.run_id, run.manifest["config"].get("fault")))
            if run.manifest["config"].get("fault") != design:
                raise TraceError(f"runs {first} and {run.run_id} of fault {cell['fault']!r} have different faults")


def flat(node: Any, path: str = "") -> dict[str, Any]:
    """The leaves of nested mappings, by their keys joined with dots."""
    if not isinstance(node, Mapping):
        return {path: node}
    return {key: v for name, child in node.items() for key, v in flat(child, f"{path}.{name}".lstrip(".")).items()}


def check_alike(traces: Sequence[Trace]) -> None:
    """Healthy runs set one threshold together: all but the seed is one configuration; a faulty one adds its fault.

    Raises TraceError that names the key, both values and runs.
    """
    configs = [flat(run.manifest["config"]) for run in traces]
    healthy = next(config for config, run in zip(configs, traces, strict=True) if run.onset is None)
    first = next(run.run_id for run in traces if run.onset is None)
    for config, run in zip(configs, traces, strict=True):
        free = ("seed",) if run.onset is None else FAULTY_ALONE
        for key in dict.fromkeys((*healthy, *config)):
            if config.get(key) != healthy.get(key) and not key.startswith(free):
                what = "healthy runs of one calibration" if run.onset is None else "a faulty run and its healthy ones"
                raise TraceError(
                    f"{what} differ in {key}: {json.dumps(healthy.get(key))} in {first}, "
                    f"{json.dumps(config.get(key))} in {run.run_id}; score them apart"
                )


def differences(traces: Sequence[Trace]) -> tuple[str, ...]:
    """What determines results and is not the same in all traces."""
    kinds = {what: sorted({run.manifest[what] for run in traces}) for what in ("source_sha256", "data_sha256", "torch")}
    return tuple(f"{what} {', '.join(v[:12] for v in values)}" for what, values in kinds.items() if len(values) > 1)
