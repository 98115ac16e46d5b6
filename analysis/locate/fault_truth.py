"""What a run's manifest says of its fault: the class of its place, its part, layers and heads."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from foreshock.analysis.locate.laws import ATTENTION, INPUTS, LINEAR, LOSS, NORM, ROUTER
from foreshock.analysis.runs.experiment import Experiment
from foreshock.experiments.trace import Trace

KEY_VALUE_SITES = ("k", "v", "dk", "dv")
"""Attention sites whose heads are key-value heads; the heads of the others are query heads."""
HEALTHY, OTHER = "healthy", "other fault"
"""Classes of runs in which every law holds: without a fault, and with one that breaks no kernel."""
LINEAR_PARTS = ("q", "k", "v", "o", "input", "gate", "output", "shared_input", "shared_gate", "shared_output", "head")
NORM_PARTS = {"attention_norm": "attention", "mlp_norm": "mlp", "final_norm": "final", "q_norm": "q", "k_norm": "k"}


@dataclass(frozen=True)
class Truth:
    """site_class: of ``laws.CLASSES``, HEALTHY, OTHER, or None where no derivation says what the fault breaks.

    part: of a linear layer or norm; layers, heads: which were hit, None for all or where there is none. Heads are
    key-value heads, as those of the laws are: a fault in a query head breaks the laws of its group.
    """

    site_class: str | None
    part: str | None = None
    layers: tuple[int, ...] | None = None
    heads: tuple[int, ...] | None = None


def truth_of(run: Trace) -> Truth:
    """The truth of a run."""
    config = run.manifest["config"]
    model = config.get("model", {})
    shared = model["n_heads"] // model["n_kv_heads"] if model.get("n_kv_heads") else 1
    return truth(config["fault"], run.onset, experts=bool(model.get("moe")), shared=shared)


def truth(fault: Mapping[str, Any], onset: int | None, experts: bool = False, shared: int = 1) -> Truth:
    """The truth of a run from its manifest's fault node and onset step.

    experts: whether its model has them; shared: how many neighbouring query heads share a key-value head.
    """
    if onset is None:
        return Truth(HEALTHY)
    if "faults" in fault:
        broken = [
            t
            for t in (truth(part, onset, experts, shared) for part in fault["faults"].values())
            if t.site_class != OTHER
        ]
        return broken[0] if len(broken) == 1 else Truth(None if broken else OTHER)
    if "pv_accumulation" in fault:
        return Truth(None)  # the forward's O is wrong, not a copy of it: the classes are of the backward
    if "bits" not in fault or fault["bits"] == 0:
        return Truth(OTHER)
    return _of_modules(fault, experts) if "modules" in fault else _of_attention(fault, shared)


def _of_attention(fault: Mapping[str, Any], shared: int) -> Truth:
    """Several sites break the laws of each; the classes are derived for the backward alone."""
    if fault["phase"] != "backward":
        return Truth(None)
    sets = [next(laws for names, laws in ATTENTION.items() if site in names.split()) for site in fault["sites"]]
    broken = frozenset().union(*sets)
    site_class = next((names for names, laws in ATTENTION.items() if laws == broken), None)
    layers, heads = (None if fault[key] is None else tuple(fault[key]) for key in ("layers", "heads"))
    if heads is not None:
        groups = {head if site in KEY_VALUE_SITES else head // shared for site in fault["sites"] for head in heads}
        heads = tuple(sorted(groups))
    return Truth(site_class, None, layers, heads)


def _of_modules(fault: Mapping[str, Any], experts: bool) -> Truth:
    """Modules of one class and part, in one or more layers; of others together no verdict is derived."""
    places = {_of_module(name, fault["site"], experts) for name in fault["modules"]}
    if len(places) > 1:
        return Truth(None)
    site_class, part = places.pop()
    if site_class is None:
        return Truth(None)
    layers = [int(match[1]) for name in fault["modules"] if (match := re.match(r"blocks\.(\d+)\.", name))]
    return Truth(site_class, part, tuple(sorted(layers)) or None)


def _of_module(name: str, site: str, experts: bool) -> tuple[str | None, str | None]:
    """Class and part, (None, None) where no law detects that tensor: most gains' gradients, some inputs' gradients.

    The gradient that a module is given is the product of the one after it: of the head the loss, of the router the
    softmax; elsewhere it is another module's.
    """
    last = name.split(".")[-1]
    if last in NORM_PARTS and site == "dx":
        return NORM, NORM_PARTS[last]
    if last == "router" and site != "dx":
        return ROUTER, ROUTER
    if name == "head" and site == "dy":
        return LOSS, LOSS
    part = f"shared_{last}" if ".shared." in name else last
    detected = site in ("y", "dw") or (site == "dx" and part in ("o", "head", *INPUTS["qkv"], *_dense(experts)))
    return (LINEAR, part) if part in LINEAR_PARTS and detected else (None, None)


def _dense(experts: bool) -> tuple[str, ...]:
    """Parts whose input's gradient obeys a law in a block without experts."""
    return () if experts else INPUTS["mlp"]


def broken_kernels(experiment: Experiment) -> list[str]:
    """The faults that corrupt some kernel, whichever."""
    return [
        fault
        for fault in experiment.faults
        for run in experiment.of("faulty", fault=fault)[:1]
        if truth_of(run.trace).site_class != OTHER
    ]
