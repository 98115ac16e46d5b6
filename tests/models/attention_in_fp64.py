"""Attention a second time: exact in FP64, and in FP64 with the roundings and faults of the storage sites.

Shapes as in ``models.attention``: q, dO (B, H, T, D), k, v (B, G, T, D).
"""

import math

import numpy as np
import torch

from foreshock.models.attention import attention
from foreshock.models.numerics import HEALTHY_LAYER, AttentionNumerics, SiteFault
from foreshock.models.wiring import RIGHT
from tests.rounding_bounds import BF16, FP32, gamma

NAMES = ("o", "dq", "dk", "dv")

REACH = {
    # forward: the value that the forward uses; the backward sees its consequences in the saved O and L
    ("q", "forward"): "o dq dk dv",
    ("k", "forward"): "o dq dk dv",
    ("s", "forward"): "o dq dk dv",
    ("p", "forward"): "o dq dk",  # L is clean, so P is: only delta reads the saved O
    ("v", "forward"): "o dq dk",
    ("o", "forward"): "o",  # the saved copy is clean
    # backward
    ("q", "backward"): "dq dk dv",  # through the recomputed S
    ("k", "backward"): "dq dk dv",
    ("s", "backward"): "dq dk dv",
    ("lse", "backward"): "dq dk dv",
    ("p", "backward"): "dq dk dv",
    ("do", "backward"): "dq dk dv",
    ("v", "backward"): "dq dk",  # through dP
    ("dp", "backward"): "dq dk",
    ("o", "backward"): "dq dk",  # through delta
    ("delta", "backward"): "dq dk",
    ("ds", "backward"): "dq dk",
    ("dq", "backward"): "dq",
    ("dk", "backward"): "dk",
    ("dv", "backward"): "dv",
}


def inputs(B=2, H=3, T=33, D=16, G=None, seed=0):
    """q, k, v and dO, holding BF16 numbers in FP32."""
    generator = torch.Generator().manual_seed(seed)
    heads = H, G or H, G or H, H
    return tuple(torch.randn(B, h, T, D, generator=generator).bfloat16().float() for h in heads)


def layer(site, phase, bits, rounding="truncate", heads=None, share=1.0):
    return AttentionNumerics((SiteFault(site, phase, rounding, bits, heads=heads, share=share),)).layer(0)


def run(q, k, v, do, numerics=HEALTHY_LAYER, backend="reference", window=None):
    """{o, dq, dk, dv} of the module under test."""
    leaves = [x.clone().requires_grad_() for x in (q, k, v)]
    o = attention(
        *leaves, backend=backend, numerics=numerics, nonfinite=torch.zeros((), dtype=torch.int64), window=window
    )
    return dict(zip(NAMES, (o.detach(), *torch.autograd.grad(o, leaves, do)), strict=True))


def allowed(T, window=None, ahead=0):
    """(T, T), boolean: query i sees key j. ahead: how many later keys it sees."""
    i, j = torch.arange(T)[:, None], torch.arange(T)
    return (j <= i + ahead) & (i - j < (T if window is None else window))


