"""What rounding alone does to the attention laws of ``monitors.conservation``, from the tensors at hand.

A flash-attention kernel stores its tensors in BF16 and accumulates in FP32. Every stored number x carries an error
that is independent of all others, of mean 0 and mean square u^2 x^2. A number in [2^e, 2^(e+1)) is rounded to a
multiple of 2^(e-7), an error of mean square 2^(2e-14) / 12; over a uniform mantissa 2^(2e) / x^2 averages 1/2, so
u^2 = 2^-14 / 24. To first order a law's residual is linear in those errors, so its mean square is a sum over
them, written out below for each law. Nothing is fitted: on healthy BF16 kernels the root-mean-square residual over
this prediction is 1, from the first step to the last, at any learning rate.

Which roundings reach a law (P is rounded once for O in the forward, as exp(S - max S), where the largest entry of a
row is 1 and exact, and once more, as P, for dV in the backward):

    sum_j dK_j                  of dS; of O and of P for O, through delta = dO.O; of dK
    sum_j dV_j - sum_i dO_i     of P for dV; of dV
    q.dq - k.dk                 of dQ; of dK. Both use the same rounded dS, whose error cancels
    v.dv - o.do                 of P for dV; of dV; of P for O; of O

Q, K, V and dO are rounded before the kernel, and all laws hold exactly for the rounded ones. FP32 errors are 2^-16 as
large and left out.

Shapes as in ``monitors.conservation``: B batch rows, H query heads, G key-value heads, T tokens, D d_head. All
predictions are mean squares, (B, G), in the squared unit of the law's numerator.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from functools import cached_property

import torch
from torch import Tensor

from models.numerics import at_least_fp32
from models.taps import Tap
from models.visibility import score_mask
from monitors.attention_scores import masked_scores
from monitors.conservation import over_group, per_query_head, squared_norm

OVER_NOISE = "over_noise"
"""Ends the name of a signal that divides what is broken of a law by what rounding alone predicts."""

BF16_U2 = 2.0**-14 / 24
"""Mean square of the relative error of one rounding to BF16."""


TILE = 64
"""Queries looked at together: no key after the last of them is read, and they fit a CPU's cache."""


