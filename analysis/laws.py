"""Which conservation laws there are, and which places of a broken kernel the broken ones tell apart.

A place is known up to its class: the sites whose corruption breaks the same laws, by the derivations of
``monitors.conservation``. The trace and the matrix form of a law are one law.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from analysis.tracks import OVER_NOISE

KEY_SHIFT, VALUE_SHIFT, QK_GAUGE, VO_GAUGE = "key shift", "value shift", "QK gauge", "VO gauge"
ATTENTION: Mapping[str, frozenset[str]] = {
    "o delta dp ds v": frozenset({KEY_SHIFT}),
    "do dv lse": frozenset({VALUE_SHIFT, VO_GAUGE}),
    "dq": frozenset({QK_GAUGE}),
    "dk": frozenset({KEY_SHIFT, QK_GAUGE}),
    "p s": frozenset({KEY_SHIFT, VALUE_SHIFT, VO_GAUGE}),
    "q k": frozenset({KEY_SHIFT, VALUE_SHIFT, QK_GAUGE, VO_GAUGE}),
}
"""Sites inside attention's backward, by class, and the laws that each of them breaks."""
ROUTER, LOSS, LINEAR, NORM = "router", "loss kernel", "linear layer", "norm"
CLASSES = (*ATTENTION, LINEAR, NORM, ROUTER, LOSS)
INPUTS: Mapping[str, tuple[str, ...]] = {
    "qkv": ("q", "k", "v"),
    "mlp": ("input", "gate"),
}
"""Linear layers that share an input: the law of its gradient tells no more than their group."""


@dataclass(frozen=True, order=True)
class Law:
    """One law. kind: ``attention`` or the class that it names; part: its name there (a linear layer, a norm, ...)."""

    kind: str
    part: str

    def __str__(self) -> str:
        return self.part if self.kind in ("attention", self.part) else f"{self.kind} {self.part}"


_WHOLE = {
    "key_shift_residual": Law("attention", KEY_SHIFT),
    "value_shift_residual": Law("attention", VALUE_SHIFT),
    "qk_gauge_residual": Law("attention", QK_GAUGE),
    "vo_gauge_residual": Law("attention", VO_GAUGE),
    "router_shift_residual": Law(ROUTER, ROUTER),
    "logit_shift_residual": Law(LOSS, LOSS),
}
_BY_PART = {"linear_euler_residual": LINEAR, "linear_input_residual": LINEAR, "norm_orthogonality_residual": NORM}


def law_of(signal: str) -> Law | None:
    """The law whose ratio to predicted noise a signal is; None for every other signal."""
    if not signal.endswith(OVER_NOISE):
        return None
    name, *parts = signal.removesuffix(OVER_NOISE).split(".")
    if name in _WHOLE:
        return _WHOLE[name]
    if name not in _BY_PART or not parts:
        return None
    part = parts[-1].removeprefix("experts_")  # a norm's shifted law is its law; a block has an MLP or experts
    return Law(ROUTER, ROUTER) if part == ROUTER else Law(_BY_PART[name], part)