def shared(x, H):
    """Each query head's k or v: (B, G, T, D) -> (B, H, T, D)."""
    return x.repeat_interleave(H // x.shape[1], dim=1)


def keys_and_masks(q, k, window, wiring):
    """Which key-value head each query head reads, and which keys its queries see, (H, T, T)."""
    (H, T), G = q.shape[1:3], k.shape[1]
    heads = [(h // (H // G) + wiring.kv_offset) % G for h in range(H)]
    ahead = [wiring.mask_shift if wiring.heads is None or h in wiring.heads else 0 for h in range(H)]
    return heads, torch.stack([allowed(T, window, keys) for keys in ahead])


def exact(q, k, v, do, window=None, wiring=RIGHT):
    """{o, dq, dk, dv} in FP64: autograd of plain softmax attention, wired as said."""
    leaves = [x.double().requires_grad_() for x in (q, k, v)]
    heads, seen = keys_and_masks(q, k, window, wiring)
    s = leaves[0] @ leaves[1][:, heads].mT / math.sqrt(q.shape[-1]) ** wiring.scalings
    o = s.masked_fill(~seen, -math.inf).softmax(-1) @ leaves[2][:, heads]
    return dict(zip(NAMES, (o.detach(), *torch.autograd.grad(o, leaves, do.double())), strict=True))


def error_bounds(q, k, v, do, window=None, wiring=RIGHT):
    """How far each number of {o, l, dq, dk, dv} may lie from the exact one, for a kernel that stores what ours stores.

    To first order, with u the unit roundoff of BF16, g = gamma_n of FP32 over the longest sum, e = gamma_D |Q| |K|^T
    the error of a score, at most E in a row, |P| |V| the magnitudes that O adds up, and likewise below:

        |O error|     <= (2 u + 2 E + 4 g) P |V|                     Pbar and O are rounded
        |L error|     <= E + g (1 + |L|)
        |P error|     <= (2 E + g (2 + |L|)) P
        |delta error| <= |dO| |O error| + g |dO| |O|
        |dS error|    <= P (|delta error| + g |dO| |V|^T) + (u + 2 E + g (2 + |L|)) (P |dP - delta|)
        |dQ error|    <= |dS error| |K| scale + (u + g) |dS| |K| scale,   |dK error| likewise
        |dV error|    <= ((2 u + 2 E + g (3 + |L|)) P)^T |dO|

    and a tenth more for all products of errors.
    """
    q, k, v, do = (x.double() for x in (q, k, v, do))
    (H, T, D), G = q.shape[1:], k.shape[1]
    heads, seen = keys_and_masks(q, k, window, wiring)
    keys, values, scale = k[:, heads], v[:, heads], 1 / math.sqrt(D) ** wiring.scalings
    s = (q @ keys.mT * scale).masked_fill(~seen, -math.inf)
    lse, p, g = s.logsumexp(-1, keepdim=True), s.softmax(-1), gamma(T + D + 8, FP32)
    e = (gamma(D + 2, FP32) * (q.abs() @ keys.abs().mT) * scale).masked_fill(~seen, 0).amax(-1, keepdim=True)
    of_p = 2 * e + g * (2 + lse.abs())
    o, dp = p @ values, do @ values.mT
    o_error = (2 * BF16 + 2 * e + 4 * g) * (p @ values.abs())
    delta = (do * o).sum(-1, keepdim=True)
    delta_error = (do.abs() * (o_error + g * o.abs())).sum(-1, keepdim=True)
    ds = p * (dp - delta)
    ds_error = p * (delta_error + g * (do.abs() @ values.abs().mT)) + (BF16 + of_p) * ds.abs()
    dq_error = (ds_error + (BF16 + g) * ds.abs()) @ keys.abs() * scale

    def of_group(x):
        return torch.stack([x[:, [h for h in range(H) if heads[h] == one]].sum(1) for one in range(G)], 1)

    dk_error = of_group((ds_error + (BF16 + g) * ds.abs()).mT @ q.abs() * scale)
    dv_error = of_group(((2 * BF16 + of_p + g) * p).mT @ do.abs())
    errors = {"o": o_error, "l": e + g * (1 + lse.abs()), "dq": dq_error, "dk": dk_error, "dv": dv_error}
    return {name: 1.1 * error for name, error in errors.items()}


def grid(x):
    return x.float().bfloat16().double()


def emulate(q, k, v, do, fault=None, window=None, heads=None):
    """{o, dq, dk, dv} from the equations in FP64, rounded at the BF16 storage sites.

    fault: (site, phase, bits) to truncate, by arithmetic on the 16-bit integers, or None; heads: of the site's own
    tensor, None for all. dK and dV add up over a group's query heads before they are rounded.
    """
    q, k, v, do = (x.double() for x in (q, k, v, do))
    H, T, D = q.shape[1:]
    G, past = k.shape[1], allowed(T, window)

    def at(site, phase, x):
        if fault is None or (site, phase) != fault[:2]:
            return x
        raw = x.float().bfloat16().view(torch.int16).numpy().view(np.uint16)
        cleared = raw // np.uint16(2 ** fault[2]) * np.uint16(2 ** fault[2])
        faulty = torch.from_numpy(cleared.view(np.int16)).view(torch.bfloat16).double()
        chosen = torch.zeros(x.shape[1], dtype=torch.bool)
        chosen[slice(None) if heads is None else list(heads)] = True
        return torch.where(chosen.view(-1, *[1] * (x.ndim - 2)), faulty, x)

    def scores(q, k, phase):
        return at("s", phase, torch.einsum("bhid,bhjd->bhij", q, shared(k, H)) / math.sqrt(D))

    s = scores(at("q", "forward", q), at("k", "forward", k), "forward").masked_fill(~past, -math.inf)
    row_max = s.amax(-1, keepdim=True)
    p_bar = torch.exp(s - row_max)
    o = grid(at("p", "forward", grid(p_bar)) @ shared(at("v", "forward", v), H) / p_bar.sum(-1, keepdim=True))
    lse = torch.logsumexp(s, -1, keepdim=True)
    returned = at("o", "forward", o)

    q, k, v, do = (at(site, "backward", x) for site, x in (("q", q), ("k", k), ("v", v), ("do", do)))
    p = torch.exp(scores(q, k, "backward") - at("lse", "backward", lse)) * past
    stored_p = at("p", "backward", grid(p))
    if fault is not None and fault[:2] == ("p", "backward"):
        hit = [h for h in range(H) if heads is None or h in heads]
        p[:, hit] = stored_p[:, hit]
    delta = at("delta", "backward", (do * at("o", "backward", o)).sum(-1, keepdim=True))
    dp = at("dp", "backward", torch.einsum("bhid,bhjd->bhij", do, shared(v, H)))
    ds = at("ds", "backward", grid(p * (dp - delta)))
    dq = at("dq", "backward", grid(ds @ shared(k, H) / math.sqrt(D)))
    dk = at("dk", "backward", grid((ds.mT @ q).unflatten(1, (G, -1)).sum(2) / math.sqrt(D)))
    dv = at("dv", "backward", grid((stored_p.mT @ do).unflatten(1, (G, -1)).sum(2)))
    return dict(zip(NAMES, (returned, dq, dk, dv), strict=True))


def distance(a, b):
    """Relative to b, in the Frobenius norm."""
    return ((a.double() - b.double()).norm() / b.double().norm()).item()
