"""Which runs may train together along a model axis, and in which company."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from foreshock.experiments.build import Run

OWN_NODES = ("seed", "fault", "train")
OWN_TRAIN_KEYS = (
    "learning_rate",
    "warmup_steps",
    "schedule",
    "final_lr_fraction",
    "weight_decay",
    "stop_drawup_nats",
)
"""What each run of a stack has for itself: its seed, its fault, and these keys of its training."""


def why_single(run: Run) -> str | None:
    """Why a run trains by itself, in one line that names the field, or None where it can be stacked."""
    if run.model_config.moe is not None:
        return "model.moe is not allowed with train.stack: experts do not stack"
    if run.model_config.dropout:
        return f"model.dropout={run.model_config.dropout} is not allowed with train.stack: masks are of single runs"
    required = {"precision": "fp32", "micro_batch": None, "watched_sequences": None, "compile": False}
    for field, alone in required.items():
        if getattr(run.train, field) != alone:
            return f"train.{field}={getattr(run.train, field)} is not allowed with train.stack: only {alone}"
    healthy = run.healthy_sites()
    for step in range(run.train.steps):
        sites = run.fault.sites(step, healthy)
        if sites.batch_size != healthy.batch_size:
            return f"fault: a batch of {sites.batch_size} sequences is not allowed with train.stack: all have one size"
        for value in sites.values:
            if not value.stackable:
                return f"fault: {value} is not allowed with train.stack: it is applied in single runs alone"
    return None


def stacks(runs: Sequence[Run]) -> list[list[int]]:
    """The runs' indices, in stacks of up to ``train.stack``, alike but for what each has for itself, in their order.

    A run that cannot be stacked stands by itself.
    """
    alike: dict[str, list[int]] = {}
    for index, run in enumerate(runs):
        train = {key: value for key, value in run.config["train"].items() if key not in OWN_TRAIN_KEYS}
        common: dict[str, Any] = {key: value for key, value in run.config.items() if key not in OWN_NODES}
        common |= {"train": train, "single": None if why_single(run) is None else index}
        alike.setdefault(json.dumps(common, sort_keys=True), []).append(index)
    found = [
        group[first : first + runs[group[0]].train.stack]
        for group in alike.values()
        for first in range(0, len(group), runs[group[0]].train.stack)
    ]
    return sorted(found)
