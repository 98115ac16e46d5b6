"""The conservation family: what a network's exact symmetries forbid its gradient to do.

A transformation that leaves the loss unchanged makes the gradient orthogonal to it, exactly, at every step and for
any weights and data. Rounding breaks such a law a little, by an amount that the tensors at hand predict; a broken
kernel breaks it by more, at the very step at which it is broken.

Shapes: B batch rows, H query heads, G key-value heads (H is a multiple of G; H = G without grouping), T tokens,
D d_head. The tensors of one dot product are ``q k v o`` as they enter and leave it, after RoPE and QK-norm, and the
gradients ``dq dk dv do`` of the loss with respect to them. All residuals are relative, without unit, from 0
(kept) up; FP64 networks give about 1e-15. A residual of zeros over zeros is 0, NaN and Inf propagate. Every
residual also exists as its two parts, so that what rounding predicts can replace the scale (``monitors.rounding``
inside attention; outside ``monitors.fp32_rounding`` and, under BF16 autocast, ``monitors.autocast_rounding``). What
FP32 tensors break is below FP32's resolution of the sums that cancel, so outside attention these are taken in FP64.

Source: Noether's theorem for gradients as in Kunin et al., arXiv:2012.04728; the attention laws are derived below.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from foreshock.models.numerics import at_least_fp32

CACHED = 2**17
"""Numbers in a block of a long sum on a CPU: half a megabyte in FP32, one in FP64."""

LAUNCHED = 2**25
"""The same elsewhere, where starting an operation costs more than missing a cache: 128 MiB in FP32."""

Broken = tuple[Tensor, Tensor]
"""By how much a law is broken, 0 or more, and the scale that its residual divides by; one shape."""


Difference = tuple[Tensor, Tensor]
"""What a law of attention leaves, a number, vector or matrix for each batch row and key-value head, (B, G, ...), and
the scale that its residual divides by, (B, G)."""


def relative(broken: Tensor, scale: Tensor) -> Tensor:
    """broken / scale, and 0 where both are 0."""
    return torch.where((broken == 0) & (scale == 0), 0.0, broken / scale)


def size(difference: Tensor) -> Tensor:
    """The norm over all axes but the first two, (B, G, ...) -> (B, G)."""
    if difference.dim() == 2:
        return difference.abs()
    return torch.linalg.vector_norm(difference, dim=tuple(range(2, difference.dim())))


def residual_of(difference: Tensor, scale: Tensor) -> Tensor:
    """A law of attention as a residual, (B, G)."""
    return relative(size(difference), scale)


def over_tokens(residual: Tensor) -> Tensor:
    """The root mean square over everything, 0-dim."""
    return residual.square().mean().sqrt()


def _norm(x: Tensor) -> Tensor:
    return torch.linalg.vector_norm(x, dim=-1)


def _total(x: Tensor) -> Tensor:
    return x.sum((-2, -1))


def squared_norm(x: Tensor) -> Tensor:
    """|x|^2 over the last dimension, in its own precision: u^2 of it may be below FP32's range and needs FP64."""
    return torch.linalg.vector_norm(x, dim=-1).square()


def squared_norm_fp64(x: Tensor) -> Tensor:
    """|x|^2 over the last dimension, in FP64: of a token that the model is sure of, FP32 would lose the squares."""
    return torch.linalg.vector_norm(x, dim=-1, dtype=torch.float64).square()


def over_group(x_BHT: Tensor, n_kv_heads: int) -> Tensor:
    """Sum over the query heads that share a key-value head: (B, H, ...) -> (B, G, ...).

    Query heads of a group are neighbours. Raises ValueError where G does not divide H.
    """
    if x_BHT.shape[1] == n_kv_heads:
        return x_BHT
    if x_BHT.shape[1] % n_kv_heads:
        raise ValueError(f"{x_BHT.shape[1]} query heads cannot share {n_kv_heads} key-value heads evenly")
    return x_BHT.unflatten(1, (n_kv_heads, -1)).sum(2)


def per_query_head(x_BGT: Tensor, n_heads: int) -> Tensor:
    """The key-value head of each query head: (B, G, ...) -> (B, H, ...), the counterpart of ``over_group``."""
    shared = n_heads // x_BGT.shape[1]
    return x_BGT if shared == 1 else x_BGT.repeat_interleave(shared, dim=1)


