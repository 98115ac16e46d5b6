"""Spectra of weight updates: entropy, stable rank, and the QK increment from its small core.

Shapes: H heads, D d_head, E d_model; leading dimensions are batched. Everything is computed in FP64.
Singular values come from Gram matrices: an eigenvalue of G G^T carries an error of about 1e-16 of
the largest, and so does its share of the spectrum, which is what the statistics take.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from foreshock.monitors.eigen import eigenvalues
from foreshock.monitors.trailing import on_trailing_axes


def spectral_entropy(singular_values: Tensor, alpha: float = 2.0) -> Tensor:
    """Entropy in nats of a spectrum: H = -sum p ln p with p_i = sigma_i^alpha / sum_j sigma_j^alpha.

    Source: arXiv:2606.28116 eq. 1, where alpha = 2. exp(H) is the effective rank.
    singular_values: (..., r), non-negative, in any order. Returns (...), in [0, ln r].
    An all-zero spectrum has no entropy: NaN. NaN or Inf in a spectrum gives NaN.
    Raises ValueError unless alpha > 0.
    """
    if not alpha > 0:
        raise ValueError(f"alpha={alpha} is not allowed: above 0")
    weight = (singular_values / singular_values.amax(-1, keepdim=True)) ** alpha
    return torch.special.entr(weight / weight.sum(-1, keepdim=True)).sum(-1)


def stable_rank(singular_values: Tensor) -> Tensor:
    """||.||_F^2 / ||.||_2^2 = sum sigma^2 / max sigma^2, in [1, r]. (..., r) -> (...); NaN for zeros."""
    return ((singular_values / singular_values.amax(-1, keepdim=True)) ** 2).sum(-1)


def _root_eigenvalues(gram: Tensor) -> Tensor:
    """Square roots of the eigenvalues of symmetric positive semi-definite matrices, descending.

    A matrix with a NaN or Inf gives NaN (LAPACK would raise).
    """
    broken = ~torch.isfinite(gram).all(-1).all(-1)
    healthy = torch.where(broken[..., None, None], 0.0, gram)
    roots = eigenvalues(healthy).clamp_min(0.0).sqrt().flip(-1)
    return torch.where(broken[..., None], torch.nan, roots)


def singular_values(matrix: Tensor) -> Tensor:
    """Singular values in FP64, descending, from the smaller Gram matrix: (..., m, n) -> (..., min(m, n)).

    Accurate to about 1e-8 of the largest. A matrix with NaN or Inf gives NaN.
    """
    matrix = matrix.double()
    if matrix.shape[-2] > matrix.shape[-1]:
        matrix = matrix.mT
    return _root_eigenvalues(matrix @ matrix.mT)


def _pair_gram(x: Tensor, y: Tensor) -> Tensor:
    """Gram matrix of the rows of x over the rows of y, (..., 2D, 2D), without stacking the long rows."""
    cross = x @ y.mT
    return torch.cat((torch.cat((x @ x.mT, cross), -1), torch.cat((cross.mT, y @ y.mT), -1)), -2)


def _core_singular_values(gram_a: Tensor, gram_b: Tensor, a_rows: Callable[[], Tensor]) -> Tensor:
    """Nonzero singular values of a^T b from the Gram matrices of a and b, each (..., M, M) with M < E.

    With a a^T = L L^T the squares are the eigenvalues of L^T (b b^T) L. Where a matrix is rank-deficient its
    Cholesky factorisation stops, and it takes L^T = R from a^T = Q R instead; ``a_rows`` builds a for that.
    """
    factor, info = torch.linalg.cholesky_ex(gram_a)
    upper, done = factor.mT, info == 0
    if not bool(done.all()):
        upper = torch.where(done[..., None, None], upper, torch.linalg.qr(a_rows().mT, mode="r").R)
    core = upper @ gram_b @ upper.mT
    # A NaN in a reaches its Gram matrix, but LAPACK's QR may swallow it.
    return _root_eigenvalues(core + 0.0 * gram_a.sum((-1, -2), keepdim=True))


def qk_increment(w_q0: Tensor, w_k0: Tensor, w_q1: Tensor, w_k1: Tensor, n_heads: int) -> dict[str, Tensor]:
    """Singular values of the increment of each head's W_Q W_K^T, and of its first and second order.

    With dW = W1 - W0, heads as (E, D) blocks (arXiv:2606.28116 eq. 2 to 5):

        Delta1 = W_Q1 W_K1^T - W_Q0 W_K0^T = [dW_Q, W_Q0][W_K1, dW_K]^T     (no cancellation)
        Delta2 = dW_Q W_K0^T + W_Q0 dW_K^T = [dW_Q, W_Q0][W_K0, dW_K]^T
        Delta3 = dW_Q dW_K^T

    Each comes from a core of 2D (D for Delta3), never from the E x E product; where 2D >= E that
    product is the small core. A small dW does not drown in W's rounding: the factorisations do not mind how
    rows are scaled.

    w_*: ``nn.Linear`` weights (..., n_heads * D, E), before (0) and after (1) the window; better the
    FP32 masters than BF16 copies. Returns ``delta1``, ``delta2`` (..., n_heads, min(2D, E)) and
    ``delta3`` (..., n_heads, D) in FP64, descending. A zero increment gives zeros, NaN or Inf gives NaN.
    Raises ValueError where shapes do not fit.
    """
    shapes = {tuple(w.shape) for w in (w_q0, w_k0, w_q1, w_k1)}
    if len(shapes) != 1:
        raise ValueError(f"the four weights differ in shape: {sorted(shapes)}")
    if n_heads < 1 or w_q0.shape[-2] % n_heads:
        raise ValueError(f"n_heads={n_heads} does not divide the {w_q0.shape[-2]} rows of the weights")
    q0, k0, q1, k1 = (w.double().unflatten(-2, (n_heads, -1)) for w in (w_q0, w_k0, w_q1, w_k1))
    dq, dk = q1 - q0, k1 - k0
    return {
        "delta1": increment_singular_values(q0, dq, k1, dk),
        "delta2": increment_singular_values(q0, dq, k0, dk),
        "delta3": _product_singular_values(dq, dk),
    }


@on_trailing_axes
def _product_singular_values(dq: Tensor, dk: Tensor) -> Tensor:
    """Nonzero singular values of dq^T dk, both (..., D, E)."""
    return _core_singular_values(dq @ dq.mT, dk @ dk.mT, lambda: dq)


@on_trailing_axes
def increment_singular_values(q0: Tensor, dq: Tensor, k: Tensor, dk: Tensor) -> Tensor:
    """Singular values of dq^T k + q0^T dk = [dq, q0]^T [k, dk], from its small core where that is smaller.

    All (..., D, E), FP64; k before the window gives Delta2, k after it Delta1. Returns (..., min(2D, E)), descending.
    """
    if 2 * dq.shape[-2] >= dq.shape[-1]:
        return singular_values(dq.mT @ k + q0.mT @ dk)
    return _core_singular_values(_pair_gram(dq, q0), _pair_gram(k, dk), lambda: torch.cat((dq, q0), -2))