@dataclass(frozen=True)
class DotProductStep:
    """The tensors of some layers' dot products in one step, and the sums over a row of P that the predictions need.

    q, o, dq, do: (B, H, T, D); k, v, dk, dv: (B, G, T, D), FP32, as the kernel receives and returns them; window: how
    many keys a query sees, None for all before it.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    o: Tensor
    dq: Tensor
    dk: Tensor
    dv: Tensor
    do: Tensor
    window: int | None = None

    @classmethod
    def of(cls, taps: Sequence[Tap], rows: slice = slice(None)) -> DotProductStep:
        """From the taps on the dot products of some layers, of one window, their batch rows after one another."""

        def together(tensors: Iterable[Tensor]) -> Tensor:
            return at_least_fp32(torch.cat([x[rows] for x in tensors]))

        stored = taps[0].module.stored
        q, k, v = (stored(together(tap.inputs[index] for tap in taps)) for index in range(3))
        dq, dk, dv = (together(tap.input_grads[index] for tap in taps) for index in range(3))
        do = stored(together(tap.output_grad for tap in taps))
        return cls(q, k, v, together(tap.output for tap in taps), dq, dk, dv, do, taps[0].module.window)

    @cached_property
    def squares(self) -> Mapping[str, Tensor]:
        """|x|^2 of each token, (B, H or G, T), of each of the tensors."""
        return {part.name: squared_norm(getattr(self, part.name)) for part in fields(self) if part.name != "window"}

    @cached_property
    def row_sums(self) -> RowSums:
        """Of the recomputed P and dP: the one part that costs T x T, less what lies beyond a tile's last query.

        Sums of squares are norms of T x T tensors, which a CPU takes in one pass each; a matrix product is dearer.
        """
        B, H, T, _ = self.q.shape
        k, v = (per_query_head(x, H).flatten(0, 1) for x in (self.k, self.v))
        q, o, do = (x.flatten(0, 1) for x in (self.q, self.o, self.do))
        mask = score_mask(T, self.window, 1, q.device, q.dtype)
        size_v = torch.linalg.vector_norm(v, dim=-1)[:, None]

        def of_queries(i: slice, j: slice) -> tuple[Tensor, ...]:
            """For queries i, which look at keys j at most."""
            p = masked_scores(q[:, i], k[:, j], mask[:, i, j]).softmax(-1)
            largest = p.amax(-1, keepdim=True)
            twice_rounded = largest[..., 0] < 1  # P = 1 is exact in the backward as well
            delta = (do[:, i] * o[:, i]).sum(-1, keepdim=True)
            p_dp = (do[:, i] @ v[:, j].mT).mul_(p)
            ds2 = squared_norm(torch.addcmul(p_dp, p, delta, value=-1))
            p_v = p * size_v[..., j]
            backward = [squared_norm(x) * twice_rounded for x in (p, p_dp, p_v)]
            inexact = p.sub_(largest).sign_()  # 0 at the largest of a row, and at its equals
            return ds2, squared_norm(p_dp.mul_(inexact)), squared_norm(p_v.mul_(inexact)), *backward

        tiles = [of_queries(slice(first, first + TILE), slice(first + TILE)) for first in range(0, T, TILE)]
        return RowSums(*(torch.cat(parts, -1).view(B, H, T) for parts in zip(*tiles, strict=True)))


@dataclass(frozen=True)
class RowSums:
    """Sums over the keys of each query, (B, H, T). The error of P, over u^2, is P^2 where P is not stored exactly.

    ds2: of dS^2. forward_dp2, forward_v2: of the error of P in O, which is none at the largest P of a row, times dP^2
    and |v|^2. backward, backward_dp2, backward_v2: of the error of P in dV, by itself, times dP^2 and |v|^2.
    """

    ds2: Tensor
    forward_dp2: Tensor
    forward_v2: Tensor
    backward: Tensor
    backward_dp2: Tensor
    backward_v2: Tensor


def _sum_of_squares(x: Tensor) -> Tensor:
    return torch.linalg.vector_norm(x, dim=(-2, -1)).square()


def key_shift_noise(t: DotProductStep) -> Tensor:
    """E||sum_j dK_j||^2 = u^2 [sum_i (sum_j dS_ij^2 + e_ij dP_ij^2 + |do_i * o_i|^2) |q_i|^2 / D + sum_j |dK_j|^2].

    e: the error of P in O. An error of delta_i moves the row dS_i by as much times P_i, whose sum is 1.
    """
    row_BHT = t.row_sums.ds2 + t.row_sums.forward_dp2 + squared_norm(t.do * t.o)
    heads = (row_BHT * t.squares["q"]).sum(-1) / t.q.shape[-1]
    return BF16_U2 * (over_group(heads, t.dk.shape[1]) + t.squares["dk"].sum(-1))


def value_shift_noise(t: DotProductStep) -> Tensor:
    """E||sum_j dV_j - sum_i dO_i||^2 = u^2 [sum_ij e_ij |do_i|^2 + sum_j |dV_j|^2], e: the error of P in dV."""
    heads = (t.row_sums.backward * t.squares["do"]).sum(-1)
    return BF16_U2 * (over_group(heads, t.dv.shape[1]) + t.squares["dv"].sum(-1))


def qk_gauge_noise(t: DotProductStep) -> Tensor:
    """E|sum q.dq - sum k.dk|^2 = u^2 [sum (q dq)^2 + sum (k dk)^2], over tokens and components."""
    return BF16_U2 * (over_group(_sum_of_squares(t.q * t.dq), t.k.shape[1]) + _sum_of_squares(t.k * t.dk))


def qk_gauge_matrix_noise(t: DotProductStep) -> Tensor:
    """E||Q^T dQ - dK^T K||_F^2 = u^2 [sum_i |q_i|^2 |dq_i|^2 + sum_j |k_j|^2 |dk_j|^2]."""
    query = over_group((t.squares["q"] * t.squares["dq"]).sum(-1), t.k.shape[1])
    return BF16_U2 * (query + (t.squares["k"] * t.squares["dk"]).sum(-1))


def vo_gauge_noise(t: DotProductStep) -> Tensor:
    """E|sum v.dv - sum o.do|^2 = u^2 [sum_ij (e_ij + e'_ij) dP_ij^2 + sum (o do)^2 + sum (v dv)^2].

    e, e': the errors of P in O and in dV.
    """
    heads = (t.row_sums.forward_dp2 + t.row_sums.backward_dp2).sum(-1) + _sum_of_squares(t.o * t.do)
    return BF16_U2 * (over_group(heads, t.v.shape[1]) + _sum_of_squares(t.v * t.dv))


def vo_gauge_matrix_noise(t: DotProductStep) -> Tensor:
    """E||V^T dV - O^T dO||_F^2 = u^2 [sum_i (sum_j (e_ij + e'_ij) |v_j|^2 + |o_i|^2) |do_i|^2 + sum |v_j|^2 |dv_j|^2].

    e, e': the errors of P in O and in dV.
    """
    rows = t.row_sums.forward_v2 + t.row_sums.backward_v2 + t.squares["o"]
    heads = (rows * t.squares["do"]).sum(-1)
    return BF16_U2 * (over_group(heads, t.v.shape[1]) + (t.squares["v"] * t.squares["dv"]).sum(-1))