def key_shift(dk: Tensor) -> Difference:
    """||sum_j dK_j|| / sum_j ||dK_j||, per batch row and key-value head.

    Adding one vector c to every key adds q_i . c / sqrt(D) to a whole row of scores, which softmax ignores. So the
    loss does not change along that shift of K, and its gradient there, sum_j dK_j, is 0. It needs a softmax
    without a sink. A grouped dK already sums over the query heads of its group, each of which obeys the law.

    dk: (B, G, T, D). Returns the vector and the scale.
    """
    return dk.sum(-2), _norm(dk).sum(-1)


def key_shift_residual(dk: Tensor) -> Tensor:
    """``key_shift`` as a residual, (B, G)."""
    return residual_of(*key_shift(dk))


def value_shift(dv: Tensor, do: Tensor) -> Difference:
    """||sum_j dV_j - sum_i dO_i|| / sum_i ||dO_i||, per batch row and key-value head.

    Rows of P sum to 1, so adding c to every value adds c to every output: the derivative of the loss along the
    shift is c . sum_j dV_j and c . sum_i dO_i alike.

    dv: (B, G, T, D); do: (B, H, T, D), summed over each group. Returns the vector and the scale.
    """
    total = over_group(do, dv.shape[1])
    return dv.sum(-2) - total.sum(-2), _norm(total).sum(-1)


def value_shift_residual(dv: Tensor, do: Tensor) -> Tensor:
    """``value_shift`` as a residual, (B, G)."""
    return residual_of(*value_shift(dv, do))


def qk_gauge(q: Tensor, dq: Tensor, k: Tensor, dk: Tensor) -> Difference:
    """|sum q dq - sum k dk| / sum |q dq| over tokens and components, per batch row and key-value head: a trace.

    Q -> aQ, K -> K/a leaves every score as it is; the derivative of the loss at a = 1 is sum q.dq - sum k.dk = 0.

    q, dq: (B, H, T, D); k, dk: (B, G, T, D). Returns the number, with its sign, and the scale.
    """
    q_dq = q * dq
    query, key = over_group(_total(q_dq), k.shape[1]), _total(k * dk)
    return query - key, over_group(_total(q_dq.abs_()), k.shape[1])


def qk_gauge_residual(q: Tensor, dq: Tensor, k: Tensor, dk: Tensor) -> Tensor:
    """``qk_gauge`` as a residual, (B, G)."""
    return residual_of(*qk_gauge(q, dq, k, dk))


def qk_gauge_matrix(q: Tensor, dq: Tensor, k: Tensor, dk: Tensor) -> Difference:
    """||Q^T dQ - (K^T dK)^T||_F / ||Q^T dQ||_F, per batch row and key-value head: the whole D x D law.

    Q -> QA, K -> K A^-T leaves Q K^T as it is for every invertible A; with A = 1 + X, the derivative along X is
    <X, Q^T dQ> - <X^T, K^T dK>, which is 0 for every X. A group's query heads are turned together, so their
    Q^T dQ add up. Shapes as in ``qk_gauge``.
    """
    query = over_group(q.mT @ dq, k.shape[1])
    return query - dk.mT @ k, torch.linalg.matrix_norm(query)


def qk_gauge_matrix_residual(q: Tensor, dq: Tensor, k: Tensor, dk: Tensor) -> Tensor:
    """``qk_gauge_matrix`` as a residual, (B, G)."""
    return residual_of(*qk_gauge_matrix(q, dq, k, dk))


def vo_gauge(v: Tensor, dv: Tensor, o: Tensor, do: Tensor) -> Difference:
    """|sum v dv - sum o do| / sum |o do| over tokens and components, per batch row and key-value head: a trace.

    O is linear in V, so V -> aV makes O -> aO, and the derivative of the loss along it is either sum.

    v, dv: (B, G, T, D); o, do: (B, H, T, D). Returns the number, with its sign, and the scale.
    """
    o_do = o * do
    value, output = _total(v * dv), over_group(_total(o_do), v.shape[1])
    return value - output, over_group(_total(o_do.abs_()), v.shape[1])


def vo_gauge_residual(v: Tensor, dv: Tensor, o: Tensor, do: Tensor) -> Tensor:
    """``vo_gauge`` as a residual, (B, G)."""
    return residual_of(*vo_gauge(v, dv, o, do))


