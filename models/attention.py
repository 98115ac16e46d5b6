"""Causal attention with fault sites: what a flash-attention kernel computes, in plain PyTorch.

Shapes: B batch, H query heads, G key-value heads, T tokens, D d_head. Query head h reads key-value head h // (H/G)
(grouped-query attention, arXiv:2305.13245; G = H is multi-head, G = 1 multi-query attention). Per batch row and head

    S = Q K^T / sqrt(D)     Pbar = exp(S - max S)    O = Pbar V / rowsum(Pbar)    L = log-sum-exp of S
    P = exp(S - L)          delta = rowsum(dO * O)   dP = dO V^T                  dS = P * (dP - delta)
    dQ = dS K / sqrt(D)     dK = dS^T Q / sqrt(D)    dV = P^T dO

where max, softmax and sums run over the keys that a query sees (``models.visibility``). dK and dV of a key-value head
add up over its query heads in FP32 and are rounded once, as by a kernel that loops over a group in registers.

Saved for the backward: Q, K, V, O and L; S and P are recomputed from them (Dao et al.,
arXiv:2205.14135, with one tile a row). What a kernel stores in BF16 is rounded to BF16 here
(``q k v p o do ds dq dk dv``); S, L, dP, delta and every accumulation stay in FP32. As in a kernel,
the row sum takes Pbar before rounding, and dS takes the FP32 P of the register tile while the
product P^T dO takes its BF16 copy.

``models.arithmetic`` has what a kernel of lower precision does in place of this, and what cures it.
A site is corrupted by ``LayerNumerics``. A backward fault on ``p`` reaches both of P's uses, because
they read one tile.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from foreshock.models.arithmetic import product_in_bf16, row_shift
from foreshock.models.flash import flash_attention_triton
from foreshock.models.numerics import HEALTHY_LAYER, LayerNumerics, to_bf16_grid
from foreshock.models.tiles import Tiles
from foreshock.models.visibility import check_shapes, score_mask, shifted_visible_keys, visible_keys
from foreshock.models.wiring import RIGHT

LOG2_E = math.log2(math.e)
"""Kernels take exp(x) as exp2(x log2 e); so do we, and on a CPU it is the fast one at -inf."""


def _by_group(x_BHT: Tensor, kv_heads: int) -> Tensor:
    """(B, H, T, ...) -> (B, G, H/G x T, ...): the queries that share a key-value head, head after head."""
    return x_BHT.reshape(x_BHT.shape[0], kv_heads, -1, x_BHT.shape[-1])


def _masks(query_heads: int, k_BGTD: Tensor, window: int | None, numerics: LayerNumerics) -> tuple[Tensor, Tensor]:
    """What is added to scores: (1 or B x G, H/G x T, T) for groups, and (1 or H, T, T) for heads. Not to be written."""
    B, G, T, _ = k_BGTD.shape
    wiring, device = numerics.wiring, k_BGTD.device
    if not wiring.mask_shift:
        mask = score_mask(T, window, query_heads // G, device)
        return mask, mask[:, :T]
    seen_HTT = shifted_visible_keys(T, window, wiring.mask_shift, wiring.heads, query_heads, device)
    mask_HTT = torch.zeros(seen_HTT.shape, device=device).masked_fill_(~seen_HTT, -math.inf)
    return mask_HTT.view(G, -1, T).repeat(B, 1, 1), mask_HTT


def _scores(
    q_BHTD: Tensor,
    k_BGTD: Tensor,
    window: int | None,
    numerics: LayerNumerics,
    read_s: Callable[[Tensor], Tensor] | None = None,
) -> Tensor:
    """S, -inf where a query may not look, (B, H, T, T) in FP32.

    ``read_s`` corrupts S before the mask, so that no bit operation can reach a masked score.
    """
    B, H, T, D = q_BHTD.shape
    G = k_BGTD.shape[1]
    mask, mask_of_heads = _masks(H, k_BGTD, window, numerics)
    q, k = q_BHTD.reshape(B * G, -1, D), k_BGTD.reshape(B * G, T, D)
    scale = numerics.wiring.scale(D)
    if read_s is None:
        return torch.baddbmm(mask, q, k.transpose(1, 2), alpha=scale).view(B, H, T, T)
    return read_s((q @ k.transpose(1, 2) * scale).view(B, H, T, T)).add_(mask_of_heads)


def _note_wiring(q_BHTD: Tensor, k_BGTD: Tensor, window: int | None, numerics: LayerNumerics) -> None:
    """Tell a log which (query, key) pairs are seen that are not to be, head by head, and what scale and heads are."""
    wiring, (_, H, T, D) = numerics.wiring, q_BHTD.shape
    if wiring.mask_shift and numerics.hears("mask"):
        right, seen = (visible_keys(T, window, q_BHTD.device, ahead).float() for ahead in (0, wiring.mask_shift))
        for _ in range(H) if wiring.heads is None else wiring.heads:
            numerics.note("mask", right, seen)
    if wiring.scalings != RIGHT.scalings:
        numerics.note("scale", torch.tensor(RIGHT.scale(D)), torch.tensor(wiring.scale(D)))
    if wiring.kv_offset:
        heads = torch.arange(k_BGTD.shape[1]).view(1, -1)
        numerics.note("key-value heads", heads, wiring.rewired(heads))


class _FlashAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q_BHTD, k_BGTD, v_BGTD, numerics: LayerNumerics, nonfinite: Tensor, window: int | None):
        q, k, v = to_bf16_grid(q_BHTD), to_bf16_grid(k_BGTD), to_bf16_grid(v_BGTD)
        arithmetic, G = numerics.arithmetic, k.shape[1]

        def read(site, x):
            return numerics.apply(site, "forward", x, nonfinite, window)

        read_s = partial(read, "s") if numerics.touches("s", "forward") else None
        s = _scores(read("q", q), read("k", k), window, numerics, read_s)
        row_max = row_shift(s, arithmetic)
        p_bar = s.sub_(row_max).mul_(LOG2_E).exp2_()
        row_sum = p_bar.sum(-1, keepdim=True)
        p_read, v_read = read("p", to_bf16_grid(p_bar)), read("v", v)
        pv = pv_fp32 = (_by_group(p_read, G) @ v_read).view(q.shape)
        if arithmetic.pv_accumulation == "bf16":
            pv = product_in_bf16(p_read, v_read, arithmetic.pv_block, window)
            numerics.note("pv", pv_fp32, pv, batched=True)
        o = to_bf16_grid(pv / row_sum)
        stored_o = o if arithmetic.stored_o == "bf16" else pv_fp32 / row_sum
        lse = row_max + row_sum.log()

        ctx.save_for_backward(q, k, v, stored_o, lse)
        ctx.numerics, ctx.nonfinite, ctx.window = numerics, nonfinite, window
        return read("o", o)

    @staticmethod
    @once_differentiable
    def backward(ctx, do_BHTD):
        q, k, v, o, lse = ctx.saved_tensors
        numerics, nonfinite, window = ctx.numerics, ctx.nonfinite, ctx.window

        def read(site, x):
            return numerics.apply(site, "backward", x, nonfinite, window)

        B, H, T, D = q.shape
        G, scale = k.shape[1], numerics.wiring.scale(D)
        q, k, v = read("q", q), read("k", k), read("v", v)
        do = read("do", to_bf16_grid(do_BHTD))

        read_s = partial(read, "s") if numerics.touches("s", "backward") else None
        p = _scores(q, k, window, numerics, read_s).sub_(read("lse", lse)).mul_(LOG2_E).exp2_()
        p_bf16 = to_bf16_grid(p)
        p_bf16 = read("p", p_bf16)
        for heads, hits in numerics.reached("p", "backward", p, window):
            p[:, heads] = p_bf16[:, heads] if hits is None else torch.where(hits, p_bf16[:, heads], p[:, heads])
        dp = read("dp", (_by_group(do, G) @ v.transpose(-1, -2)).view(B, H, T, T))
        delta = dp * p if numerics.arithmetic.delta == "p" else do * read("o", o)
        delta = read("delta", delta.sum(-1, keepdim=True))
        ds = read("ds", to_bf16_grid(dp.sub_(delta).mul_(p)))

        # A group's queries stand in one row of length H/G x T, so these two products add up over its heads in FP32.
        ds_GT, do_GT, q_GT, p_GT = (_by_group(x, G) for x in (ds, do, q, p_bf16))
        dq = to_bf16_grid((ds_GT @ k).mul_(scale)).view(q.shape)
        dk = to_bf16_grid((ds_GT.transpose(-1, -2) @ q_GT).mul_(scale))
        dv = to_bf16_grid(p_GT.transpose(-1, -2) @ do_GT)
        return read("dq", dq), read("dk", dk), read("dv", dv), None, None, None


def flash_attention(
    q_BHTD: Tensor,
    k_BGTD: Tensor,
    v_BGTD: Tensor,
    numerics: LayerNumerics = HEALTHY_LAYER,
    nonfinite: Tensor | None = None,
    window: int | None = None,
) -> Tensor:
    """Causal attention with BF16 storage, FP32 accumulation and the given site faults.

    q: (B, H, T, D), k, v: (B, G, T, D) with H a multiple of G, floating point; rounded to BF16 on entry. window: how
    many keys a query sees, its own the last; None for all before it. Returns O (B, H, T, D) in FP32 that holds BF16
    numbers; so are the gradients that flow back to q, k, v. Differentiable once.
    nonfinite: integer scalar to which the non-finite values that reach an active fault are added.
    NaN and Inf propagate as in a kernel. Raises ValueError where G does not divide H or window is below 1.
    """
    check_shapes(q_BHTD, k_BGTD, window)
    if nonfinite is None:
        nonfinite = torch.zeros((), dtype=torch.int64, device=q_BHTD.device)
    return _FlashAttention.apply(q_BHTD, k_BGTD, v_BGTD, numerics, nonfinite, window)


def _sdpa(q_BHTD: Tensor, k_BGTD: Tensor, v_BGTD: Tensor, window: int | None) -> Tensor:
    """PyTorch's own attention, in the inputs' dtype."""
    grouped = q_BHTD.shape[1] != k_BGTD.shape[1]
    T = q_BHTD.shape[2]
    if window is None or window >= T:
        return F.scaled_dot_product_attention(q_BHTD, k_BGTD, v_BGTD, is_causal=True, enable_gqa=grouped)
    seen = visible_keys(T, window, q_BHTD.device)
    return F.scaled_dot_product_attention(q_BHTD, k_BGTD, v_BGTD, attn_mask=seen, enable_gqa=grouped)


def attention(
    q_BHTD: Tensor,
    k_BGTD: Tensor,
    v_BGTD: Tensor,
    *,
    backend: str,
    numerics: LayerNumerics,
    nonfinite: Tensor,
    window: int | None = None,
    tiles: Tiles | None = None,
) -> Tensor:
    """Causal attention by the named backend, a resolved one of ``models.backend``; tiles: of ``triton`` alone.

    Of those with fault sites, O and all gradients hold BF16 numbers, in FP32; of ``triton`` in BF16 where q is.
    """
    if numerics.wiring is not RIGHT and backend != "sdpa":
        _note_wiring(q_BHTD, k_BGTD, window, numerics)
        k_BGTD, v_BGTD = numerics.wiring.rewired(k_BGTD), numerics.wiring.rewired(v_BGTD)
    if backend == "reference":
        return flash_attention(q_BHTD, k_BGTD, v_BGTD, numerics, nonfinite, window)
    if backend == "triton":
        stored = (x.bfloat16() for x in (q_BHTD, k_BGTD, v_BGTD))
        # mypy does not know that there are three
        o_BHTD = flash_attention_triton(*stored, numerics, nonfinite, window, tiles)  # type: ignore[arg-type, call-arg]
        return o_BHTD if q_BHTD.dtype is torch.bfloat16 else o_BHTD.float()  # a copy that autocast would round back
    if numerics:
        raise ValueError(f"attention backend {backend!r} has no fault sites: use 'reference' or 'triton'")
    check_shapes(q_BHTD, k_BGTD, window)
    return _sdpa(q_BHTD, k_BGTD, v_BGTD, window)


class DotProduct(nn.Module):
    """``attention`` as a module without parameters: the place where taps meet q, k, v, o and their gradients.

    window: how many keys a query sees, None for all before it; tiles: of the Triton kernels, None for other backends.
    """

    def __init__(self, backend: str, window: int | None = None, tiles: Tiles | None = None) -> None:
        super().__init__()
        self.backend, self.window, self.tiles = backend, window, tiles

    @property
    def rounds_to_bf16(self) -> bool:
        """Whether the kernel stores its tensors in BF16; ``sdpa`` takes and returns them as they are."""
        return self.backend != "sdpa"

    def forward(
        self, q_BHTD: Tensor, k_BGTD: Tensor, v_BGTD: Tensor, numerics: LayerNumerics, nonfinite: Tensor
    ) -> Tensor:
        return attention(
            q_BHTD,
            k_BGTD,
            v_BGTD,
            backend=self.backend,
            numerics=numerics,
            nonfinite=nonfinite,
            window=self.window,
            tiles=self.tiles,
        )

    def stored(self, x: Tensor) -> Tensor:
        """x as the kernel receives it."""
        return to_bf16_grid(x) if self.rounds_to_bf16 else x
