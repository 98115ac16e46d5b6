"""Whether the Triton attention is right on a device: against the reference there, against FP64, and with itself.

Each check returns ``ok`` and the numbers that it judged by. Shapes as in ``models.attention``; every tensor is compared
in the Frobenius norm, relative to what it should be. Needs ``models/`` alone, so that it runs on a machine with
torch, triton and numpy.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from foreshock.models.arithmetic import Arithmetic
from foreshock.models.attention import attention
from foreshock.models.bits import ROUNDINGS
from foreshock.models.numerics import (
    FORWARD_SITES,
    HEALTHY_LAYER,
    KEY_VALUE_SITES,
    SITES,
    AttentionNumerics,
    LayerNumerics,
    SiteFault,
)
from foreshock.models.tiles import Tiles, pinned_tiles
from foreshock.models.visibility import shifted_visible_keys
from foreshock.models.wiring import RIGHT, Wiring

NAMES = ("o", "dq", "dk", "dv")
Check = Callable[[], dict[str, Any]]

WORST_ERROR = 2.0**-7
"""Of any output against FP64: a single rounding to BF16 errs by 2^-9 at most, and a few of them meet."""

WORST_RATIO = 1.5
"""Of the kernel's error to the reference's: both round the same tensors, relative to another maximum."""

UNORDERED = 2.0**-11
"""How far two sums may lie apart that are added up in FP32 in another order, and then rounded to BF16: 2^-14 is usual
over 4,096 keys, and one truncated bit moves them by 2^-8."""

WORST_SHARE = 0.1
"""Of a fault's effect, that kernel and reference may differ by."""


@dataclass(frozen=True)
class Shape:
    """Sizes of an attention; window: None for all earlier keys."""

    heads: int
    kv_heads: int
    window: int | None
    tokens: int
    d_head: int
    batch: int = 1


SHAPES = (
    Shape(2, 2, None, 33, 16, batch=3),
    Shape(4, 2, 7, 211, 24),
    Shape(3, 1, 64, 300, 32),
    Shape(2, 2, None, 1025, 64),
    Shape(2, 1, 100, 257, 80),
    Shape(6, 2, None, 191, 96),
    Shape(4, 4, None, 4097, 128),
    Shape(4, 1, 333, 777, 128),
    Shape(2, 1, None, 129, 200),
    Shape(2, 2, 65, 130, 256),
)

WIRINGS = (
    (Wiring(mask_shift=1), Shape(4, 2, 7, 211, 24)),
    (Wiring(mask_shift=100, heads=(1,), scalings=2), Shape(2, 1, None, 1025, 64)),
    (Wiring(mask_shift=776), Shape(4, 1, 333, 777, 128)),
)
"""Masks that are shifted by a key, by more than a tile, and by all keys."""

ARITHMETICS = (
    Arithmetic("bf16"),
    Arithmetic("bf16", 64, stored_o="fp32"),
    Arithmetic("bf16", delta="p"),
    Arithmetic("bf16", row_max="dynamic", beta=2.0),
    Arithmetic("bf16", row_max="offset", offset=0.3),
)


def inputs(shape: Shape, device: torch.device) -> tuple[Tensor, ...]:
    """q, k, v and dO in FP32 that hold BF16 numbers, the same on every device."""
    generator = torch.Generator().manual_seed(0)
    heads = shape.heads, shape.kv_heads, shape.kv_heads, shape.heads
    sizes = [(shape.batch, count, shape.tokens, shape.d_head) for count in heads]
    return tuple(torch.randn(size, generator=generator).bfloat16().float().to(device) for size in sizes)


def outputs(
    x: tuple[Tensor, ...], backend: str, window: int | None, tiles: Tiles, numerics: LayerNumerics = HEALTHY_LAYER
) -> dict[str, Tensor]:
    """O, dQ, dK and dV, and as ``nonfinite`` how many non-finite values reached a fault."""
    leaves, nonfinite = (
        [t.clone().requires_grad_() for t in x[:3]],
        torch.zeros((), dtype=torch.int64, device=x[0].device),
    )
    o = attention(*leaves, backend=backend, numerics=numerics, nonfinite=nonfinite, window=window, tiles=tiles)
    gradients = torch.autograd.grad(o, leaves, x[3])
    return dict(zip(NAMES, (o.detach(), *gradients), strict=True)) | {"nonfinite": nonfinite}


