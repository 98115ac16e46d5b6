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

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields
from functools import cached_property

import torch
from torch import Tensor

from models.numerics import at_least_fp32
from models.taps import Tap
from monitors.conservation import over_group

OVER_NOISE = "over_noise"
"""Ends the name of a signal that divides what is broken of a law by what rounding alone predicts."""

BF16_U2 = 2.0**-14 / 24
"""Mean square of the relative error of one rounding to BF16."""


@dataclass(frozen=True)
class DotProductStep:
    """The tensors of one layer's dot product in one step, and the sums over a row of P that the predictions need.

    q, o, dq, do: (B, H, T, D); k, v, dk, dv: (B, G, T, D), FP32, as the kernel receives and returns them.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    o: Tensor
    dq: Tensor
    dk: Tensor
    dv: Tensor
    do: Tensor

    @classmethod
    def of(cls, tap: Tap, rows: slice = slice(None)) -> DotProductStep:
        """From a tap on a dot product, for some batch rows."""
        stored = tap.module.stored
        q, k, v = (stored(x[rows]) for x in tap.inputs)
        dq, dk, dv = (tap.input_grads[index][rows] for index in range(3))
        step = (q, k, v, tap.output[rows], dq, dk, dv, stored(tap.output_grad[rows]))
        return cls(*(at_least_fp32(x) for x in step))

    @classmethod
    def join(cls, steps: Sequence[DotProductStep]) -> DotProductStep:
        """Several layers as one: their batch rows after one another."""
        return cls(*(torch.cat([getattr(step, part.name) for step in steps]) for part in fields(cls)))

    @cached_property
    def row_sums(self) -> RowSums:
        """Of the recomputed P and dP: the one part that costs T x T."""
        B, H, T, D = self.q.shape
        k, v = (per_query_head(x, H).flatten(0, 1) for x in (self.k, self.v))
        q, do = self.q.flatten(0, 1), self.do.flatten(0, 1)
        mask = torch.full((1, T, T), -math.inf, device=q.device, dtype=q.dtype).triu_(1)
        p = torch.baddbmm(mask, q, k.mT, alpha=1 / math.sqrt(D)).softmax(-1)
        dp = do @ v.mT
        largest, where = p.max(-1, keepdim=True)
        v2 = v.square().sum(-1, keepdim=True)
        top = largest.square()
        top_dp2, top_v2 = top * dp.gather(-1, where).square(), top * v2.gather(1, where)
        weighted = p.square() @ torch.cat((torch.ones_like(v2), v2, v), -1)
        p2, p2_v2, p2_v = weighted.split((1, 1, D), -1)
        p2_dp2 = torch.linalg.vector_norm(dp.mul_(p), dim=-1, keepdim=True).square()
        delta = (do * self.o.flatten(0, 1)).sum(-1, keepdim=True)
        p2_dp = (p2_v * do).sum(-1, keepdim=True)
        ds2 = (p2_dp2 - 2 * delta * p2_dp + delta.square() * p2).clamp(min=0)
        twice_rounded = largest < 1  # P = 1 is exact in the backward as well
        found = (
            ds2,
            p2_dp2 - top_dp2,
            p2_v2 - top_v2,
            p2 * twice_rounded,
            p2_dp2 * twice_rounded,
            p2_v2 * twice_rounded,
        )
        return RowSums(*(x.clamp(min=0).view(B, H, T) for x in found))


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


def per_query_head(x_BGTD: Tensor, n_heads: int) -> Tensor:
    shared = n_heads // x_BGTD.shape[1]
    return x_BGTD if shared == 1 else x_BGTD.repeat_interleave(shared, dim=1)


def _sum(x: Tensor) -> Tensor:
    return x.sum((-2, -1))


def _square(x: Tensor) -> Tensor:
    return x.square().sum(-1)


def key_shift_noise(t: DotProductStep) -> Tensor:
    """E||sum_j dK_j||^2 = u^2 [sum_i (sum_j dS_ij^2 + e_ij dP_ij^2 + |do_i * o_i|^2) |q_i|^2 / D + sum_j |dK_j|^2].

    e: the error of P in O. An error of delta_i moves the row dS_i by as much times P_i, whose sum is 1.
    """
    row_BHT = t.row_sums.ds2 + t.row_sums.forward_dp2 + _square(t.do * t.o)
    heads = (row_BHT * _square(t.q)).sum(-1) / t.q.shape[-1]
    return BF16_U2 * (over_group(heads, t.dk.shape[1]) + _sum(t.dk.square()))


def value_shift_noise(t: DotProductStep) -> Tensor:
    """E||sum_j dV_j - sum_i dO_i||^2 = u^2 [sum_ij e_ij |do_i|^2 + sum_j |dV_j|^2], e: the error of P in dV."""
    heads = (t.row_sums.backward * _square(t.do)).sum(-1)
    return BF16_U2 * (over_group(heads, t.dv.shape[1]) + _sum(t.dv.square()))


def qk_gauge_noise(t: DotProductStep) -> Tensor:
    """E|sum q.dq - sum k.dk|^2 = u^2 [sum (q dq)^2 + sum (k dk)^2], over tokens and components."""
    return BF16_U2 * (over_group(_sum((t.q * t.dq).square()), t.k.shape[1]) + _sum((t.k * t.dk).square()))


def qk_gauge_matrix_noise(t: DotProductStep) -> Tensor:
    """E||Q^T dQ - dK^T K||_F^2 = u^2 [sum_i |q_i|^2 |dq_i|^2 + sum_j |k_j|^2 |dk_j|^2]."""
    query = over_group((_square(t.q) * _square(t.dq)).sum(-1), t.k.shape[1])
    return BF16_U2 * (query + (_square(t.k) * _square(t.dk)).sum(-1))


def vo_gauge_noise(t: DotProductStep) -> Tensor:
    """E|sum v.dv - sum o.do|^2 = u^2 [sum_ij (e_ij + e'_ij) dP_ij^2 + sum (o do)^2 + sum (v dv)^2].

    e, e': the errors of P in O and in dV.
    """
    heads = (t.row_sums.forward_dp2 + t.row_sums.backward_dp2).sum(-1) + _sum((t.o * t.do).square())
    return BF16_U2 * (over_group(heads, t.v.shape[1]) + _sum((t.v * t.dv).square()))


def vo_gauge_matrix_noise(t: DotProductStep) -> Tensor:
    """E||V^T dV - O^T dO||_F^2 = u^2 [sum_i (sum_j (e_ij + e'_ij) |v_j|^2 + |o_i|^2) |do_i|^2 + sum |v_j|^2 |dv_j|^2].

    e, e': the errors of P in O and in dV.
    """
    rows = t.row_sums.forward_v2 + t.row_sums.backward_v2 + _square(t.o)
    heads = (rows * _square(t.do)).sum(-1)
    return BF16_U2 * (over_group(heads, t.v.shape[1]) + (_square(t.v) * _square(t.dv)).sum(-1))
