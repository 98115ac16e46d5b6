"""Attention's conservation laws, watched: each residual, and the residual over what rounding alone predicts."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from foreshock.monitors import conservation, rounding
from foreshock.monitors.attention_scores import batch_of
from foreshock.monitors.attention_twin import Twin, twin_of
from foreshock.monitors.base import Needs, Reading, Signal, StepView
from foreshock.monitors.batch_rows import check_rows, in_turn
from foreshock.monitors.dot_product import DotProductStep
from foreshock.monitors.kernel_rounding import KernelRounding, kernel_rounding
from foreshock.monitors.law import IN_ATTENTION, KEY_SHIFT, QK_GAUGE, VALUE_SHIFT, VO_GAUGE, Law
from foreshock.monitors.measured_twin import measured_twin
from foreshock.monitors.rounding import beyond_rounding
from foreshock.monitors.signal import OVER_NOISE, with_ratio

Residual = Callable[[DotProductStep], conservation.Difference]
Noise = Callable[[Twin], Tensor]

LAWS: Mapping[str, tuple[Residual, Noise]] = {
    "key_shift_residual": (
        lambda t: conservation.key_shift(t.dk),
        rounding.key_shift_noise,
    ),
    "value_shift_residual": (
        lambda t: conservation.value_shift(t.dv, t.do),
        rounding.value_shift_noise,
    ),
    "qk_gauge_residual": (
        lambda t: conservation.qk_gauge(t.q, t.dq, t.k, t.dk),
        rounding.qk_gauge_noise,
    ),
    "qk_gauge_residual.matrix": (
        lambda t: conservation.qk_gauge_matrix(t.q, t.dq, t.k, t.dk),
        rounding.qk_gauge_matrix_noise,
    ),
    "vo_gauge_residual": (
        lambda t: conservation.vo_gauge(t.v, t.dv, t.o, t.do),
        rounding.vo_gauge_noise,
    ),
    "vo_gauge_residual.matrix": (
        lambda t: conservation.vo_gauge_matrix(t.v, t.dv, t.o, t.do),
        rounding.vo_gauge_matrix_noise,
    ),
}
"""By signal: its law, and the mean square that rounding alone gives what the law leaves, (B, G)."""

PARTS: Mapping[str, str] = {
    "key_shift_residual": KEY_SHIFT,
    "value_shift_residual": VALUE_SHIFT,
    "qk_gauge_residual": QK_GAUGE,
    "qk_gauge_residual.matrix": QK_GAUGE,
    "vo_gauge_residual": VO_GAUGE,
    "vo_gauge_residual.matrix": VO_GAUGE,
}
"""By signal, the name of its law: trace and matrix form are one law."""


def over_noise(t: DotProductStep, twin: Twin) -> dict[str, Tensor]:
    """By law, what is broken beyond rounding over what rounding alone predicts, (B, G)."""
    return {name: beyond_rounding(law(t)[0], law(twin.step)[0], noise(twin)) for name, (law, noise) in LAWS.items()}


def twin_by(rounding_points: KernelRounding, step: DotProductStep, o: Tensor | None = None) -> Twin:
    """The twin of a kernel, by the one of the two that knows its errors."""
    return (measured_twin if rounding_points.measured else twin_of)(step, rounding_points, o)


class AttentionLaws:
    """The laws of ``monitors.conservation`` that hold inside attention, per layer and key-value head. Bad: up.

    Signals, each the root mean square over batch rows: the residual of each law, relative as in its source, and
    ``.over_noise``, what is broken over what rounding alone predicts (``monitors.rounding``). On a healthy BF16 kernel
    the root mean square of the latter over a run is about 1, and where tokens are alike a single one lies between 0 and
    2: it needs no healthy twin run. A kernel whose rounding is not known (``monitors.kernel_rounding``) has no such
    prediction: that signal is left out.

    rows: how many rows of the batch are looked at, taken in turn from step to step; 0 for all. Every row obeys every
    law by itself, so fewer rows cost less and blur more. every_steps: cadence.
    """

    needs = Needs(taps=("dot_product",), stackable=True)

    def __init__(self, every_steps: int, rows: int) -> None:
        self.rows, self.every_steps = check_rows(rows), every_steps
        self.signals = tuple(
            signal
            for name in LAWS
            for signal in with_ratio(
                Signal(name, "1", "up", ("layer", "head"), every_steps, family="conservation"),
                Law(IN_ATTENTION, PARTS[name]),
                universal=True,
            )
        )

    @torch.no_grad()
    def observe(self, view: StepView) -> dict[str, Reading]:
        taps = list(view.taps.at("dot_product").values())
        chosen, layers = in_turn(self.rows, view.step // self.every_steps, batch_of(taps)), len(taps)
        step = DotProductStep.of(taps, chosen)
        found = {name: conservation.residual_of(*law(step)) for name, (law, _) in LAWS.items()}
        if rounding_points := kernel_rounding(taps[0]):
            twin = twin_by(rounding_points, step)
            ratios = over_noise(step.double() if rounding_points.measured else step, twin)
            found |= {f"{name}.{OVER_NOISE}": ratio for name, ratio in ratios.items()}
        return dict(zip(found, over_rows(torch.stack(list(found.values())), layers), strict=True))


def over_rows(residual: Tensor, layers: int) -> Tensor:
    """(laws, layers x rows, G) -> (laws, layers, G): the root mean square over batch rows."""
    return residual.unflatten(1, (layers, -1)).square().mean(2).sqrt()
