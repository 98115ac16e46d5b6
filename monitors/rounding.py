"""What rounding alone does to the attention laws of ``monitors.conservation``, from the tensors at hand.

A flash-attention kernel stores its tensors in BF16 and accumulates in FP32. Each law says that a sum over tokens is 0,
so what rounding leaves of it is a sum of errors: one for each query, of all that is rounded in its rows of P, dS and O,
and one for each stored dQ_i, dK_j and dV_j. ``monitors.attention_twin`` computes these errors. To first order a
healthy kernel breaks

    sum_j dK_j                  by  sum_i ds_i q_i / sqrt(D) + sum_j e(dK_j)            ds_i = sum_j dS_ij
    sum_j dV_j - sum_i dO_i     by  sum_i p_i dO_i + sum_j e(dV_j)                      p_i = sum_j P_ij - 1
    Q^T dQ - dK^T K             by  sum_i q_i e(dQ_i)^T - sum_j e(dK_j) k_j^T           both use the same rounded dS
    V^T dV - O^T dO             by  sum_i w_i dO_i^T + sum_j v_j e(dV_j)^T              w_i = sum_j P_ij v_j - o_i

and by the traces of the last two. The prediction is the sum of the squares of the terms: what the square of the sum is
on average if their signs are independent of each other. Nothing is fitted, and nothing is assumed of how mantissas are
spread. Given the sizes of its terms, such a sum passes z times the root of its prediction with probability
2 exp(-z^2 / 2) at most (Hoeffding, for a trace), so one dominant term does no harm.

Signs are not independent where tokens are alike: a padded or repeated token is rounded the same way each time, and the
sum grows with their number, not with its root. Then the twin knows better. Where a law is broken by ALIKE times its
prediction or more, only what the twin does not share counts (``beyond_rounding``).

FP32 errors are 2^-16 as large and matter where BF16 has next to nothing to round. They set two floors: T 2^-24 of each
term, FP32's bound for a sum of T numbers, and the error of dP_i - delta_i, in which everything cancels where all values
are alike (``_score_gradient_floor``).

A kernel with two score gradients (``monitors.kernel_rounding``) rounds an entry of dS near the middle of two BF16
numbers up for dQ and down for dK now and then, in all alike tokens at once: ``flips``.

Shapes as in ``monitors.conservation``: B batch rows, H query heads, G key-value heads, T tokens, D d_head. All
predictions are mean squares, (B, G), in the squared unit of the law's numerator.
"""

from __future__ import annotations

import torch
from torch import Tensor

from foreshock.monitors.attention_twin import Twin
from foreshock.monitors.conservation import over_group, per_query_head, relative, size, squared_norm

FP32_U = 2.0**-24
"""Largest relative error of one rounding to FP32."""

ALIKE = 4.0
"""A law broken by this times its predicted mean square, at a ratio of 2, is held against the twin: two standard
deviations of a trace."""


def beyond_rounding(broken: Tensor, by_twin: Tensor, noise: Tensor) -> Tensor:
    """|broken - s by_twin| / sqrt(noise), (B, G): less what the twin is broken by beyond its noise.

    s is 0 where |broken|^2 is ALIKE times the noise at most, and else 1 - sqrt(noise) / |by_twin|, 0 at least. So a
    healthy kernel stands at 1 where its tokens are alike, and a fault keeps its size over the noise, since the twin
    reads none of what a fault can touch.

    broken, by_twin: what a law leaves of the kernel's and of the twin's tensors, (B, G, ...), any trailing axes; noise:
    the prediction, (B, G). 0 over 0 is 0; NaN and Inf propagate, and a prediction that is Inf gives NaN.
    """
    kernel, twin = size(broken), size(by_twin)
    root = noise.sqrt()
    coherent = (kernel > ALIKE**0.5 * root) & (twin > root)
    share = torch.where(coherent, 1 - root / twin, 0.0)
    beyond = relative(size(broken - share[(..., *[None] * (broken.dim() - 2))] * by_twin), root)
    return torch.where(root.isinf(), torch.nan, beyond)  # any size is 0 of it


def _heads(x_BHT: Tensor, twin: Twin) -> Tensor:
    """The sum over queries and over the query heads of a group, (B, G)."""
    return over_group(x_BHT.sum(-1), twin.step.k.shape[1])


def _floor(twin: Twin, *terms: Tensor) -> Tensor:
    """(T 2^-24)^2 times the sums of squares of terms, each (B, H or G, T), as (B, G)."""
    tokens = twin.step.q.shape[-2] if twin.floors else 0
    return (tokens * FP32_U) ** 2 * sum(_heads(x, twin) for x in terms)


