"""Which runs an experiment needs: healthy ones by role, and one set for every fault."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

ROLES = ("reference", "calibration", "test")
"""Roles of healthy runs: bands and label scale, thresholds, realised false alarms."""

FIRST_SEED = {"reference": 0, "calibration": 1000, "test": 2000, "faulty": 3000}
"""Disjoint by construction: no run can help to set the threshold that it is scored by."""

CASE, FIRST_CASE_SEED = "case", 4000
"""Role of runs that are judged each by itself, by a number that no healthy run has set; and their first seed."""


@dataclass(frozen=True)
class PlannedRun:
    """One cell of an experiment: model, role (``faulty`` for a fault's runs), fault name or None, seed, and overrides,
    of which the seed is the last. Of role ``case``, ``fault`` is the case's name."""

    model: str
    role: str
    fault: str | None
    seed: int
    overrides: tuple[str, ...]


def plan(
    seeds: Mapping[str, int],
    faults: Mapping[str, Mapping[str, Any]],
    models: Sequence[str],
    overrides: Sequence[str] = (),
) -> list[PlannedRun]:
    """Every run of an experiment, faulty ones first so that the pictures' subject exists early.

    seeds: number of seeds a role; faults: name -> ``overrides`` that switch the fault on; models: names in
    conf/model, each with all of the runs; overrides: of every run. Raises ValueError on an unknown role, a number
    that is not from 0 to 1000, or no model.
    """
    if set(seeds) != set(FIRST_SEED):
        raise ValueError(f"scale.seeds={dict(seeds)} is not allowed: needs {', '.join(FIRST_SEED)}, and nothing else")
    for role, count in seeds.items():
        if not 0 <= count <= 1000:
            raise ValueError(f"scale.seeds.{role}={count} is not allowed: 0 to 1000")
    if not models or len(set(models)) != len(models):
        raise ValueError(f"experiment.models={list(models)} is not allowed: distinct names of conf/model")

    def of(role: str, fault: str | None, switch: Sequence[str]) -> list[PlannedRun]:
        return [
            PlannedRun(model, role, fault, seed, (f"model={model}", *overrides, *switch, f"seed={seed}"))
            for model in models
            for seed in range(FIRST_SEED[role], FIRST_SEED[role] + seeds[role])
        ]

    runs = [run for name, fault in faults.items() for run in of("faulty", name, fault["overrides"])]
    return runs + [run for role in ROLES for run in of(role, None, ("fault=none",))]


def plan_cases(
    cases: Mapping[str, Mapping[str, Any]], model: str, seeds: int, overrides: Sequence[str] = ()
) -> list[PlannedRun]:
    """Every run of an experiment of cases, the first seed of all cases first so that a broken sweep has seen each.

    cases: name -> what it has of its own: ``model``, ``seeds`` (number of runs), ``overrides``; seeds, model: of the
    other cases; overrides: of every run. Raises ValueError on a number of runs that is not from 0 to 1000.
    """
    runs = []
    for name, case in cases.items():
        count, of_case = case.get("seeds", seeds), case.get("model", model)
        if not 0 <= count <= 1000:
            raise ValueError(f"experiment.cases.{name}.seeds={count} is not allowed: 0 to 1000")
        shared = (f"model={of_case}", *overrides, *case.get("overrides", ()))
        runs += [
            PlannedRun(of_case, CASE, name, seed, (*shared, f"seed={seed}"))
            for seed in range(FIRST_CASE_SEED, FIRST_CASE_SEED + count)
        ]
    return sorted(runs, key=lambda run: run.seed)
