"""Attention's scores, recomputed from a tap: how large they get, and how sharp the attention is that they make."""

from __future__ import annotations

import math
from collections.abc import Collection

import torch
from torch import Tensor

from foreshock.models.attention import DotProduct
from foreshock.models.numerics import at_least_fp32
from foreshock.models.taps import Tap
from foreshock.models.visibility import score_mask
from foreshock.monitors.base import Needs, Reading, Signal, StepView
from foreshock.monitors.batch_rows import check_rows, in_turn
from foreshock.monitors.conservation import per_query_head
from foreshock.monitors.trailing import on_trailing_axes
from foreshock.monitors.unreadable import Unreadable


def tapped_inputs(taps: Collection[Tap[DotProduct]], rows: slice) -> tuple[Tensor, Tensor, Tensor]:
    """q, k and v of every layer as its kernel received them, in FP32, (layers, rows, query heads, T, D).

    Each query head has the k and v that it reads: a group's appear once for each of its query heads.
    """
    check_scores(taps)
    q, k, v = ([at_least_fp32(tap.known_call.stored(tap.inputs[i][rows])) for tap in taps] for i in range(3))
    heads = q[0].shape[1]
    k, v = ([per_query_head(x, heads) for x in shared] for shared in (k, v))
    return torch.stack(q), torch.stack(k), torch.stack(v)


def batch_of(taps: Collection[Tap[DotProduct]]) -> int:
    """The rows of the batch that these dot products saw. Raises Unreadable where one has seen none."""
    if not taps or any(tap.call is None or tap.output is None for tap in taps):
        raise Unreadable("no call of attention was seen: wrap its kernel with foreshock.watched_attention")
    return len(next(iter(taps)).out)


def check_scores(taps: Collection[Tap[DotProduct]]) -> None:
    """Raises Unreadable where the scores of a call cannot be computed again."""
    for tap in taps:
        if tap.known_call.unreadable is not None:
            raise Unreadable(f"attention's scores cannot be computed again: {tap.known_call.unreadable}")


def scores_of(taps: Collection[Tap[DotProduct]], q: Tensor, k: Tensor) -> Tensor:
    """``causal_scores`` of every layer, with the window and the scale of its own call. q, k: (layers, ..., T, D)."""
    calls = [(tap.known_call.window, tap.known_call.scale) for tap in taps]
    if len(set(calls)) == 1:
        return causal_scores(q, k, *calls[0])
    return torch.stack([causal_scores(*of_layer) for of_layer in zip(q, k, *zip(*calls, strict=True), strict=True)])


def window_of(taps: Collection[Tap[DotProduct]]) -> int | None:
    """How many keys a query of these layers sees, None for all before it."""
    return next(iter(taps)).known_call.window


@on_trailing_axes
def masked_scores(q: Tensor, k: Tensor, mask: Tensor, scale: float | None = None) -> Tensor:
    """S = scale q k^T + mask; scale: None for 1 / sqrt(D).

    q: (..., T, D), k: (..., S, D), mask: (1, T, S) -> (..., T, S).

    One call of a kernel that scales, multiplies and adds; vmap would make three of it, which round otherwise.
    """
    mask, flat_q, flat_k = (x.reshape(-1, *x.shape[-2:]) for x in (mask, q, k))
    alpha = 1 / math.sqrt(q.shape[-1]) if scale is None else scale
    return torch.baddbmm(mask, flat_q, flat_k.mT, alpha=alpha).view(*q.shape[:-1], -1)


def causal_scores(q: Tensor, k: Tensor, window: int | None = None, scale: float | None = None) -> Tensor:
    """S = scale q k^T where a query may look, -inf elsewhere. q, k: (..., T, D) -> (..., T, T)."""
    return masked_scores(q, k, score_mask(q.shape[-2], window, 1, q.device, q.dtype), scale)


class AttentionScores:
    """``max_attn_logit`` and ``attn_entropy``, per layer and query head, from one recomputation of the scores.

    ``max_attn_logit``: the largest causal q.k / sqrt(D), as QK-clip watches it (Kimi K2, arXiv:2507.20534). Bad: up.
    ``attn_entropy``: mean over queries of -sum_j P_ij ln P_ij, in nats, from 0 to the mean of ln(i + 1) (Zhai et al.,
    arXiv:2303.06296: a collapse towards 0 goes before divergence). Bad: both.

    rows: how many rows of the batch are looked at, in turn; 0 for all. NaN in q or k gives NaN.
    """

    needs = Needs(taps=("dot_product",), stackable=True)

    def __init__(self, every_steps: int, rows: int) -> None:
        self.rows, self.every_steps = check_rows(rows), every_steps
        self.signals = (
            Signal("max_attn_logit", "1", "up", ("layer", "head"), every_steps, family="model_behavior", above=100.0),
            Signal("attn_entropy", "nats", "both", ("layer", "head"), every_steps, family="model_behavior"),
        )

    @torch.no_grad()
    def observe(self, view: StepView) -> dict[str, Reading]:
        taps = view.taps.at("dot_product").values()
        q, k, _ = tapped_inputs(taps, in_turn(self.rows, view.step // self.every_steps, batch_of(taps)))
        scores = scores_of(taps, q, k)
        entropy = torch.special.entr(scores.softmax(-1)).sum(-1)
        return {"max_attn_logit": scores.amax((1, 3, 4)), "attn_entropy": entropy.mean((1, 3))}
