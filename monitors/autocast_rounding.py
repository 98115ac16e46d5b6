"""What BF16 or FP16 autocast alone does to the laws of linear layers and logits, from the tensors at hand.

It is told for BF16. For FP16, with its own u, the same holds while a loss scale keeps gradients above the subnormal
numbers, as it is there to do.

``torch.autocast`` rounds x and W to BF16, multiplies these, accumulates in FP32 and rounds the result: y in the
forward, dx and dW in the backward, where dy is BF16 already. As attention's laws hold for the rounded Q, K and V, these
hold exactly for the rounded x and W (``LinearStep`` has them), which the forward and both products of the backward
share. Left are the roundings of results, each an independent error of mean square u^2 x^2 (``monitors.rounding``):

    <W, dW> - <y, dy>                   of dW; of y
    <x, dx> - sum over layers <y, dy>   of each layer's dx, which add up in FP32; of each y
    sum_v dlogit_v                      of each dlogit
    sum_v dW_v - sum_t (sum_v dlogit_tv) x_t    of dW

Nothing is fitted. Over healthy batches the root-mean-square ratio of every law is about 1. The law in W of a layer, one
number a batch, takes the errors of y as independent, which they are not where a column of y varies by less than the
spacing of BF16 over the tokens: an untied head of a large vocabulary that has learnt how frequent a token is, and no
more, errs alike in all of them, and its ratio is several in its first updates. So the law in W has no universal
threshold here either (``analysis.detect.tracks``).

Errors of FP32 are 2^-16 as large and left out. Norms and routers compute and store in FP32 under autocast as well, and
stay with ``monitors.fp32_rounding``. With ``train.micro_batch`` or ``train.watched_sequences`` every micro-batch has
its own products, whose gradients are summed in FP32 afterwards; a law and its prediction are of the tensors of one, the
tapped last.

Shapes: L layers, n sampled tokens, N all tokens, V vocabulary, M width. All predictions are mean squares, in the
squared unit of what is broken; NaN and Inf propagate.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import reduce
from operator import add

import torch
from torch import Tensor

from foreshock.monitors.conservation import squared_norm, squared_norm_fp64
from foreshock.monitors.fp32_rounding import LinearStep

U2 = {torch.bfloat16: 2.0**-14 / 24, torch.float16: 2.0**-20 / 24}
"""Mean square of the relative error of one rounding to BF16 or FP16, over a uniform mantissa."""


def linear_euler_noise(t: LinearStep) -> Tensor:
    """E|<W, dW> - <y, dy>|^2 = u^2 [sum (W dW)^2 + sum over tokens (y dy)^2], (L,), FP64."""
    weights = torch.stack([squared_norm((w * dw).flatten()) for w, dw in zip(t.w, t.dw, strict=True)])
    return U2[t.stored] * (weights.double() + t.total(t.y_dy2).sum(-1))


def linear_input_noise(x_dx: Tensor, readers: Sequence[LinearStep]) -> Tensor:
    """E|<x, dx> - sum over layers of <y, dy>|^2 per token, (L, n), FP64, for layers that read x, none of them experts.

    u^2 sum over layers [sum (x dx)^2 + sum (y dy)^2]. A layer's own dx is not at hand where several read x: there it is
    multiplied once more. x_dx: x times the dx of all of them, (L, n, M).
    """
    if len(readers) == 1:
        x_dxs = [x_dx]
    else:
        x_dxs = [t.x * (t.dy @ torch.cat([w.to(t.dy.dtype) for w in t.w])) for t in readers]
    return U2[readers[0].stored] * (
        reduce(add, map(squared_norm_fp64, x_dxs)) + reduce(add, (t.y_dy2 for t in readers))
    )


def logit_shift_noise(logits: Tensor, dlogits: Tensor, tokens: float, stored: torch.dtype) -> Tensor:
    """E|sum_v dlogit_v|^2 per token, (...,), FP64, where dlogit_v = (p_v - [v = y]) / N in FP32, rounded to BF16.

    u^2 sum over v != y of dlogit_v^2 + e_y^2, e_y: the error of the target's. That one is no random number: near -1/N
    for an unlikely y, it rounds to the same BF16 number in every token that has one. So it is computed from p_y.

    logits, dlogits: (..., V), numbers of ``stored``, BF16 or FP16; tokens: N, over the loss scale where there is one. y
    is where dlogit is least: it alone is negative.
    """
    least, target = dlogits.min(-1, keepdim=True)
    p = (logits.gather(-1, target) - logits.logsumexp(-1, keepdim=True)).double().exp()
    exact = (p - 1) / tokens
    error = exact.to(stored).double() - exact
    others = squared_norm(dlogits).double() - least[..., 0].double().square()
    return U2[stored] * others + error[..., 0].square()


def weight_sum_noise(dw: Tensor, stored: torch.dtype) -> Tensor:
    """E||sum_v dW_v - sum_t (sum_v dlogit_tv) x_t||^2 = u^2 ||dW||^2, 0-dim, FP64; dw: (V, M)."""
    return U2[stored] * squared_norm(dw.flatten()).double()
