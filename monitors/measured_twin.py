"""A twin whose every error is measured in FP64: for kernels that compute in FP32, and for eager attention.

``monitors.attention_twin`` keeps what BF16 storage takes away, beside which FP32 is a floor. Where a kernel stores FP32
there is nothing but FP32's own rounding: of products, of exponentials, of sums. It cannot be foreseen number by number,
since that depends on the order of every sum, but its size can: the twin does the same operations in FP32, in the
kernel's tiles, and each of its results is held against the same sum in FP64. Those errors have the size of the
kernel's, and the mean squares of ``monitors.rounding`` take no more of them.

Two kinds of kernels, per batch row and head, s the scale:

    flash   Pbar = exp(S - max S)   O = Pbar V / rowsum   P = exp(S - log-sum-exp)   dS = P * (dP - rowsum(dO * O))
    eager   P = softmax(S)          O = P V                                          dS = P * (dP - rowsum(P * dP))

dQ = s dS K and dK = s dS^T Q, dV = P^T dO of the stored P. Eager attention stores S, s S, P, O, dP, dS and s dS in the
format of its products: BF16 under autocast. A flash kernel that is given fewer keys than queries adds dK and dV up over
a group's heads, one head after another.

Shapes: B batch rows, H query heads, G key-value heads, R = H / G, T tokens, D d_head. Source: of PyTorch's kernel,
aten/native/cpu/FlashAttentionKernel.cpp.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from foreshock.models.numerics import to_bf16_grid
from foreshock.models.visibility import score_mask
from foreshock.monitors.attention_scores import masked_scores
from foreshock.monitors.attention_twin import Twin, key_tiles, online_softmax
from foreshock.monitors.dot_product import DotProductStep
from foreshock.monitors.fast_exp import fast_exp
from foreshock.monitors.kernel_rounding import KernelRounding

AT_A_TIME = 256
"""Queries computed at a time where the kernel does not fix it: near the terms that a library's product sums at once."""

Store = Callable[[Tensor], Tensor]


def measured_twin(t: DotProductStep, rounding: KernelRounding, o: Tensor | None = None) -> Twin:
    """The twin of a step's kernel, in FP64 numbers that hold what FP32 or BF16 gave.

    t: in FP32; o: the O that a flash kernel's backward reads, None for the twin's own. NaN and Inf propagate.
    """
    H, T, _ = t.q.shape[-3:]
    shared = H // t.k.shape[-3]
    store = _to_bf16 if rounding.rounds else _as_it_is
    q, do = (x.unflatten(-3, (-1, shared)) for x in (t.q, t.do))
    given = None if o is None else o.unflatten(-3, (-1, shared))
    mask = score_mask(T, t.window, 1, t.q.device, t.q.dtype)
    running = store if rounding.sum_queries is not None else _as_it_is
    dk, dv = _Sum(t.k, running), _Sum(t.v, running)
    heads = []
    for head in range(shared):
        tiles = []
        for first in range(0, T, rounding.sum_queries or AT_A_TIME):
            i = slice(first, min(first + (rounding.sum_queries or AT_A_TIME), T))
            j = slice(0 if t.window is None else max(0, first + 1 - t.window), i.stop)
            o_i = None if given is None else given[..., head, i, :]
            queries = _Queries(q[..., head, i, :], do[..., head, i, :], o_i, mask[:, i, j], j)
            tiles.append(_tile(t, queries, rounding, store, (dk, dv)))
        heads.append([torch.cat(parts, 2) for parts in zip(*tiles, strict=True)])
    o_all, dq, dq_error, ds_row, p_row, pv_row = (
        torch.stack(parts, 2).flatten(1, 2) for parts in zip(*heads, strict=True)
    )
    (dk_sum, dk_error), (dv_sum, dv_error) = dk.finish(store), dv.finish(store)
    step = replace(t.double(), o=o_all, dq=dq, dk=dk_sum, dv=dv_sum)
    return Twin(step, ds_row[..., 0], p_row[..., 0], pv_row, dq_error, dk_error, dv_error, None, floors=rounding.rounds)


class _Queries(NamedTuple):
    """Some queries of one head of each group: q, dO and the O that a backward is given, their mask and their keys."""

    q: Tensor
    do: Tensor
    o: Tensor | None
    mask: Tensor
    keys: slice


def _tile(
    t: DotProductStep, queries: _Queries, rounding: KernelRounding, store: Store, sums: tuple[_Sum, _Sum]
) -> tuple[Tensor, ...]:
    """Of these queries O, dQ, its error, and the row sums of ``Twin``, FP64; adds to the sums of dK and dV."""
    q, do, o_given, mask, j = queries
    k, v, scale = t.k[..., j, :], t.v[..., j, :], t.factor
    if rounding.normalised:
        s = store(store(q @ k.mT) * scale) + mask
        p = s.softmax(-1)
        stored = store(p)
        o = store(stored @ v)
        dp = store(do @ v.mT)
        ds = store(store(p * (dp - (p * dp).sum(-1, keepdim=True))) * scale)
    else:
        s = masked_scores(q, k, mask, t.scale)
        o, lse = online_softmax(s, v, j.start, rounding.forward_keys, fast_exp if rounding.fast_exp else _exp, store)
        p = _exp(s - lse)
        stored = store(p)
        delta = (do * (o if o_given is None else o_given)).sum(-1, keepdim=True)
        ds = store((do @ v.mT - delta) * p) * scale
    dq, exact = torch.zeros_like(q), torch.zeros_like(q, dtype=torch.float64)
    for keys in key_tiles(j, rounding.sum_keys):
        own = slice(keys.start - j.start, keys.stop - j.start)
        dq = dq + ds[..., own] @ t.k[..., keys, :]
        dq = store(dq) if rounding.sum_keys is not None else dq
        exact += ds[..., own].double() @ t.k[..., keys, :].double()
    dq = store(dq)
    sums[0].add(ds.mT, q, j)
    sums[1].add(stored.mT, do, j)
    wide = stored.double()
    ds_row = ds.double().sum(-1, keepdim=True) / scale
    p_row, pv_row = wide.sum(-1, keepdim=True) - 1, wide @ v.double() - o.double()
    return o.double(), dq.double(), dq.double() - exact, ds_row, p_row, pv_row


class _Sum:
    """A running sum in FP32, stored after every addend by ``running``, beside the same in FP64."""

    def __init__(self, like: Tensor, running: Store) -> None:
        self._running = running
        self._sum, self._exact = torch.zeros_like(like), torch.zeros_like(like, dtype=torch.float64)

    def add(self, a: Tensor, b: Tensor, tokens: slice) -> None:
        """Add a @ b to these tokens, in the one call that a kernel makes for product and sum."""
        so_far = self._sum[..., tokens, :]
        added = torch.baddbmm(*(x.flatten(0, 1) for x in (so_far, a, b))).view(so_far.shape)
        self._sum[..., tokens, :] = self._running(added)
        self._exact[..., tokens, :] += a.double() @ b.double()

    def finish(self, store: Store) -> tuple[Tensor, Tensor]:
        """The stored sum, and what rounding made of it, FP64."""
        stored = store(self._sum).double()
        return stored, stored - self._exact


def _as_it_is(x: Tensor) -> Tensor:
    return x


def _to_bf16(x: Tensor) -> Tensor:
    return to_bf16_grid(x).to(x.dtype)


def _exp(x: Tensor) -> Tensor:
    return x.exp()
