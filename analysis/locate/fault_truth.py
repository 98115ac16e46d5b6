"""What a run's injection card says of its fault: the class of its place, its part, layers and heads."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from foreshock.analysis.locate.laws import ATTENTION, INPUTS, LINEAR, LOSS, NORM, ROUTER
from foreshock.analysis.runs.experiment import Experiment
from foreshock.experiments.trace import Trace
from foreshock.faults.card import Injection, InjectionCard

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
    model = run.manifest["config"].get("model", {})
    shared = model["n_heads"] // model["n_kv_heads"] if model.get("n_kv_heads") else 1
    return truth(run.card, run.onset, experts=bool(model.get("moe")), shared=shared)


def truth(card: InjectionCard, onset: int | None, experts: bool = False, shared: int = 1) -> Truth:
    """The truth of a run from its injection card and onset step.

    experts: whether its model has them; shared: how many neighbouring query heads share a key-value head.
    """
    if onset is None:
        return Truth(HEALTHY)
    truths = [_of(injection, experts, shared) for injection in card.injections if not injection.control]
    broken = [true for true in truths if true.site_class != OTHER]
    if not broken:
        return Truth(OTHER)
    return broken[0] if len(broken) == 1 else Truth(None)


def _of(injection: Injection, experts: bool, shared: int) -> Truth:
    if injection.where["point"] == "modules":
        return _of_modules(injection.where, experts)
    if injection.where["point"] == "numerics":
        return _of_attention(injection.where, shared)
    return Truth(OTHER)


def _of_attention(where: Mapping[str, Any], shared: int) -> Truth:
    """Several tensors break the laws of each; the classes are derived for the backward alone.

    Other arithmetic names no tensor: the forward's O is wrong, not a copy of it.
    """
    sites = where["tensors"]
    if where["phase"] != "backward" or not sites:
        return Truth(None)
    sets = [next(laws for names, laws in ATTENTION.items() if site in names.split()) for site in sites]
    broken = frozenset().union(*sets)
    site_class = next((names for names, laws in ATTENTION.items() if laws == broken), None)
    layers, heads = (None if where[key] is None else tuple(where[key]) for key in ("layers", "heads"))
    if heads is not None:
        groups = {head if site in KEY_VALUE_SITES else head // shared for site in sites for head in heads}
        heads = tuple(sorted(groups))
    return Truth(site_class, None, layers, heads)


def _of_modules(where: Mapping[str, Any], experts: bool) -> Truth:
    """Modules of one class and part, in one or more layers; of others together, or unnamed, no verdict is derived."""
    names = where["modules"] or ()
    places = {_of_module(name, where["tensor"], experts) for name in names}
    if len(places) != 1:
        return Truth(None)
    site_class, part = places.pop()
    if site_class is None:
        return Truth(None)
    layers = [int(match[1]) for name in names if (match := re.match(r"blocks\.(\d+)\.", name))]
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
