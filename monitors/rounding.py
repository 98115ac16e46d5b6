"""What rounding alone does to the attention laws of ``monitors.conservation``, from the tensors at hand.

A flash-attention kernel stores its tensors in BF16 and accumulates in FP32. Every stored number x carries an error
that is independent of all others, of mean 0 and mean square u^2 x^2. A number in [2^e, 2^(e+1)) is rounded to a
multiple of 2^(e-7), an error of mean square 2^(2e-14) / 12; over a uniform mantissa 2^(2e) / x^2 averages 1/2, so
u^2 = 2^-14 / 24. To first order a law's residual is linear in those errors, so its mean square is a sum over
them, written out below for each law. Nothing is fitted: on healthy BF16 kernels the root-mean-square residual over
this prediction is 1, from the first step to the last, at any learning rate.

Which errors reach a law (an overbar marks what the kernel stores in BF16; P is rounded once for O in the forward, as
exp(S - max S), where the largest entry of a row is 1 and exact, and once, as P, for dV in the backward):

    sum_j dK_j       rounding of dS; of O and of forward P, through delta = dO.O; of dK
    sum_j dV_j       rounding of backward P; of dV
    q.dq - k.dk      rounding of dQ; of dK. Both use the same rounded dS, so its error cancels
    v.dv - o.do      rounding of backward P; of dV; of forward P; of O

Q, K, V and dO are rounded before the kernel, and all laws hold exactly for the rounded ones. FP32 errors are 2^-16 as
large and left out.

Shapes as in ``monitors.conservation``: B batch rows, H query heads, G key-value heads, T tokens, D d_head. All
predictions are mean squares, (B, G), in the squared unit of the law's numerator.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from models.taps import Tap
from monitors.conservation import over_group

BF16_U2 = 2.0**-14 / 24
"""Mean square of the relative error of one rounding to BF16."""


@dataclass(frozen=True)
class DotProductStep:
    """The tensors of one layer's dot product in one step, and what the backward recomputes from them.

    q, o, dq, do: (B, H, T, D); k, v, dk, dv: (B, G, T, D), FP32, as the kernel receives and returns them. p, dp and ds,
    and where a row of P has its largest entry, are (B, H, T, T), in FP32, computed when first asked for.
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
        q, k, v = (tap.module.stored(x[rows]) for x in tap.inputs)
        dq, dk, dv = (tap.input_grads[index][rows] for index in range(3))
        return cls(q, k, v, tap.output[rows], dq, dk, dv, tap.module.stored(tap.output_grad[rows]))

    def per_query_head(self, x_BGTD: Tensor) -> Tensor:
        shared = self.q.shape[1] // x_BGTD.shape[1]
        return x_BGTD if shared == 1 else x_BGTD.repeat_interleave(shared, dim=1)

    @cached_property
    def _scores(self) -> Tensor:
        T, D = self.q.shape[-2:]
        later = torch.ones(T, T, dtype=torch.bool, device=self.q.device).triu_(1)
        return (self.q @ self.per_query_head(self.k).mT).div_(math.sqrt(D)).masked_fill_(later, -math.inf)

    @cached_property
    def p(self) -> Tensor:
        return self._scores.softmax(-1)

    @cached_property
    def dp(self) -> Tensor:
        return self.do @ self.per_query_head(self.v).mT

    @cached_property
    def ds(self) -> Tensor:
        return self.p * (self.dp - (self.p * self.dp).sum(-1, keepdim=True))

    @cached_property
    def forward_error(self) -> Tensor:
        """Mean square error of each P in O, over u^2: P^2, but 0 at the largest of a row, stored as 1 exactly."""
        return self.p.square().masked_fill(self._scores == self._scores.amax(-1, keepdim=True), 0.0)

    @cached_property
    def backward_error(self) -> Tensor:
        """Mean square error of each P in dV, over u^2: P^2, but 0 where P is 1 exactly."""
        return self.p.square().masked_fill(self.p == 1.0, 0.0)


def _sum(x: Tensor) -> Tensor:
    return x.sum((-2, -1))


def _square(x: Tensor) -> Tensor:
    return x.square().sum(-1)


def key_shift_noise(t: DotProductStep) -> Tensor:
    """E||sum_j dK_j||^2 = u^2 [sum_i (sum_j dS_ij^2 + sum_c do_ic^2 o_ic^2 + sum_j e_ij dP_ij^2) |q_i|^2 / D + sum_j |dK_j|^2].

    e: ``forward_error``. An error in delta_i moves the whole row dS_i by -delta's error times P_i, whose sum is 1.
    """
    row_BHT = _square(t.ds) + (t.do * t.o).square().sum(-1) + (t.forward_error * t.dp.square()).sum(-1)
    heads = (row_BHT * _square(t.q)).sum(-1) / t.q.shape[-1]
    G = t.dk.shape[1]
    return BF16_U2 * (over_group(heads, G) + _sum(t.dk.square()))


def value_shift_noise(t: DotProductStep) -> Tensor:
    """E||sum_j dV_j - sum_i dO_i||^2 = u^2 [sum_ij e_ij |do_i|^2 + sum_j |dV_j|^2], e: ``backward_error``."""
    heads = (t.backward_error.sum(-1) * _square(t.do)).sum(-1)
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

    e, e': the errors of P in the forward and in the backward.
    """
    heads = _sum((t.forward_error + t.backward_error) * t.dp.square()) + _sum((t.o * t.do).square())
    return BF16_U2 * (over_group(heads, t.v.shape[1]) + _sum((t.v * t.dv).square()))


def vo_gauge_matrix_noise(t: DotProductStep) -> Tensor:
    """E||V^T dV - O^T dO||_F^2 = u^2 [sum_ij (e_ij + e'_ij) |v_j|^2 |do_i|^2 + sum_i |o_i|^2 |do_i|^2 + sum_j |v_j|^2 |dv_j|^2]."""
    v_BHT = _square(t.per_query_head(t.v))
    weights = ((t.forward_error + t.backward_error) @ v_BHT.unsqueeze(-1)).squeeze(-1)
    heads = ((weights + _square(t.o)) * _square(t.do)).sum(-1)
    return BF16_U2 * (over_group(heads, t.v.shape[1]) + (_square(t.v) * _square(t.dv)).sum(-1))
