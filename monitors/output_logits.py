"""The size of the output logits, which the loss does not hold in place."""

from __future__ import annotations

import torch

from foreshock.models.numerics import at_least_fp32
from foreshock.monitors.base import Needs, Reading, Signal, StepView
from foreshock.monitors.batch_rows import check_rows, in_turn


class OutputLogZ:
    """``output_log_z``: mean over tokens of (ln Z)^2, Z = sum_v exp(logit_v). Bad: up.

    The softmax ignores a shift of all logits, so nothing but a z-loss keeps ln Z near 0; its drift goes before
    divergence in low precision (Wortsman et al., arXiv:2309.14322). In nats squared, from 0; NaN gives NaN.
    rows: how many rows of the batch are looked at, in turn; 0 for all.
    """

    needs = Needs(taps=("linear",), roles=("head",), stackable=True)

    def __init__(self, every_steps: int, rows: int) -> None:
        self.rows, self.every_steps = check_rows(rows), every_steps
        self.signals = (Signal("output_log_z", "nats^2", "up", every_steps=every_steps, family="model_behavior"),)

    @torch.no_grad()
    def observe(self, view: StepView) -> dict[str, Reading]:
        logits = view.tapped("linear", "head")[0].out
        chosen = logits[in_turn(self.rows, view.step // self.every_steps, len(logits))]
        return {"output_log_z": at_least_fp32(chosen).logsumexp(-1).square().mean()}
