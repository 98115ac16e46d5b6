"""Attention's conservation laws, watched: each residual, and the residual over what rounding alone predicts."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from monitors import conservation, rounding
from monitors.base import Reading, Signal, StepView
from monitors.batch_rows import check_rows, in_turn
from monitors.conservation import relative
from monitors.rounding import OVER_NOISE, DotProductStep

Law = Callable[[DotProductStep], conservation.Broken]
Noise = Callable[[DotProductStep], Tensor]

LAWS: Mapping[str, tuple[Law, Noise]] = {
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
"""By signal: by how much its law is broken, and the mean square that rounding alone gives that; each (B, G)."""


class AttentionLaws:
    """The laws of ``monitors.conservation`` that hold inside attention, per layer and key-value head. Bad: up.

    Signals, each the root mean square over batch rows: the residual of each law, relative as in its source, and
    ``.over_noise``, what is broken over what rounding alone predicts (``monitors.rounding``). On a healthy BF16 kernel
    the latter is 1, within the luck of a few numbers, at any step of any run: it needs no healthy twin. An FP32 kernel
    (``sdpa``) has no such prediction: that signal is left out.

    rows: how many rows of the batch are looked at, taken in turn from step to step; 0 for all. Every row obeys every
    law by itself, so fewer rows cost less and blur more. every_steps: cadence.
    """

    lookbacks = ()
    taps = ("dot_product",)
    stackable = True

    def __init__(self, every_steps: int, rows: int) -> None:
        self.rows, self.every_steps = check_rows(rows), every_steps
        self.signals = tuple(
            Signal(f"{law}{suffix}", "1", "up", ("layer", "head"), every_steps)
            for law in LAWS
            for suffix in ("", f".{OVER_NOISE}")
        )

    @torch.no_grad()
    def observe(self, view: StepView) -> dict[str, Reading]:
        taps = list(view.taps.at("dot_product").values())
        chosen, layers = in_turn(self.rows, view.step // self.every_steps, len(taps[0].output)), len(taps)
        together = DotProductStep.of(taps, chosen)
        broken, scale = (torch.stack(parts) for parts in zip(*(law(together) for law, _ in LAWS.values()), strict=True))
        readings = dict(zip(LAWS, over_rows(relative(broken, scale), layers), strict=True))
        if taps[0].module.rounds_to_bf16:
            noise = torch.stack([predict(together) for _, predict in LAWS.values()]).sqrt()
            ratios = over_rows(relative(broken, noise), layers)
            readings |= {f"{law}.{OVER_NOISE}": ratio for law, ratio in zip(LAWS, ratios, strict=True)}
        return readings


def over_rows(residual: Tensor, layers: int) -> Tensor:
    """(laws, layers x rows, G) -> (laws, layers, G): the root mean square over batch rows."""
    return residual.unflatten(1, (layers, -1)).square().mean(2).sqrt()
