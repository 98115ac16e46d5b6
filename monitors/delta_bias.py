"""The oracle of broken attention: the error that the fault itself puts into the backward's delta."""

from __future__ import annotations

import torch

from foreshock.models.numerics import at_least_fp32
from foreshock.monitors.attention_scores import scores_of, tapped_inputs
from foreshock.monitors.base import Needs, Reading, Signal, StepView
from foreshock.monitors.batch_rows import check_rows, in_turn


class DeltaBiasOracle:
    """``delta_bias_oracle``: sum over tokens of delta_faulty - delta_FP32, per layer and query head. Bad: both.

    An ORACLE: it reads which operations this step's fault does to ``o``, ``do`` and ``delta`` in the backward, and
    does them again, so it bounds what a monitor could know and is no rival. delta = rowsum(dO * O) enters dS, and its
    errors of one sign do not cancel over tokens and steps (Qiu & Yao, arXiv:2510.04212). delta_FP32 comes from a shadow
    O = softmax(S) V in FP32 and the unrounded dO; so a healthy BF16 kernel reads its natural rounding, and not 0.

    The natural error of an O that was accumulated in BF16 is in the forward's output, and so in the reading. Where the
    backward does not read that O (``models.arithmetic``: an FP32 O, or rowsum(dP * P)), the shadow O stands for what it
    reads, and only the rounding of dO and faults are left.

    rows: how many rows of the batch are looked at, in turn, 0 for all; the sum over the whole batch is estimated from
    them. In nats. The saved O is taken to be the forward's output: a forward fault on ``o``, which a kernel does
    not save, would show here though it does not reach the backward. NaN and Inf propagate.
    """

    needs = Needs(view=("numerics",), taps=("dot_product",), stackable=True)

    def __init__(self, every_steps: int, rows: int) -> None:
        self.rows, self.every_steps = check_rows(rows), every_steps
        self.signals = (Signal("delta_bias_oracle", "nats", "both", ("layer", "head"), every_steps, family="oracle"),)

    @torch.no_grad()
    def observe(self, view: StepView) -> dict[str, Reading]:
        taps = view.taps.at("dot_product").values()
        batch = len(next(iter(taps)).out)
        rows = in_turn(self.rows, view.step // self.every_steps, batch)
        q, k, v = tapped_inputs(taps, rows)
        shadow_o = scores_of(taps, q, k).softmax(-1) @ v
        bias = []
        for layer, (tap, clean_o) in enumerate(zip(taps, shadow_o, strict=True)):
            numerics, do = view.numerics.layer(layer), at_least_fp32(tap.dout[rows])
            reads_output = numerics.arithmetic.stored_o == "bf16" and numerics.arithmetic.delta == "o"
            o = at_least_fp32(tap.out[rows]) if reads_output else clean_o
            reached = o.new_zeros((), dtype=torch.int64)  # the run's own counter counts once

            read_o = numerics.apply("o", "backward", o, reached)
            read_do = numerics.apply("do", "backward", tap.known_call.stored(do), reached)
            delta = numerics.apply("delta", "backward", (read_do * read_o).sum(-1, keepdim=True), reached)
            bias.append((delta.squeeze(-1) - (do * clean_o).sum(-1)).sum(-1).mean(0) * batch)
        return {"delta_bias_oracle": torch.stack(bias) / (view.loss_scale or 1)}