def vo_gauge_matrix(v: Tensor, dv: Tensor, o: Tensor, do: Tensor) -> Difference:
    """||V^T dV - O^T dO||_F / ||O^T dO||_F, per batch row and key-value head: V -> VA makes O -> OA.

    Shapes as in ``vo_gauge``.
    """
    output = over_group(o.mT @ do, v.shape[1])
    return v.mT @ dv - output, torch.linalg.matrix_norm(output)


def vo_gauge_matrix_residual(v: Tensor, dv: Tensor, o: Tensor, do: Tensor) -> Tensor:
    """``vo_gauge_matrix`` as a residual, (B, G)."""
    return residual_of(*vo_gauge_matrix(v, dv, o, do))


def router_shift(dw: Tensor, x: Tensor | None = None, logits: Tensor | None = None, z_coef: float = 0.0) -> Broken:
    """||sum_e dW_R[e]|| / sum_e ||dW_R[e]||, 0-dim.

    One vector added to every expert's router weights adds the same number to all logits of a token, which the
    softmax and with it the gates, the choice of experts and the Switch loss ignore. The z-loss does not: its
    mean lse^2 has the gradient (2/N) lse_t softmax_t in the logits of token t, which sums to (2/N) lse_t over experts;
    so (2 z_coef / N) sum_t lse_t x_t is taken off first. Sigmoid routing has no such law.

    dw: (E, M); with a z-loss also x: (N, M), the router's input, and logits: (N, E). Raises ValueError
    where one is missing.
    """
    total = dw.sum(0, dtype=torch.float64)
    if z_coef:
        if x is None or logits is None:
            raise ValueError(f"z_coef={z_coef}: the z-loss is taken off exactly, from the router's input and logits")
        total = total - 2.0 * z_coef / len(x) * (logits.double().logsumexp(-1) @ x.double())
    return _norm(total), _norm(dw).double().sum()


def router_shift_residual(
    dw: Tensor, x: Tensor | None = None, logits: Tensor | None = None, z_coef: float = 0.0
) -> Tensor:
    """``router_shift`` as a residual, 0-dim."""
    return relative(*router_shift(dw, x, logits, z_coef))


def logit_shift(dlogits: Tensor) -> Broken:
    """||sum_v dlogits_v|| / sum_v ||dlogits_v||, 0-dim: cross-entropy ignores a shift of all logits of a token.

    The same law, on the gradient of an untied head's weight, is ``logit_shift(dW.T)``: a vector added
    to all rows of the head shifts all logits of a token. A tied head is also the embedding and has no such law.

    dlogits: (..., V), tokens first.
    """
    flat_NV = dlogits.flatten(0, -2)
    scale = torch.linalg.vector_norm(flat_NV, dim=0).double().sum()
    return _norm(flat_NV.sum(-1, dtype=torch.float64)), scale


def head_shift(dw: Tensor, x: Tensor, dlogits: Tensor) -> Broken:
    """||sum_v dW_v - sum_t (sum_v dlogits_tv) x_t|| / sum_v ||dW_v||, 0-dim: an untied head's product dW = dlogits^T x.

    ``logit_shift`` of dW where dlogits have been rounded to BF16 and sum to 0 no longer: what they hand on to the
    weight is taken off exactly, as it is of one sign in many tokens and adds up.

    dw: (V, M); x: (..., M), as the product took it; dlogits: (..., V).
    """
    shift_N = dlogits.flatten(0, -2).sum(-1, dtype=torch.float32).double()
    handed_on = shift_N @ x.flatten(0, -2).double()
    return _norm(dw.sum(0, dtype=torch.float64) - handed_on), _norm(dw).double().sum()


def logit_shift_residual(dlogits: Tensor) -> Tensor:
    """``logit_shift`` as a residual, 0-dim."""
    return relative(*logit_shift(dlogits))


def linear_euler(w: Tensor, dw: Tensor, y: Tensor, dy: Tensor) -> Broken:
    """|<W, dW> - sum y dy| / sum |y dy| over tokens and components, 0-dim: Euler's identity of y = W x.

    y is linear in W, so W -> aW makes y -> ay, and the derivative of the loss along it is either sum. It needs a
    layer without bias whose weight is used once (not a tied head), and the gradient of these tokens alone: unscaled,
    before clipping and before it is summed over workers.

    w, dw: (out, in), or one for each expert; y, dy: (..., out). Sums are taken in FP64: in FP32 a row's would err
    alike in every row, by more than the law is broken.
    """
    totals, sizes = zip(*(_sum_and_size(*block) for block in _blocks(y, dy)), strict=True)
    weights = (w.double() * dw.double()).sum()
    return (weights - torch.stack(totals).sum()).abs(), torch.stack(sizes).sum()


