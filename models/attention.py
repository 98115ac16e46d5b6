"""Causal multi-head attention with fault sites: what a flash-attention kernel computes, in plain PyTorch.

Shapes: B batch, H heads, T tokens, D d_head. Per batch row and head

    S = Q K^T / sqrt(D)     Pbar = exp(S - max S)    O = Pbar V / rowsum(Pbar)    L = log-sum-exp of S
    P = exp(S - L)          delta = rowsum(dO * O)   dP = dO V^T                  dS = P * (dP - delta)
    dQ = dS K / sqrt(D)     dK = dS^T Q / sqrt(D)    dV = P^T dO

Saved for the backward: Q, K, V, O and L; S and P are recomputed from them (Dao et al.,
arXiv:2205.14135, with one tile a row). What a kernel stores in BF16 is rounded to BF16 here
(``q k v p o do ds dq dk dv``); S, L, dP, delta and every accumulation stay in FP32. As in a kernel,
the row sum takes Pbar before rounding, and dS takes the FP32 P of the register tile while the
product P^T dO takes its BF16 copy.

A site is corrupted by ``LayerNumerics``. A backward fault on ``p`` reaches both of P's uses, because
they read one tile.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import lru_cache, partial

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from models.numerics import HEALTHY_LAYER, LayerNumerics, to_bf16_grid

BACKENDS = ("reference", "sdpa")

LOG2_E = math.log2(math.e)
"""Kernels take exp(x) as exp2(x log2 e); so do we, and on a CPU it is the fast one at -inf."""


@lru_cache(maxsize=8)
def _causal_mask(tokens: int, device: torch.device) -> Tensor:
    """(1, T, T): 0 where a query may look, -inf at later keys."""
    return torch.full((tokens, tokens), -math.inf, device=device).triu_(1).unsqueeze(0)


def _scores(q_BHTD: Tensor, k_BHTD: Tensor, read_s: Callable[[Tensor], Tensor] | None) -> Tensor:
    """S with the causal mask, (B, H, T, T) in FP32.

    ``read_s`` corrupts S before the mask, so that no bit operation can reach a masked score.
    """
    B, H, T, D = q_BHTD.shape
    mask = _causal_mask(T, q_BHTD.device)
    q, k = q_BHTD.reshape(B * H, T, D), k_BHTD.reshape(B * H, T, D)
    scale = 1.0 / math.sqrt(D)
    if read_s is None:
        return torch.baddbmm(mask, q, k.transpose(1, 2), alpha=scale).view(B, H, T, T)
    return read_s((q @ k.transpose(1, 2) * scale).view(B, H, T, T)).add_(mask)


class _FlashAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q_BHTD, k_BHTD, v_BHTD, numerics: LayerNumerics, nonfinite: Tensor):
        q, k, v = to_bf16_grid(q_BHTD), to_bf16_grid(k_BHTD), to_bf16_grid(v_BHTD)

        def read(site, x):
            return numerics.apply(site, "forward", x, nonfinite)

        read_s = partial(read, "s") if numerics.touches("s", "forward") else None
        s = _scores(read("q", q), read("k", k), read_s)
        row_max = s.amax(-1, keepdim=True)
        p_bar = s.sub_(row_max).mul_(LOG2_E).exp2_()
        row_sum = p_bar.sum(-1, keepdim=True)
        o = to_bf16_grid(read("p", to_bf16_grid(p_bar)) @ read("v", v) / row_sum)
        lse = row_max + row_sum.log()

        ctx.save_for_backward(q, k, v, o, lse)
        ctx.numerics, ctx.nonfinite = numerics, nonfinite
        return read("o", o)

    @staticmethod
    @once_differentiable
    def backward(ctx, do_BHTD):
        q, k, v, o, lse = ctx.saved_tensors
        numerics, nonfinite = ctx.numerics, ctx.nonfinite

        def read(site, x):
            return numerics.apply(site, "backward", x, nonfinite)

        scale = 1.0 / math.sqrt(q.shape[-1])
        q, k, v = read("q", q), read("k", k), read("v", v)
        do = read("do", to_bf16_grid(do_BHTD))
        delta = read("delta", (do * read("o", o)).sum(-1, keepdim=True))

        read_s = partial(read, "s") if numerics.touches("s", "backward") else None
        p = _scores(q, k, read_s).sub_(read("lse", lse)).mul_(LOG2_E).exp2_()
        p_bf16 = to_bf16_grid(p)
        p_bf16 = read("p", p_bf16)
        for heads, hits in numerics.reached("p", "backward", p):
            p[:, heads] = p_bf16[:, heads] if hits is None else torch.where(hits, p_bf16[:, heads], p[:, heads])
        dp = read("dp", do @ v.transpose(-1, -2))
        ds = read("ds", to_bf16_grid(dp.sub_(delta).mul_(p)))

        dq = to_bf16_grid((ds @ k).mul_(scale))
        dk = to_bf16_grid((ds.transpose(-1, -2) @ q).mul_(scale))
        dv = to_bf16_grid(p_bf16.transpose(-1, -2) @ do)
        return read("dq", dq), read("dk", dk), read("dv", dv), None, None


def flash_attention(
    q_BHTD: Tensor,
    k_BHTD: Tensor,
    v_BHTD: Tensor,
    numerics: LayerNumerics = HEALTHY_LAYER,
    nonfinite: Tensor | None = None,
) -> Tensor:
    """Causal attention with BF16 storage, FP32 accumulation and the given site faults.

    q, k, v: (B, H, T, D), floating point; rounded to BF16 on entry. Returns O (B, H, T, D) in FP32
    that holds BF16 numbers; so are the gradients that flow back to q, k, v. Differentiable once.
    nonfinite: integer scalar to which the non-finite values that reach an active fault are added.
    NaN and Inf propagate as in a kernel.
    """
    if nonfinite is None:
        nonfinite = torch.zeros((), dtype=torch.int64, device=q_BHTD.device)
    return _FlashAttention.apply(q_BHTD, k_BHTD, v_BHTD, numerics, nonfinite)


def attention(
    q_BHTD: Tensor,
    k_BHTD: Tensor,
    v_BHTD: Tensor,
    *,
    backend: str,
    numerics: LayerNumerics,
    nonfinite: Tensor,
) -> Tensor:
    """Causal attention by the named backend: ``reference`` (fault sites) or ``sdpa`` (fault-free speed)."""
    if backend == "reference":
        return flash_attention(q_BHTD, k_BHTD, v_BHTD, numerics, nonfinite)
    if numerics:
        raise ValueError(f"attention backend {backend!r} has no fault sites: use 'reference'")
    return F.scaled_dot_product_attention(q_BHTD, k_BHTD, v_BHTD, is_causal=True)


class DotProduct(nn.Module):
    """``attention`` as a module without parameters: the place where taps meet q, k, v, o and their gradients."""

    def __init__(self, backend: str) -> None:
        super().__init__()
        self.backend = backend

    @property
    def rounds_to_bf16(self) -> bool:
        """Whether the kernel stores its tensors in BF16; ``sdpa`` takes and returns them as they are, in FP32."""
        return self.backend != "sdpa"

    def forward(
        self, q_BHTD: Tensor, k_BHTD: Tensor, v_BHTD: Tensor, numerics: LayerNumerics, nonfinite: Tensor
    ) -> Tensor:
        return attention(q_BHTD, k_BHTD, v_BHTD, backend=self.backend, numerics=numerics, nonfinite=nonfinite)

    def stored(self, x: Tensor) -> Tensor:
        """x as the kernel receives it."""
        return to_bf16_grid(x) if self.rounds_to_bf16 else x