def exact(x: tuple[Tensor, ...], window: int | None, wiring: Wiring = RIGHT) -> dict[str, Tensor]:
    """O and its gradients in FP64, by autograd of plain softmax attention with the wiring's mask and scale."""
    q, k, v = (t.double().requires_grad_() for t in x[:3])
    (H, T, D), group = q.shape[1:], q.shape[1] // k.shape[1]
    s = q @ k.repeat_interleave(group, 1).mT * wiring.scale(D)
    seen = shifted_visible_keys(T, window, wiring.mask_shift, wiring.heads, H, q.device)
    p = s.masked_fill(~seen, -math.inf).softmax(-1)
    o = p @ v.repeat_interleave(group, 1)
    return dict(zip(NAMES, (o.detach(), *torch.autograd.grad(o, (q, k, v), x[3].double())), strict=True))


def distance(a: Tensor, b: Tensor) -> float:
    return ((a.double() - b.double()).norm() / b.double().norm()).item()


def check_attention(shape: Shape, device: torch.device, tiles: Tiles, wiring: Wiring = RIGHT) -> dict[str, Any]:
    """The kernel's error against FP64, and how it compares with the reference's; of right attention, or so wired."""
    x, numerics = inputs(shape, device), LayerNumerics({}, wiring=wiring)
    got, reference = (outputs(x, backend, shape.window, tiles, numerics) for backend in ("triton", "reference"))
    right = exact(x, shape.window, wiring)
    error = {name: distance(got[name], right[name]) for name in NAMES}
    ratio = {name: error[name] / distance(reference[name], right[name]) for name in NAMES}
    ok = max(error.values()) < WORST_ERROR and max(ratio.values()) < WORST_RATIO
    return {"ok": ok, "error": error, "over_reference": ratio}


def one_fault_a_head(phase: str, rounding: str, share: float, group: int) -> tuple[LayerNumerics, dict[str, int]]:
    """Every site of a pass at 7 bits, each in a head of its own, and that head; so one kernel shows them all.

    The faults of key-value heads come first, and the query heads of their groups have no other.
    """
    sites = [site for site in SITES if phase == "backward" or site in FORWARD_SITES]
    of_keys = [site for site in sites if site in KEY_VALUE_SITES]
    of_queries = [site for site in sites if site not in KEY_VALUE_SITES]
    head = {site: i for i, site in enumerate(of_keys)}
    head |= {site: group * len(of_keys) + i for i, site in enumerate(of_queries)}
    faults = tuple(SiteFault(site, phase, rounding, 7, heads=(head[site],), share=share) for site in sites)
    return AttentionNumerics(faults).layer(0), head


