"""Attention's dot product computed again in FP32 for a few batch rows, and held against what the kernel returned.

Not a law but a second opinion: it costs a forward and a backward of those rows, feels errors that keep every law (a
wrong forward whose backward agrees with it), and tells dQ, dK and dV apart where two laws of one class differ in
strength.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from models.visibility import score_mask
from monitors.attention_laws import over_rows
from monitors.base import Reading, Signal, StepView
from monitors.batch_rows import check_rows, in_turn
from monitors.conservation import over_group, per_query_head, relative, squared_norm
from monitors.rounding import BF16_U2, OVER_NOISE, DotProductStep

NAME = "attention_recomputed"
PARTS = ("o", "dq", "dk", "dv")

Found = Mapping[str, tuple[Tensor, Tensor, Tensor]]
"""By part: ||returned - computed again||, ||returned||, and the mean square that rounding alone gives the first."""


def recompute(t: DotProductStep) -> Found:
    """O, dQ, dK and dV again from q, k, v, dO and the returned O; each entry (B, G), o and dq summed over a group.

    With P = softmax(Q K^T / sqrt(D)), dS = P * (dO V^T - rowsum(dO * O)) and the rounding errors of
    ``monitors.rounding``, of mean square u^2 of what is stored, an exact kernel differs by

        O    u^2 sum_i [sum_j e_ij |v_j|^2 + |o_i|^2]              e: P^2, but 0 at the largest of a row: exact
        dQ   u^2 sum_i [sum_j dS_ij^2 |k_j|^2 / D + |dq_i|^2]
        dK   u^2 sum_j [sum_i dS_ij^2 |q_i|^2 / D + |dk_j|^2]
        dV   u^2 sum_j [sum_i e'_ij |do_i|^2 + |dv_j|^2]           e': P^2, but 0 where P = 1
    """
    _, H, T, D = t.q.shape
    G, scale = t.k.shape[1], 1 / math.sqrt(D)
    k, v = (per_query_head(x, H) for x in (t.k, t.v))
    p = (t.q @ k.mT * scale + score_mask(T, t.window, 1, t.q.device, t.q.dtype)).softmax(-1)
    ds = p * (t.do @ v.mT - (t.do * t.o).sum(-1, keepdim=True))
    p2, ds2 = p.square(), ds.square() / D
    forward = p2 * (p < p.amax(-1, keepdim=True))

    def both(query_BHT: Tensor, key_BHT: Tensor, x_BHTT: Tensor) -> Tensor:
        """sum_ij query_i x_ij key_j, (B, G)."""
        return over_group((query_BHT * (x_BHTT @ key_BHT[..., None])[..., 0]).sum(-1), G)

    one = torch.ones_like(t.q[..., 0])
    again = {"o": p @ v, "dq": ds @ k * scale, "dk": ds.mT @ t.q * scale, "dv": p.mT @ t.do}
    stored = {
        "o": both(one, squared_norm(v), forward),
        "dq": both(one, squared_norm(k), ds2),
        "dk": both(squared_norm(t.q), one, ds2),
        "dv": both(squared_norm(t.do), one, p2 * (p < 1)),
    }
    found = {}
    for part in PARTS:
        returned, second = getattr(t, part), again[part]
        if part in ("dk", "dv"):
            second = over_group(second, G)
        error, size = (over_group(squared_norm(x).sum(-1), G) for x in (returned - second, returned))
        found[part] = error.sqrt(), size.sqrt(), BF16_U2 * (stored[part] + size)
    return found


class AttentionRecomputed:
    """``attention_recomputed.<o|dq|dk|dv>``: ||returned - computed again|| / ||returned||, and its ``.over_noise``.

    Per layer and key-value head, the root mean square over the chosen batch rows; bad: up. ``.over_noise`` divides by
    what rounding alone predicts (``recompute``) and is 1 on a healthy BF16 kernel; an FP32 kernel (``sdpa``) has none.
    dq, dk and dv are computed from the returned O, so that a wrong O alone does not break them.

    rows: how many rows of the batch are computed again, taken in turn; 0 for all, which is a kernel's work again.
    every_steps: cadence.
    """

    lookbacks = ()
    taps = ("dot_product",)
    stackable = True

    def __init__(self, every_steps: int, rows: int) -> None:
        self.rows, self.every_steps = check_rows(rows), every_steps
        self.signals = tuple(
            Signal(f"{NAME}.{part}{suffix}", "1", "up", ("layer", "head"), every_steps)
            for part in PARTS
            for suffix in ("", f".{OVER_NOISE}")
        )

    @torch.no_grad()
    def observe(self, view: StepView) -> dict[str, Reading]:
        taps = list(view.taps.at("dot_product").values())
        chosen = in_turn(self.rows, view.step // self.every_steps, len(taps[0].output))
        found = recompute(DotProductStep.of(taps, chosen))
        error, size, noise = (torch.stack(parts) for parts in zip(*found.values(), strict=True))
        names = [f"{NAME}.{part}" for part in found]
        readings = dict(zip(names, over_rows(relative(error, size), len(taps)), strict=True))
        if taps[0].module.rounds_to_bf16:
            ratios = over_rows(relative(error, noise.sqrt()), len(taps))
            readings |= {f"{name}.{OVER_NOISE}": ratio for name, ratio in zip(names, ratios, strict=True)}
        return readings
