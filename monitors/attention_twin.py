"""A twin of an attention kernel: the same dot products computed again, rounded where the kernel rounds.

The twin reads q, k, v and dO alone. Its O, dQ, dK and dV are what a healthy kernel returns, but for the order of FP32
sums, and it keeps what each rounding took away. It is written from the formulas of ``models.attention`` and shares no
code with any kernel, so that an error of a kernel's code is not repeated here. Per batch row and head

    S = Q K^T / sqrt(D)    O = bf16(bf16(exp(S - max S)) V / rowsum)    P = exp(S - log-sum-exp)
    dS = bf16(P * (dO V^T - rowsum(dO * O)))    dQ = bf16(dS K / sqrt(D))
    dK = bf16(dS^T Q / sqrt(D))                 dV = bf16(bf16(P)^T dO)

Shapes: B batch rows, H query heads, G key-value heads, T tokens, D d_head.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import pairwise

import torch
from torch import Tensor

from foreshock.models.numerics import to_bf16_grid
from foreshock.models.visibility import score_mask
from foreshock.monitors.attention_scores import masked_scores
from foreshock.monitors.conservation import over_group, per_query_head, squared_norm
from foreshock.monitors.dot_product import DotProductStep
from foreshock.monitors.fast_exp import fast_exp
from foreshock.monitors.kernel_rounding import KernelRounding

TILE = 64
"""Queries computed at a time where the kernel does not fix it: keys after the last of them are not read."""

LOG2_E = math.log2(math.e)
"""Kernels take exp(x) as exp2(x log2 e); so does the twin, but for a ``fast_exp``."""


@dataclass(frozen=True)
class Twin:
    """What a healthy kernel returns for the q, k, v and dO of a step, and by how much its stored numbers err.

    step: the same q, k, v, dO with the twin's O, dQ, dK and dV.
    ds_row: sum_j dS_ij of each query, (B, H, T), 0 in exact arithmetic: all that is rounded in its row of dS and in its
    O, which reaches dS through rowsum(dO * O).
    p_row: sum_j P_ij - 1 of each query, (B, H, T), of the rounded P that dV takes.
    pv_row: sum_j P_ij v_j - o_i of each query, (B, H, T, D), of the same P and the returned O.
    dq_error, dk_error, dv_error: what rounding, of running sums as well, made of each number, shaped as dq, dk and dv.
    flips: of a kernel with two score gradients, else None (``Flips``).
    floors: whether FP32's errors stand beside these, by bounds; a twin that has measured them has none.
    """

    step: DotProductStep
    ds_row: Tensor
    p_row: Tensor
    pv_row: Tensor
    dq_error: Tensor
    dk_error: Tensor
    dv_error: Tensor
    flips: Flips | None
    floors: bool = True


@dataclass(frozen=True)
class Flips:
    """What two kernels make of one dS: mean squares by which Q^T dQ - dK^T K differ for it, each (B, H).

    The FP32 values that they round differ by a root mean square of h_ij = P_ij a_i, with that of dP_i - delta_i

        a_i^2 = (4/3) 2^-48 [ |dO_i|^2 max_j |v_j|^2 (log2 D + 1) / D + 2 delta_i^2 ]

    (2^-48 / 3 for a number and each level of a sum of D, for dP and P, in either kernel). BF16 numbers near dS_ij lie
    2^-7.5 |dS_ij| apart on a logarithmic mean, so that a difference h changes the rounded entry by that much in a share
    0.8 h / (2^-7.5 |dS_ij|) of entries (0.8 = E|x| of a Gaussian): phi_ij = 0.8 2^-7.5 |dS_ij| h_ij + h_ij^2. Equal
    tokens flip together at most: m_i queries of equal (q_i, dO_i) times n_j keys of equal (k_j, v_j).

    matrix: sum_ij m_i n_j phi_ij |q_i|^2 |k_j|^2 / D; trace: sum_ij m_i n_j phi_ij S_ij^2.
    """

    matrix: Tensor
    trace: Tensor


class _Sum:
    """A running sum over tiles, rounded by ``store`` after every addend or once at the end, and the same unrounded."""

    def __init__(self, like: Tensor, store: Callable[[Tensor], Tensor], every_time: bool) -> None:
        self._store, self._every_time = store, every_time
        self._exact = torch.zeros_like(like)
        self._stored = torch.zeros_like(like) if every_time else self._exact

    def add(self, addend: Tensor, tokens: slice) -> None:
        """Add (..., tokens, D) to these tokens."""
        self._exact[..., tokens, :] += addend
        if self._every_time:
            self._stored[..., tokens, :] = self._store(self._stored[..., tokens, :] + addend)

    def finish(self) -> tuple[Tensor, Tensor]:
        """The stored sum, and what rounding made of it."""
        stored = self._stored if self._every_time else self._store(self._exact)
        return stored, stored - self._exact


def twin_of(t: DotProductStep, rounding: KernelRounding, o: Tensor | None = None) -> Twin:
    """The twin of a step's kernel; o: the O that its backward reads, (B, H, T, D), or None for the twin's own.

    NaN and Inf propagate.
    """
    store = _to_bf16 if rounding.rounds else _unrounded
    exponential = fast_exp if rounding.fast_exp else _exp
    H, T, _ = t.q.shape[-3:]
    G, scale = t.k.shape[-3], t.factor
    k, v = (per_query_head(x, H) for x in (t.k, t.v))
    mask = score_mask(T, t.window, 1, t.q.device, t.q.dtype)
    dq = _Sum(t.q, store, rounding.sum_keys is not None)
    dk, dv = (_Sum(x, store, rounding.sum_queries is not None) for x in (t.k, t.v))
    outputs, rows, flips = [], [], []
    alike = _Alike.of(t, k, v) if rounding.two_score_gradients else None
    at_a_time = rounding.sum_queries or TILE
    for first in range(0, T, at_a_time):
        i = slice(first, min(first + at_a_time, T))
        j = slice(0 if t.window is None else max(0, first + 1 - t.window), i.stop)
        q_i, do_i, k_j, v_j = t.q[..., i, :], t.do[..., i, :], k[..., j, :], v[..., j, :]
        s = masked_scores(q_i, k_j, mask[:, i, j], t.scale)
        o_i, lse = online_softmax(s, v_j, j.start, rounding.forward_keys, exponential, store)
        p = _exp(s - lse)
        p_stored = store(p)
        delta = (do_i * (o_i if o is None else o[..., i, :])).sum(-1, keepdim=True)
        ds = store((do_i @ v_j.mT).sub_(delta).mul_(p))
        if alike is not None:
            flips.append(alike.flips(i, j, s, p, ds, delta))
        for keys in key_tiles(j, rounding.sum_keys):
            dq.add((ds[..., keys.start - j.start : keys.stop - j.start] @ k[..., keys, :]).mul_(scale), i)
        dk.add(over_group(ds.mT @ q_i, G).mul_(scale), j)
        dv.add(over_group(p_stored.mT @ do_i, G), j)
        outputs.append(o_i)
        rows.append((ds.sum(-1, keepdim=True), p_stored.sum(-1, keepdim=True) - 1, p_stored @ v_j - o_i))
    ds_row, p_row, pv_row = (torch.cat(parts, -2) for parts in zip(*rows, strict=True))
    (dq_sum, dq_error), (dk_sum, dk_error), (dv_sum, dv_error) = (x.finish() for x in (dq, dk, dv))
    step = replace(t, o=torch.cat(outputs, -2), dq=dq_sum, dk=dk_sum, dv=dv_sum)
    both = Flips(*(torch.stack(parts).sum(0) for parts in zip(*flips, strict=True))) if flips else None
    return Twin(step, ds_row[..., 0], p_row[..., 0], pv_row, dq_error, dk_error, dv_error, both)


@dataclass(frozen=True)
class _Alike:
    """What ``Flips`` needs of each query and each key, (B, H, T).

    query, key: how many are equal to it, times |q|^2 or |k|^2; queries, keys: the number alone; dp2: the mean square of
    the FP32 error of dP, from |dO_i|^2 and the largest |v_j|^2.
    """

    query: Tensor
    key: Tensor
    queries: Tensor
    keys: Tensor
    dp2: Tensor

    @classmethod
    def of(cls, t: DotProductStep, k: Tensor, v: Tensor) -> _Alike:
        """k, v: of each query head, (B, H, T, D)."""
        queries, keys, D = repeats(t.q, t.do), repeats(k, v), t.q.shape[-1]
        dp2 = squared_norm(t.do) * squared_norm(v).amax(-1, keepdim=True) * (math.log2(D) + 1) / D
        return cls(queries * squared_norm(t.q), keys * squared_norm(k) / t.over_factor_squared, queries, keys, dp2)

    def flips(self, i: slice, j: slice, s: Tensor, p: Tensor, ds: Tensor, delta: Tensor) -> tuple[Tensor, Tensor]:
        """``Flips.matrix`` and ``.trace`` of queries i and keys j."""
        error = (4 / 3 * 2.0**-48 * (self.dp2[..., i, None] + 2 * delta.square())).sqrt() * p
        phi = 0.8 * 2.0**-7.5 * ds.abs() * error + error.square()
        scores = s.masked_fill(s == -math.inf, 0.0).square()
        matrix = (phi @ self.key[..., j, None])[..., 0] * self.query[..., i]
        trace = ((phi * scores) @ self.keys[..., j, None])[..., 0] * self.queries[..., i]
        return matrix.sum(-1), trace.sum(-1)


def repeats(*tensors: Tensor) -> Tensor:
    """How many tokens of a head have the vectors that each of its tokens has, (B, H, T, D) -> (B, H, T), 1 or more.

    Vectors are told apart by a projection in FP64, which two different ones share with a probability of 2^-40 or so.
    """
    marks = 0.0
    for x in tensors:
        weights = torch.linspace(1.0, 2.0, x.shape[-1], dtype=torch.float64, device=x.device).sqrt()
        marks = marks * math.pi + (x.double() * weights).sum(-1)
    tiles = marks.split(TILE, -1)
    return torch.cat([(tile[..., None] == marks[..., None, :]).sum(-1) for tile in tiles], -1).to(tensors[0].dtype)


def _unrounded(x: Tensor) -> Tensor:
    return x


def _to_bf16(x: Tensor) -> Tensor:
    """The nearest BF16 number, in x's own dtype."""
    return to_bf16_grid(x).to(x.dtype)