def _score_gradient_floor(twin: Twin) -> Tensor:
    """2^-48 [|dO_i|^2 max_j |v_j|^2 + delta_i^2] |q_i|^2, (B, H, T).

    What FP32 makes of dP_i - delta_i, times |q_i|^2 / D: a partial sum of such a product of D terms is |dO_i| |v_j| at
    most (Cauchy) and errs by 2^-24 of it.
    """
    t = twin.step
    if not twin.floors:
        return torch.zeros_like(squared_norm(t.q))
    largest_v2 = per_query_head(squared_norm(t.v).amax(-1, keepdim=True), t.q.shape[1])
    delta2 = (t.do * t.o).sum(-1).square()
    return FP32_U**2 * (squared_norm(t.do) * largest_v2 + delta2) * squared_norm(t.q)


def key_shift_noise(twin: Twin) -> Tensor:
    """sum_i ds_i^2 |q_i|^2 / D + sum_j |e(dK_j)|^2."""
    t = twin.step
    rows = twin.ds_row.square() * squared_norm(t.q) / t.over_factor_squared + _score_gradient_floor(twin)
    return _heads(rows, twin) + squared_norm(twin.dk_error).sum(-1) + _floor(twin, squared_norm(t.dk))


def value_shift_noise(twin: Twin) -> Tensor:
    """sum_i p_i^2 |dO_i|^2 + sum_j |e(dV_j)|^2."""
    do2 = squared_norm(twin.step.do)
    return _heads(twin.p_row.square() * do2, twin) + squared_norm(twin.dv_error).sum(-1) + _floor(twin, do2)


def qk_gauge_noise(twin: Twin) -> Tensor:
    """sum_i (q_i . e(dQ_i))^2 + sum_j (k_j . e(dK_j))^2, and the flips of two score gradients."""
    t = twin.step
    query, key = ((x * e).sum(-1).square() for x, e in ((t.q, twin.dq_error), (t.k, twin.dk_error)))
    floor = _floor(twin, (t.q * t.dq).sum(-1).square(), (t.k * t.dk).sum(-1).square()) + _gauge_floor(twin)
    return _heads(query, twin) + key.sum(-1) + floor + _flips(twin, "trace")


def qk_gauge_matrix_noise(twin: Twin) -> Tensor:
    """sum_i |q_i|^2 |e(dQ_i)|^2 + sum_j |k_j|^2 |e(dK_j)|^2, and the flips of two score gradients."""
    t = twin.step
    q2, k2 = squared_norm(t.q), squared_norm(t.k)
    query, key = q2 * squared_norm(twin.dq_error), k2 * squared_norm(twin.dk_error)
    floor = _floor(twin, q2 * squared_norm(t.dq), k2 * squared_norm(t.dk)) + _gauge_floor(twin)
    return _heads(query, twin) + key.sum(-1) + floor + _flips(twin, "matrix")


def _gauge_floor(twin: Twin) -> Tensor:
    """The floor of dS where it is multiplied by no larger key than the largest."""
    largest_k2 = squared_norm(twin.step.k).amax(-1)
    return _heads(_score_gradient_floor(twin), twin) * largest_k2


def _flips(twin: Twin, part: str) -> Tensor | float:
    return 0.0 if twin.flips is None else over_group(getattr(twin.flips, part), twin.step.k.shape[1])


def vo_gauge_noise(twin: Twin) -> Tensor:
    """sum_i (w_i . dO_i)^2 + sum_j (v_j . e(dV_j))^2."""
    t = twin.step
    query, key = ((x * e).sum(-1).square() for x, e in ((t.do, twin.pv_row), (t.v, twin.dv_error)))
    floor = _floor(twin, (t.o * t.do).sum(-1).square(), (t.v * t.dv).sum(-1).square())
    return _heads(query, twin) + key.sum(-1) + floor


def vo_gauge_matrix_noise(twin: Twin) -> Tensor:
    """sum_i |w_i|^2 |dO_i|^2 + sum_j |v_j|^2 |e(dV_j)|^2."""
    t = twin.step
    do2, v2 = squared_norm(t.do), squared_norm(t.v)
    query, key = squared_norm(twin.pv_row) * do2, v2 * squared_norm(twin.dv_error)
    floor = _floor(twin, squared_norm(t.o) * do2, v2 * squared_norm(t.dv))
    return _heads(query, twin) + key.sum(-1) + floor
