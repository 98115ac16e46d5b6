"""What a run's manifest says of its fault: the class of its place, its part, layers and heads."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from analysis.laws import ATTENTION, INPUTS, LINEAR, LOSS, NORM, ROUTER

HEALTHY, OTHER = "healthy", "other fault"
"""Classes of runs in which every law holds: without a fault, and with one that breaks no kernel."""
LINEAR_PARTS = {"q", "k", "v", "o", "output", "shared_output", "head", *INPUTS["mlp"]}
NORM_PARTS = {"attention_norm": "attention", "mlp_norm": "mlp", "final_norm": "final", "q_norm": "q", "k_norm": "k"}


@dataclass(frozen=True)
class Truth:
    """site_class: of ``laws.CLASSES``, HEALTHY, OTHER, or None where no derivation says what the fault breaks.

    part: of a linear layer or norm; layers, heads: which were hit, None for all or where there is none.
    """

    site_class: str | None
    part: str | None = None
    layers: tuple[int, ...] | None = None
    heads: tuple[int, ...] | None = None


def truth(fault: Mapping[str, Any], onset: int | None) -> Truth:
    """The truth of a run from its manifest's fault node and onset step."""
    if onset is None:
        return Truth(HEALTHY)
    if "faults" in fault:
        broken = [t for t in (truth(one, onset) for one in fault["faults"].values()) if t.site_class != OTHER]
        return broken[0] if len(broken) == 1 else Truth(None if broken else OTHER)
    if "bits" not in fault or fault["bits"] == 0:
        return Truth(OTHER)
    return _of_modules(fault) if "modules" in fault else _of_attention(fault)


def _of_attention(fault: Mapping[str, Any]) -> Truth:
    """Several sites break the laws of each; the classes are derived for the backward alone."""
    if fault["phase"] != "backward":
        return Truth(None)
    sets = [next(laws for names, laws in ATTENTION.items() if site in names.split()) for site in fault["sites"]]
    broken = frozenset().union(*sets)
    site_class = next((names for names, laws in ATTENTION.items() if laws == broken), None)
    layers, heads = (None if fault[key] is None else tuple(fault[key]) for key in ("layers", "heads"))
    return Truth(site_class, None, layers, heads)


def _of_modules(fault: Mapping[str, Any]) -> Truth:
    """Modules of one class and part, in one or more layers; of others together no verdict is derived."""
    found = {_of_module(name, fault["site"]) for name in fault["modules"]}
    if len(found) > 1:
        return Truth(None)
    site_class, part = found.pop()
    if site_class is None:
        return Truth(None)
    layers = [int(match[1]) for name in fault["modules"] if (match := re.match(r"blocks\.(\d+)\.", name))]
    return Truth(site_class, part, tuple(sorted(layers)) or None)


def _of_module(name: str, site: str) -> tuple[str | None, str | None]:
    last = name.split(".")[-1]
    if last in NORM_PARTS:
        return NORM, NORM_PARTS[last]
    if site == "dy":  # the gradient that a module is given is the product of the one after it
        return (LOSS, LOSS) if name == "head" else (None, None)
    if last == "router":
        return ROUTER, ROUTER
    part = f"shared_{last}" if ".shared." in name else last
    return (LINEAR, part) if part in LINEAR_PARTS else (None, None)
