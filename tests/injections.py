"""Injection cards as manifests have them, for made-up runs."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from foreshock.faults.card import Injection, InjectionCard
from foreshock.faults.window import Window


def card(*injections: Injection, family: str = "other") -> dict[str, Any]:
    """A card in plain values."""
    return asdict(InjectionCard(family, injections))


def of_attention(
    tensors: list[str], bits: int, what: str = "truncate", onset: int = 0, share: float = 1.0, **reach: Any
) -> Injection:
    """A bit operation on tensors of attention, as ``faults.bf16_shift`` describes it. reach: phase, layers, heads."""
    where = {"point": "numerics", "tensors": tensors, "phase": "backward", "layers": None, "heads": None, **reach}
    return Injection(what, where, {"bits": bits, "share": share}, Window(onset), control=bits == 0)


def of_modules(
    modules: list[str], tensor: str, bits: int = 2, what: str = "truncate", onset: int = 0, share: float = 1.0
) -> Injection:
    """A bit operation on a tensor of modules, as ``faults.module_shift`` describes it."""
    where = {"point": "modules", "modules": modules, "tensor": tensor}
    return Injection(what, where, {"bits": bits, "share": share}, Window(onset), control=bits == 0)


def of_learning_rate(factor: float, onset: int = 0) -> Injection:
    """A scaled learning rate, as ``faults.lr_scale`` describes it."""
    where = {"point": "lr_scale", "groups": None}
    return Injection("scale", where, {"factor": factor, "ramp_steps": 0}, Window(onset), control=factor == 1)
