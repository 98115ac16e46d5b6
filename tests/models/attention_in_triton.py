"""The Triton attention as the tests call it, and what its tiles change, written down a second time.

Shapes as in ``tests.models.attention_in_fp64``: tensors go in and come out in FP32 that holds BF16 numbers.
"""

import math
from importlib.util import find_spec

import pytest
import torch

from foreshock.models.arithmetic import ORDINARY
from foreshock.models.flash import flash_attention_triton
from foreshock.models.flash_arithmetic import encode_arithmetic
from foreshock.models.numerics import HEALTHY_LAYER
from foreshock.models.tiles import Tile, Tiles
from tests.models.attention_in_fp64 import NAMES, allowed, grid, shared

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
"""Where the kernels run: compiled on a GPU, in Triton's interpreter elsewhere."""

in_the_interpreter = (
    pytest.mark.triton,
    pytest.mark.skipif(
        torch.cuda.is_available() or find_spec("triton") is None, reason="Triton kernels on CPU tensors"
    ),
)
"""Marks of tests whose models stay on the CPU: a GPU's Triton compiles instead, and not every system has Triton."""

ONE_TILE = Tiles(*[Tile(64, 64, 4, 1)] * 3)
"""For up to 64 tokens: a row's keys in one tile, as in the reference."""

PLAIN = encode_arithmetic(ORDINARY, 64)
"""What the operators are told about the ordinary arithmetic."""

SMALL_TILES = Tiles(Tile(32, 16, 4, 1), Tile(16, 32, 4, 1), Tile(32, 32, 4, 1))

ADDING_TILES = Tiles(Tile(32, 16, 4, 1), Tile(16, 32, 4, 1), None)
"""dQ is added up by the kernel of the keys."""


def run_triton(q, k, v, do, numerics=HEALTHY_LAYER, window=None, tiles=ONE_TILE, nonfinite=None):
    """{o, dq, dk, dv}, on the CPU. nonfinite: to which the non-finite values at faults are added."""
    leaves = [x.to(DEVICE, torch.bfloat16).requires_grad_() for x in (q, k, v)]
    counted = torch.zeros((), dtype=torch.int64, device=DEVICE)
    o = flash_attention_triton(*leaves, numerics, counted, window, tiles)
    gradients = torch.autograd.grad(o, leaves, do.to(DEVICE, torch.bfloat16))
    if nonfinite is not None:
        nonfinite += counted.cpu()
    return {name: x.detach().float().cpu() for name, x in zip(NAMES, (o, *gradients), strict=True)}


def output_in_tiles(q, k, v, window, keys, store_p=lambda p: p, block=None, offset=0.0):
    """O in FP64 by the online softmax over tiles of so many keys; Pbar is rounded relative to the largest score so far.

    store_p: what a fault makes of the rounded Pbar. block: after how many keys the running sum is rounded to BF16.
    offset: added to the largest score.
    """
    q, k, v = (x.double() for x in (q, k, v))
    B, H, T, D = q.shape
    s = torch.einsum("bhid,bhjd->bhij", q, shared(k, H)) / math.sqrt(D)
    s = s.masked_fill(~allowed(T, window), -math.inf)
    top = torch.full((B, H, T, 1), -math.inf, dtype=torch.float64)
    total, acc = torch.zeros(B, H, T, 1, dtype=torch.float64), torch.zeros_like(q)
    for index, (tile, v_tile) in enumerate(zip(s.split(keys, -1), shared(v, H).split(keys, -2), strict=True)):
        new_top = torch.maximum(top, tile.amax(-1, keepdim=True) + offset)
        started = new_top > -math.inf
        rescale = torch.where(started, (top - new_top).exp(), 0.0)
        p_bar = torch.where(started, (tile - new_top).exp(), 0.0)
        total = total * rescale + p_bar.sum(-1, keepdim=True)
        acc = acc * rescale + store_p(grid(p_bar)) @ v_tile
        if block is not None and (index + 1) * keys % block == 0:
            acc = grid(acc)
        top = new_top
    return grid((acc if block is None else grid(acc)) / total)
