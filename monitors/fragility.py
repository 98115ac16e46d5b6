"""Numerical fragility of attention: by how much its forward may amplify a rounding error."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from foreshock.monitors.attention_scores import batch_of, scores_of, tapped_inputs
from foreshock.monitors.attention_update import stack_matrix
from foreshock.monitors.base import Masked, Needs, Reading, Signal, StepView
from foreshock.monitors.batch_rows import check_rows, in_turn
from foreshock.monitors.eigen import eigenvalues, eigenvectors, small_singular_values
from foreshock.monitors.spectra import singular_values

BISECTIONS = 40
"""Halvings of an interval no longer than 1: about 1e-12."""


def softmax_jacobian_norm(p: Tensor) -> Tensor:
    """||diag(p) - p p^T||_2 of probabilities p (..., n), FP64 -> (...), in [0, 1/2].

    The eigenvalues solve sum_i p_i^2 / (p_i - x) = 1. The left side grows between two neighbouring p, so the largest
    eigenvalue lies between the second largest p and the largest, and bisection finds it. One p alone gives 0, NaN NaN.
    """
    if p.shape[-1] == 1:
        return p.sum(-1) * 0.0
    high, low = p.topk(2, dim=-1).values.unbind(-1)
    broken = p.sum(-1) * 0.0  # a NaN would lose every comparison below
    squares = p.square()
    for _ in range(BISECTIONS):
        middle = (low + high) / 2
        beyond = (squares / (p - middle[..., None])).nansum(-1) > 1
        low, high = torch.where(beyond, low, middle), torch.where(beyond, middle, high)
    return (low + high) / 2 + broken


def softmax_condition(scores: Tensor) -> Tensor:
    """kappa_softmax = max_i ||J_i||_2 ||S_i|| / ||P_i||, J_i the Jacobian of a row's softmax: (..., T, T) -> (...).

    S_i: the scores that a query sees; -inf for the others. The first row, which sees one key, adds 0.
    """
    p = scores.softmax(-1)
    size = torch.linalg.vector_norm(scores.masked_fill(scores == -math.inf, 0.0), dim=-1)
    return (softmax_jacobian_norm(p) * size / torch.linalg.vector_norm(p, dim=-1)).amax(-1)


def _top(matrix: Tensor) -> Tensor:
    return singular_values(matrix)[..., 0]


def score_condition(q: Tensor, k: Tensor) -> Tensor:
    """kappa_score = ||Q||_2 ||K||_2 / ||Q K^T||_2, (..., T, D) -> (...), at least 1; NaN for a zero Q or K.

    Q K^T has the singular values of A^(1/2) B A^(1/2), D x D, with A = Q^T Q and B = K^T K. Rounding leaves an
    eigenvalue of that product wrong by about n eps ||Q||^2 ||K||^2, n = max(T, D): a larger ratio than 1 / sqrt(n eps),
    8e6 at n = 64 in FP64, is not resolved, that of a Q orthogonal to K among them, and reads as this number.
    """
    value, vector = eigenvectors(_finite(q.mT @ q))
    root = (vector * value.clamp_min(0.0).sqrt()[..., None, :]) @ vector.mT
    product = eigenvalues(_finite(root @ (k.mT @ k) @ root))[..., -1].clamp_min(0.0).sqrt()
    apart = _top(q) * _top(k)
    resolution = math.sqrt(max(q.shape[-2:]) * torch.finfo(q.dtype).eps)
    return apart / torch.maximum(product, resolution * apart)


def value_condition(v: Tensor) -> Tensor:
    """kappa(V) = ||V||_2 ||V^+||_2 = sigma_max / sigma_r, (..., T, D) -> (...), at least 1; NaN for a zero V.

    r is the numerical rank: singular values up to max(T, D) eps sigma_max are rounding of zero and do not count. Equal
    tokens have equal rows of V, in a layer without positions above all, and take rank without amplifying anything.
    """
    values = small_singular_values(v)
    largest = values[..., 0]
    counts = values > max(v.shape[-2:]) * torch.finfo(v.dtype).eps * largest[..., None]
    return largest / torch.where(counts, values, largest[..., None]).amin(-1)


def _finite(symmetric: Tensor) -> Tensor:
    """With zeros for what LAPACK would refuse; the norms beside it stay NaN and so does the result."""
    return torch.where(torch.isfinite(symmetric), symmetric, 0.0)


class AttentionFragility:
    """``attn_fragility``: kappa_softmax (1 + kappa_score) kappa(V) ||W_O||_2, per layer and query head. Bad: up.

    Source: Baek, arXiv:2510.21770, the attention part of its predictor of a layer's low-precision error. What it calls
    row-wise softmax sensitivity, score-scale ratio and value conditioning are taken here as relative condition
    numbers: ``softmax_condition``, ``score_condition`` and ``value_condition``, norms spectral. Deviation: each head
    has its own, with its block of W_O's columns, since one head may collapse alone; the source takes a layer as a
    whole. ``.softmax`` is kappa_softmax by itself, ``.softmax_max`` the largest so far, whose rise is the source's
    early warning. W_O is the one after the update.

    rows: batch rows looked at, in turn, 0 for all; the largest value counts. Finite for any finite Q, K and V: a V of
    lower rank than it could have is taken over the rank that it has. An all-zero Q, K or V leaves a head's product
    masked. NaN gives NaN, and stays in the maximum. In a context of one token softmax amplifies nothing: 0.
    """

    needs = Needs(taps=("dot_product",), roles=("o",), stackable=True)

    def __init__(self, every_steps: int, rows: int) -> None:
        self.rows, self.every_steps = check_rows(rows), every_steps
        self._peak: Tensor | None = None
        self.signals = tuple(
            Signal(f"attn_fragility{suffix}", "1", "up", ("layer", "head"), every_steps, family="model_behavior")
            for suffix in ("", ".softmax", ".softmax_max")
        )

    @torch.no_grad()
    def observe(self, view: StepView) -> dict[str, Reading]:
        taps = view.taps.at("dot_product").values()
        rows = in_turn(self.rows, view.step // self.every_steps, batch_of(taps))
        q, k, v = (x.double() for x in tapped_inputs(taps, rows))
        anatomy = view.anatomy
        w_o = stack_matrix(anatomy.weights(), anatomy, "o").unflatten(-2, (anatomy.heads.query, -1))
        softmax = softmax_condition(scores_of(taps, q, k))
        product = softmax * (1 + score_condition(q, k)) * value_condition(v) * _top(w_o)[:, None]
        empty = ((q == 0).all(-1).all(-1) | (k == 0).all(-1).all(-1) | (v == 0).all(-1).all(-1)).any(1)
        finite = torch.isfinite(q.sum((1, 3, 4)) + k.sum((1, 3, 4)) + v.sum((1, 3, 4)))
        sensitivity = softmax.amax(1)
        self._peak = sensitivity if self._peak is None else torch.maximum(self._peak, sensitivity)
        return {
            "attn_fragility": Masked(product.amax(1), empty & finite),
            "attn_fragility.softmax": sensitivity,
            "attn_fragility.softmax_max": self._peak,
        }

    def state_dict(self) -> dict[str, Any]:
        return {"peak": self._peak}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._peak = state["peak"]