def key_tiles(j: slice, size: int | None) -> Iterator[slice]:
    """The keys j by blocks that begin at multiples of size, or all at once."""
    bounds = [j.start, *([] if size is None else range((j.start // size + 1) * size, j.stop, size)), j.stop]
    return (slice(*ends) for ends in pairwise(bounds))


def _exp(x: Tensor) -> Tensor:
    """exp(x), in x's memory."""
    return x.mul_(LOG2_E).exp2_()


Elementwise = Callable[[Tensor], Tensor]


def online_softmax(
    s: Tensor, v: Tensor, first: int, keys: int | None, exponential: Elementwise, store: Elementwise
) -> tuple[Tensor, Tensor]:
    """O and the log-sum-exp of scores S (..., queries, keys), whose first key is the sequence's ``first``.

    keys: the size of a key tile, whose Pbar is relative to the largest score up to its end; None for the row's largest.
    """
    top = s.amax(-1, keepdim=True)
    if keys is None or first // keys == (first + s.shape[-1] - 1) // keys:
        p_bar = exponential(s - top)
        total = p_bar.sum(-1, keepdim=True)
        return store(store(p_bar) @ v / total), top + total.log()
    blocks = key_tiles(slice(first, first + s.shape[-1]), keys)
    tiles = [slice(block.start - first, block.stop - first) for block in blocks]
    tops = torch.cat([s[..., tile].amax(-1, keepdim=True) for tile in tiles], -1).cummax(-1).values
    tops = torch.where(tops == -math.inf, top, tops)  # a tile before the window of a row: all of its Pbar is 0
    total, output = 0.0, 0.0
    for tile, so_far in zip(tiles, tops.split(1, -1), strict=True):
        p_bar, rescale = exponential(s[..., tile] - so_far), _exp(so_far - top)
        total = total + p_bar.sum(-1, keepdim=True) * rescale
        output = output + store(p_bar) @ v[..., tile, :] * rescale
    return store(output / total), top + total.log()
