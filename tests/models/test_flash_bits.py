"""The Triton operations against their PyTorch twins, bit for bit, over every BF16 number."""

import numpy as np
import pytest
import torch
import triton
import triton.language as tl

from foreshock.models.bits import MOST_BITS, ROUNDINGS, _spread
from foreshock.models.flash_bits import operate, product, round_to_bf16, widen
from foreshock.models.flash_faults import OPERATION_NUMBERS, AttentionShape, reach
from foreshock.models.flash_sites import _place
from foreshock.models.numerics import CAUSAL_SITES, SITES

pytestmark = pytest.mark.triton

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
EVERY_NUMBER = torch.arange(-(2**15), 2**15).to(torch.int16).view(torch.bfloat16)


@triton.jit
def _operate_kernel(x_ptr, y_ptr, bits_ptr, OPERATION: tl.constexpr, N: tl.constexpr):
    i = tl.arange(0, N)
    tl.store(y_ptr + i, operate(tl.load(x_ptr + i), tl.load(bits_ptr), OPERATION))


@triton.jit
def _round_kernel(x_ptr, y_ptr, N: tl.constexpr):
    i = tl.arange(0, N)
    tl.store(y_ptr + i, round_to_bf16(tl.load(x_ptr + i)))


@triton.jit
def _widen_kernel(x_ptr, y_ptr, N: tl.constexpr):
    i = tl.arange(0, N)
    tl.store(y_ptr + i, widen(tl.load(x_ptr + i)))


@triton.jit
def _product_kernel(a_ptr, b_ptr, c_ptr, N: tl.constexpr):
    at = tl.arange(0, N)[:, None] * N + tl.arange(0, N)[None, :]
    tl.store(c_ptr + at, product(tl.load(a_ptr + at), tl.load(b_ptr + at)))


@triton.jit
def _place_kernel(rows_ptr, place_ptr, WIDTH, N: tl.constexpr):
    i = tl.arange(0, N)
    tl.store(place_ptr + i, _place(tl.load(rows_ptr + i), i % 16, WIDTH))


def bits_of(x):
    return x.cpu().view(torch.int16)


@pytest.mark.parametrize("rounding", ROUNDINGS)
def test_every_operation_gives_the_same_bits_as_its_twin(rounding):
    x = EVERY_NUMBER.to(DEVICE)
    for bits in range(MOST_BITS[rounding] + 1):
        y = torch.empty_like(x)
        at_run_time = torch.tensor([bits], dtype=torch.int32, device=DEVICE)
        _operate_kernel[(1,)](x, y, at_run_time, OPERATION_NUMBERS[rounding], x.numel())
        assert torch.equal(bits_of(y), bits_of(ROUNDINGS[rounding](EVERY_NUMBER, bits))), bits


def test_every_rounding_of_the_reference_has_a_triton_twin():
    assert set(OPERATION_NUMBERS) == set(ROUNDINGS)


def test_rounding_to_bf16_is_to_nearest_with_ties_to_even():
    """On either side of every tie, on it, and on every BF16 number; infinities stay and NaN stays NaN."""
    tie = EVERY_NUMBER.float().view(torch.int32) + 2**15
    x = torch.cat([tie - 1, tie, tie + 1, tie - 2**15]).view(torch.float32)
    y = torch.empty_like(x, dtype=torch.bfloat16, device=DEVICE)
    _round_kernel[(1,)](x.to(DEVICE), y, x.numel())
    number = ~x.isnan()
    assert torch.equal(bits_of(y)[number], x.bfloat16().view(torch.int16)[number])
    assert y.cpu()[~number].isnan().all()


def test_widening_is_exact():
    y = torch.empty(EVERY_NUMBER.shape, device=DEVICE)
    _widen_kernel[(1,)](EVERY_NUMBER.to(DEVICE), y, y.numel())
    assert torch.equal(y.cpu().view(torch.int32), EVERY_NUMBER.float().view(torch.int32))


def test_a_product_of_bf16_tiles_is_not_rounded_to_bf16():
    a, b = torch.randint(-100, 100, (2, 32, 32), generator=torch.Generator().manual_seed(0)).bfloat16()
    c = torch.empty(32, 32, device=DEVICE)
    _product_kernel[(1,)](a.to(DEVICE), b.to(DEVICE), c, 32)
    assert torch.equal(c.cpu().double(), a.double() @ b.double())


def test_places_are_those_of_the_reference_bit_for_bit():
    """For element numbers up to 2^31, as in the scores of 46,000 tokens."""
    rows = torch.randint(2**15, (2**14,), generator=torch.Generator().manual_seed(0), dtype=torch.int32)
    width = 2**16 - 1
    place = torch.empty(rows.shape, dtype=torch.float64, device=DEVICE)
    _place_kernel[(1,)](rows.to(DEVICE), place, width, rows.numel())
    number = rows.double() * width + torch.arange(rows.numel()) % 16
    assert torch.equal(place.cpu(), (number + 0.5) * ((5**0.5 - 1) / 2) % 1)


@pytest.mark.parametrize("share", [0.0, 0.001, 0.1, 0.7])
@pytest.mark.parametrize(("T", "D", "window"), [(1, 16, 0), (33, 24, 0), (80, 16, 7)])
@pytest.mark.parametrize("site", SITES)
def test_the_reach_of_a_share_hits_the_elements_of_the_reference(site, T, D, window, share):
    shape = {"lse": (T, 1), "delta": (T, 1)}.get(site, (T, T) if site in CAUSAL_SITES else (T, D))
    hits = _spread(shape, share, torch.device("cpu"), site in CAUSAL_SITES, window or None)
    limit = reach(share, site, AttentionShape(4, 2, T, D, window))
    elements = np.concatenate([n.ravel() for n in AttentionShape(4, 2, T, D, window).elements(site)])
    hit = elements[(elements + 0.5) * ((5**0.5 - 1) / 2) % 1 <= limit]
    assert np.array_equal(hit, hits.flatten().nonzero().flatten().numpy())