def _blocks(y: Tensor, dy: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Both by some tokens at a time, so that their product and its FP64 copy never leave a CPU's cache."""
    tokens = max(1, (CACHED if y.device.type == "cpu" else LAUNCHED) // y.shape[-1])
    return zip(y.flatten(0, -2).split(tokens), dy.flatten(0, -2).split(tokens), strict=True)


def _sum_and_size(y: Tensor, dy: Tensor) -> Broken:
    """sum y dy and sum |y dy|, 0-dim, FP64."""
    products = at_least_fp32(y) * at_least_fp32(dy)
    return products.sum(dtype=torch.float64), products.abs_().sum().double()


def linear_euler_residual(w: Tensor, dw: Tensor, y: Tensor, dy: Tensor) -> Tensor:
    """``linear_euler`` as a residual, 0-dim."""
    return relative(*linear_euler(w, dw, y, dy))


def linear_input(x_dx: Tensor, y_dys: Sequence[Tensor]) -> Broken:
    """|<x, dx> - sum over layers of <y, dy>| / sum |x dx|, per token: Euler's identity in the input.

    The layers y = W x that read x are linear in it too: x -> ax of one token makes every y of that token -> ay, and the
    derivative of the loss along it is <x, dx> and sum <y, dy> alike. dx is the gradient by all layers that
    read x and by nothing else. The law in W does not contain the product dx = W^T dy; this one does.

    x_dx: x * dx, (..., in); y_dys: y * dy of each layer, (..., out). Returns the two, each (...).
    """
    broken = x_dx.double().sum(-1)
    for y_dy in y_dys:
        broken = broken - y_dy.double().sum(-1)
    return broken.abs(), x_dx.abs().sum(-1).double()


def linear_input_residual(x: Tensor, dx: Tensor, outputs: Sequence[Broken]) -> Tensor:
    """``linear_input`` as a residual, the root mean square over tokens, 0-dim. outputs: (y, dy) of each layer."""
    return over_tokens(relative(*linear_input(x * dx, [y * dy for y, dy in outputs])))


def norm_orthogonality(
    x: Tensor, dx: Tensor, y: Tensor, dy: Tensor, *, eps: float, bias: Tensor | None = None, centred: bool
) -> Broken:
    """|<dx, x-mu> - eps/(var+eps) <dy, y-beta>| / (||dx|| ||x-mu||), per token.

    y - beta = gamma (x - mu) / sqrt(var + eps) does not change when x - mu is stretched, but for eps. With
    r = 1/sqrt(var + eps), d(y - beta)/da = (y - beta) eps / (var + eps) at x - mu -> a (x - mu), so
    <dx, x - mu> is that share of <dy, y - beta>. dx must come through this norm alone, not around it.

    x, dx, y, dy: (..., M); bias: beta, or None; centred: LayerNorm (mu and var of x) or RMSNorm (mu = 0, var = mean
    x^2). The terms of one token cancel, so FP32 tensors are to be widened first. Returns the two, each (...).
    """
    x = x - x.mean(-1, keepdim=True) if centred else x
    variance = x.square().mean(-1)
    stretch = (dx * x).sum(-1)
    scaled = (dy * (y if bias is None else y - bias)).sum(-1) * eps / (variance + eps)
    return (stretch - scaled).abs(), _norm(dx) * _norm(x)


def norm_orthogonality_residual(
    x: Tensor, dx: Tensor, y: Tensor, dy: Tensor, *, eps: float, bias: Tensor | None = None, centred: bool
) -> Tensor:
    """``norm_orthogonality`` as a residual, the root mean square over tokens, 0-dim."""
    return over_tokens(relative(*norm_orthogonality(x, dx, y, dy, eps=eps, bias=bias, centred=centred)))


def norm_shift(dx: Tensor) -> Broken:
    """|sum_c dx_c| / (sqrt(M) ||dx||), per token: LayerNorm ignores a shift of x.

    dx: (..., M), through this norm alone. 1 where all of dx lies along the shift. Returns the two, each (...).
    """
    return dx.sum(-1).abs(), dx.shape[-1] ** 0.5 * _norm(dx)


def norm_shift_residual(dx: Tensor) -> Tensor:
    """``norm_shift`` as a residual, the root mean square over tokens, 0-dim."""
    return over_tokens(relative(*norm_shift(dx)))
