"""Which conservation laws there are, and which places of a broken kernel the broken ones tell apart.

A place is known up to its class: the sites whose corruption breaks the same laws, by the derivations of
``monitors.conservation``. The trace and the matrix form of a law are one law. That a gradient agrees with the one that
was computed again counts as a law beside them: it breaks no class in two, but shows a weak fault's class more clearly.
"""

from __future__ import annotations

from collections.abc import Mapping

from foreshock.monitors.law import DK, DQ, DV, KEY_SHIFT, LINEAR, LOSS, NORM, QK_GAUGE, ROUTER, VALUE_SHIFT, VO_GAUGE

ATTENTION: Mapping[str, frozenset[str]] = {
    "o delta dp ds v": frozenset({KEY_SHIFT}),
    "do dv lse": frozenset({VALUE_SHIFT, VO_GAUGE}),
    "dq": frozenset({QK_GAUGE}),
    "dk": frozenset({KEY_SHIFT, QK_GAUGE}),
    "p s": frozenset({KEY_SHIFT, VALUE_SHIFT, VO_GAUGE}),
    "q k": frozenset({KEY_SHIFT, VALUE_SHIFT, QK_GAUGE, VO_GAUGE}),
}
"""Sites inside attention's backward, by class, and the laws that each of them breaks."""
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
CLASSES = (*ATTENTION, LINEAR, NORM, ROUTER, LOSS)
INPUTS: Mapping[str, tuple[str, ...]] = {
    "qkv": ("q", "k", "v"),
    "mlp": ("input", "gate"),
}
"""Linear layers that share an input: the law of its gradient tells no more than their group."""
