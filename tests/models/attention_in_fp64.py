"""Attention a second time: exact in FP64, and in FP64 with the roundings and faults of the storage sites.

Shapes as in ``models.attention``: q, dO (B, H, T, D), k, v (B, G, T, D).
"""

import math

import numpy as np
import torch

from foreshock.models.attention import attention
from foreshock.models.numerics import HEALTHY_LAYER, AttentionNumerics, SiteFault

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


def allowed(T, window=None):
    """(T, T), boolean: query i sees key j."""
    i, j = torch.arange(T)[:, None], torch.arange(T)
    return (j <= i) & (i - j < (T if window is None else window))


def shared(x, H):
    """Each query head's k or v: (B, G, T, D) -> (B, H, T, D)."""
    return x.repeat_interleave(H // x.shape[1], dim=1)


def exact(q, k, v, do, window=None):
    """{o, dq, dk, dv} in FP64: autograd of plain softmax attention."""
    leaves = [x.double().requires_grad_() for x in (q, k, v)]
    H, T, D = q.shape[1:]
    s = torch.einsum("bhid,bhjd->bhij", leaves[0], shared(leaves[1], H)) / math.sqrt(D)
    o = s.masked_fill(~allowed(T, window), -math.inf).softmax(-1) @ shared(leaves[2], H)
    return dict(zip(NAMES, (o.detach(), *torch.autograd.grad(o, leaves, do.double())), strict=True))


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