def check_faults(
    shape: Shape, phase: str, rounding: str, share: float, device: torch.device, tiles: Tiles
) -> dict[str, Any]:
    """Head by head: the reference's fault where it has an effect, and not a bit where it has none."""
    x, group = inputs(shape, device), shape.heads // shape.kv_heads
    numerics, head_of = one_fault_a_head(phase, rounding, share, group)
    (clean, got), (right_clean, right) = (
        [outputs(x, backend, shape.window, tiles, n) for n in (HEALTHY_LAYER, numerics)]
        for backend in ("triton", "reference")
    )
    skipped: set[int] = set()
    if phase == "forward" and shape.tokens > tiles.forward.keys:  # a stored P is relative to its tile's maximum
        skipped = {head_of["p"]}
    shares, untouched = [], True
    for name in NAMES:
        for head in range(got[name].shape[1]):
            before, after, right_before, right_after = (
                each[name][:, head] for each in (clean, got, right_clean, right)
            )
            if torch.equal(right_before, right_after):
                exactly = name != "dq" or tiles.deterministic
                untouched &= torch.equal(before, after) if exactly else distance(before, after) < UNORDERED
            elif head not in ({h // group for h in skipped} if name in KEY_VALUE_SITES else skipped):
                shares.append(distance(after, right_after) / distance(right_before, right_after))
    counted = got["nonfinite"].item() == right["nonfinite"].item() == 0
    ok = max(shares) < WORST_SHARE and untouched and counted
    return {"ok": ok, "worst_share": max(shares), "effects": len(shares), "others_untouched": untouched}


def check_arithmetic(arithmetic: Arithmetic, shape: Shape, device: torch.device, tiles: Tiles) -> dict[str, Any]:
    """Where one tile holds a row: the share of the reference's numbers that are met to the bit."""
    x, numerics = inputs(shape, device), LayerNumerics({}, arithmetic)
    got, right = (outputs(x, backend, shape.window, tiles, numerics) for backend in ("triton", "reference"))
    same = {name: (got[name] == right[name])[:, :, 1:].double().mean().item() for name in NAMES}
    return {"ok": min(same.values()) > 0.95, "same_bits": same}


def _same(one: dict[str, Tensor], other: dict[str, Tensor]) -> dict[str, Any]:
    return {"ok": all(torch.equal(one[name], other[name]) for name in NAMES)}


def check_repeats(shape: Shape, device: torch.device, tiles: Tiles, numerics: LayerNumerics) -> dict[str, Any]:
    """Two runs, bit by bit."""
    x = inputs(shape, device)
    return _same(*(outputs(x, "triton", shape.window, tiles, numerics) for _ in range(2)))


def check_compiled(shape: Shape, device: torch.device, tiles: Tiles, numerics: LayerNumerics, **how) -> dict[str, Any]:
    """``torch.compile`` in one graph, bit by bit. how: its further arguments."""
    x, nonfinite = inputs(shape, device), torch.zeros((), dtype=torch.int64, device=device)

    def attend(q, k, v):
        return attention(
            q, k, v, backend="triton", numerics=numerics, nonfinite=nonfinite, window=shape.window, tiles=tiles
        )

    leaves = [t.clone().requires_grad_() for t in x[:3]]
    o = torch.compile(attend, fullgraph=True, **how)(*leaves)
    compiled = dict(zip(NAMES, (o.detach(), *torch.autograd.grad(o, leaves, x[3])), strict=True))
    return _same(compiled, outputs(x, "triton", shape.window, tiles, numerics))


def check_graph(shape: Shape, device: torch.device, tiles: Tiles, numerics: LayerNumerics) -> dict[str, Any]:
    """A captured CUDA graph of forward and backward, replayed on other inputs, bit by bit."""
    static = tuple(torch.zeros_like(t) for t in inputs(shape, device))
    leaves, nonfinite = [t.requires_grad_() for t in static[:3]], torch.zeros((), dtype=torch.int64, device=device)

    def step() -> dict[str, Tensor]:
        o = attention(
            *leaves, backend="triton", numerics=numerics, nonfinite=nonfinite, window=shape.window, tiles=tiles
        )
        return dict(zip(NAMES, (o.detach(), *torch.autograd.grad(o, leaves, static[3])), strict=True))

    aside = torch.cuda.Stream()
    aside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(aside):
        for _ in range(2):
            step()
    torch.cuda.current_stream().wait_stream(aside)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    x = inputs(shape, device)
    with torch.no_grad():
        for place, value in zip(static, x, strict=True):
            place.copy_(value)
    graph.replay()
    torch.cuda.synchronize()
    return _same(captured, outputs(x, "triton", shape.window, tiles, numerics))


def checks(device: torch.device) -> Iterator[tuple[str, Check]]:
    """All checks by name, in the order in which they are worth most."""
    paper = AttentionNumerics(
        (SiteFault("o", "backward", "truncate", 7), SiteFault("do", "backward", "truncate", 7))
    ).layer(0)
    for shape in SHAPES:
        tiles = pinned_tiles(shape.d_head)
        yield f"healthy, {shape}", partial(check_attention, shape, device, tiles)
    for shape in SHAPES:
        if shape.d_head < 64:
            continue
        tiles = pinned_tiles(shape.d_head, deterministic=False)
        yield f"healthy, dQ by atomics, {shape}", partial(check_attention, shape, device, tiles)
    for wiring, shape in WIRINGS:
        for deterministic in (True, False):
            tiles = pinned_tiles(shape.d_head, deterministic)
            how = "" if deterministic else ", dQ by atomics"
            yield f"{wiring}{how}, {shape}", partial(check_attention, shape, device, tiles, wiring)
    tiles, long = pinned_tiles(64), Shape(16, 4, None, 2049, 64)
    for name, numerics in (("healthy", HEALTHY_LAYER), ("7 bits of o and do", paper)):
        yield f"two runs, {name}", partial(check_repeats, long, device, tiles, numerics)
        yield f"torch.compile, {name}", partial(check_compiled, long, device, tiles, numerics)
        yield f"CUDA graph, {name}", partial(check_graph, long, device, tiles, numerics)
    for phase in ("forward", "backward"):
        for rounding in ROUNDINGS:
            for share, window in ((1.0, None), (0.3, 50)):
                for tokens in (61, 211):
                    shape = Shape(18, 9, window, tokens, 64)
                    yield (
                        f"every {phase} site, {rounding}, share {share}, {shape}",
                        partial(check_faults, shape, phase, rounding, share, device, tiles),
                    )
    adding = pinned_tiles(64, deterministic=False)
    for tokens in (61, 211):
        shape = Shape(18, 9, 50, tokens, 64)
        yield (
            f"every backward site, dQ by atomics, {tokens} tokens",
            partial(check_faults, shape, "backward", "truncate", 1.0, device, adding),
        )
    for arithmetic in ARITHMETICS:
        yield str(arithmetic), partial(check_arithmetic, arithmetic, Shape(4, 2, 50, 61, 64), device, tiles)
