"""Which conservation laws there are, and which places of a broken kernel the broken ones tell apart.

A place is known up to its class: the sites whose corruption breaks the same laws, by the derivations of
``monitors.conservation``. The trace and the matrix form of a law are one law. That a gradient agrees with the one that
was computed again counts as a law beside them: it breaks no class in two, but shows a weak fault's class more clearly.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from analysis.detect.tracks import OVER_NOISE

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
DQ, DK, DV = (f"{part} computed again" for part in ("dQ", "dK", "dV"))
RECOMPUTED: Mapping[str, frozenset[str]] = {
    "o delta dp ds v": frozenset({DQ, DK}),
    "do dv lse": frozenset({DV}),
    "dq": frozenset({DQ}),
    "dk": frozenset({DK}),
    "p s": frozenset({DQ, DK, DV}),
    "q k": frozenset({DQ, DK, DV}),
}
"""By class, the gradients that differ from what ``monitors.attention_recomputed`` finds for them."""
EITHER: Mapping[str, frozenset[str]] = {"do dv lse": frozenset({DQ, DK})}
"""Those that differ for some sites of the class and not for others: dO and lse, but not dV."""
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
    "attention_recomputed.dq": Law("attention", DQ),
    "attention_recomputed.dk": Law("attention", DK),
    "attention_recomputed.dv": Law("attention", DV),
    "router_shift_residual": Law(ROUTER, ROUTER),
    "logit_shift_residual": Law(LOSS, LOSS),
}
_BY_PART = {"linear_euler_residual": LINEAR, "linear_input_residual": LINEAR, "norm_orthogonality_residual": NORM}


def law_of(signal: str) -> Law | None:
    """The law whose ratio to predicted noise a signal is; None for every other signal."""
    if not signal.endswith(OVER_NOISE):
        return None
    whole = signal.removesuffix(OVER_NOISE)
    name, *parts = whole.split(".")
    for known in (whole, name):
        if known in _WHOLE:
            return _WHOLE[known]
    if name not in _BY_PART or not parts:
        return None
    part = parts[-1].removeprefix("experts_")  # a norm's shifted law is its law; a block has an MLP or experts
    return Law(ROUTER, ROUTER) if part == ROUTER else Law(_BY_PART[name], part)
