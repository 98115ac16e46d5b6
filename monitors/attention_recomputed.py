"""Attention's dot product computed again in FP32 for a few batch rows, and held against what the kernel returned.

Not a law but a second opinion: it costs a forward and a backward of those rows, detects errors that keep every law (a
wrong forward whose backward agrees with it), and tells dQ, dK and dV apart where two laws of one class differ in
strength.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from foreshock.monitors.attention_laws import over_rows, twin_by
from foreshock.monitors.attention_scores import batch_of
from foreshock.monitors.attention_twin import twin_of
from foreshock.monitors.base import Needs, Reading, Signal, StepView
from foreshock.monitors.batch_rows import check_rows, in_turn
from foreshock.monitors.conservation import over_group, relative, squared_norm
from foreshock.monitors.dot_product import DotProductStep
from foreshock.monitors.kernel_rounding import UNROUNDED, KernelRounding, kernel_rounding
from foreshock.monitors.law import DK, DQ, DV, IN_ATTENTION, Law
from foreshock.monitors.rounding import FP32_U
from foreshock.monitors.signal import OVER_NOISE, with_ratio

NAME = "attention_recomputed"
PARTS = ("o", "dq", "dk", "dv")
LAWS = {part: Law(IN_ATTENTION, name) for part, name in (("dq", DQ), ("dk", DK), ("dv", DV))}
"""That a gradient agrees with the one computed again tells a site's class; that O does tells none."""

Found = Mapping[str, Tensor]
"""By part, the norm over tokens and components, (B, G); those of o and dq are summed over a group."""


def distances(a: DotProductStep, b: DotProductStep) -> Found:
    """||a - b|| of each part."""
    return {part: _sizes(getattr(a, part) - getattr(b, part), a) for part in PARTS}


def sizes(t: DotProductStep) -> Found:
    """||x|| of each part."""
    return {part: _sizes(getattr(t, part), t) for part in PARTS}


def _sizes(x: Tensor, t: DotProductStep) -> Tensor:
    return over_group(squared_norm(x).sum(-1), t.k.shape[1]).sqrt()


def computed_again(t: DotProductStep, rounding: KernelRounding | None = None) -> DotProductStep:
    """O, dQ, dK and dV from q, k, v, dO and, in the backward, the returned O, which eager attention does not read.

    In FP32, and in FP64 for a kernel whose errors in FP32 are measured.
    """
    if rounding is None or not rounding.measured:
        return twin_of(t, UNROUNDED, t.o).step
    t = t.double()
    return twin_of(t, UNROUNDED, None if rounding.normalised else t.o).step


def over_noise(t: DotProductStep, exact: DotProductStep, rounding: KernelRounding) -> Found:
    """||returned - computed again|| over what rounding alone makes of it: the same distance of the kernel's twin.

    Twin and ``exact`` read the returned O in their backward, and the twin errs as the kernel does, in alike tokens too.
    Its distance has a floor of T 2^-24 of the part's size, FP32's bound for a sum of T numbers.
    """
    twin = twin_by(rounding, t, t.o)
    again, by_rounding, size = distances(t, exact), distances(twin.step, exact), sizes(t)
    floor = t.q.shape[-2] * FP32_U if twin.floors else 0.0
    return {part: relative(again[part], torch.hypot(by_rounding[part], floor * size[part])) for part in PARTS}


class AttentionRecomputed:
    """``attention_recomputed.<o|dq|dk|dv>``: ||returned - computed again|| / ||returned||, and its ``.over_noise``.

    Per layer and key-value head, the root mean square over the chosen batch rows; bad: up. ``.over_noise`` divides by
    the distance of the kernel's twin, which rounds as the kernel does (``monitors.attention_twin``), and is 1 on a
    healthy kernel; a kernel whose rounding is not known (``monitors.kernel_rounding``) has none. dq, dk and dv are
    computed from the returned O, so that a wrong O alone does not break them.

    rows: how many rows of the batch are computed again, taken in turn; 0 for all, which is a kernel's work again.
    every_steps: cadence.
    """

    needs = Needs(taps=("dot_product",), stackable=True)

    def __init__(self, every_steps: int, rows: int) -> None:
        self.rows, self.every_steps = check_rows(rows), every_steps
        self.signals = tuple(
            signal
            for part in PARTS
            for signal in with_ratio(
                Signal(f"{NAME}.{part}", "1", "up", ("layer", "head"), every_steps, family="recomputation"),
                LAWS.get(part),
                universal=True,
            )
        )

    @torch.no_grad()
    def observe(self, view: StepView) -> dict[str, Reading]:
        taps = list(view.taps.at("dot_product").values())
        step = DotProductStep.of(taps, in_turn(self.rows, view.step // self.every_steps, batch_of(taps)))
        rounding = kernel_rounding(taps[0])
        exact, size = computed_again(step, rounding), sizes(step)
        again = distances(step, exact)
        found = {f"{NAME}.{part}": relative(again[part], size[part]) for part in PARTS}
        if rounding is not None:
            ratios = over_noise(step, exact, rounding)
            found |= {f"{NAME}.{part}.{OVER_NOISE}": ratio for part, ratio in ratios.items()}
        return dict(zip(found, over_rows(torch.stack(list(found.values())), len(taps)), strict=True))
