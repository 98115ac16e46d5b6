"""Narrow formats bit for bit against gfloat, an independent library: elements, and tensors and blocks under a scale."""

import gfloat
import numpy as np
import pytest
import torch
from gfloat import RoundMode, formats

from foreshock.faults.quantised import BLOCK_FORMATS, in_blocks, in_tensor, scale_of
from foreshock.faults.rounding import GRIDS, nearest, power_of_2

ELEMENTS = {
    "fp8_e4m3": formats.format_info_ocp_e4m3,
    "fp8_e5m2": formats.format_info_ocp_e5m2,
    "fp6_e2m3": formats.format_info_ocp_e2m3,
    "fp6_e3m2": formats.format_info_ocp_e3m2,
    "fp4_e2m1": formats.format_info_ocp_e2m1,
}
CODES = {
    "fp8_e4m3": (256, 254),
    "fp8_e5m2": (256, 248),
    "fp6_e2m3": (64, 64),
    "fp6_e3m2": (64, 64),
    "fp4_e2m1": (16, 16),
}
"""How many codes a format has, and how many of them are numbers."""
MX = {
    "mxfp8_e4m3": formats.format_info_mxfp8_e4m3,
    "mxfp8_e5m2": formats.format_info_mxfp8_e5m2,
    "mxfp6_e2m3": formats.format_info_mxfp6_e2m3,
    "mxfp6_e3m2": formats.format_info_mxfp6_e3m2,
    "mxfp4_e2m1": formats.format_info_mxfp4_e2m1,
}


def rounded(name: str, x: np.ndarray) -> np.ndarray:
    """By gfloat, in FP32."""
    return gfloat.round_ndarray(ELEMENTS[name], x.astype(np.float64), RoundMode.TiesToEven, sat=True).astype(np.float32)


def codes(name: str) -> np.ndarray:
    """What every code of a format stands for, in FP32."""
    form = ELEMENTS[name]
    return gfloat.decode_ndarray(form, np.arange(1 << form.k)).astype(np.float32)


def same(ours: torch.Tensor, theirs: np.ndarray) -> None:
    """Bit for bit; a NaN is a NaN, and the sign of a zero counts."""
    left, right = ours.numpy(), theirs.astype(np.float32)
    np.testing.assert_array_equal(left, right)
    number = ~np.isnan(right)
    np.testing.assert_array_equal(np.signbit(left[number]), np.signbit(right[number]))


@pytest.mark.parametrize("name", GRIDS)
def test_every_code_is_its_own_nearest_number(name):
    values = codes(name)
    finite = values[np.isfinite(values)]
    assert (len(values), len(finite)) == CODES[name]
    same(nearest(torch.from_numpy(finite), name), finite)
    same(nearest(torch.from_numpy(values), name), rounded(name, values))
    assert finite.max() == GRIDS[name].largest


@pytest.mark.parametrize("name", GRIDS)
def test_ties_their_neighbours_subnormal_numbers_and_what_saturates_are_rounded_as_gfloat_does(name):
    grid = np.unique(codes(name)[np.isfinite(codes(name))])
    ties = (grid[1:] + grid[:-1]) / 2
    beside = [np.nextafter(ties, np.float32(sign * np.inf), dtype=np.float32) for sign in (-1, 1)]
    smallest = np.abs(grid[grid != 0]).min()
    edges = [0.0, -0.0, smallest / 2, -smallest / 2, smallest / 4, 1e-40, 1e30, -1e30, np.inf, -np.inf, np.nan]
    generator = np.random.default_rng(0)
    drawn = generator.standard_normal(5000) * 2.0 ** generator.integers(-20, 18, 5000)
    x = np.concatenate([grid, ties, *beside, edges, drawn]).astype(np.float32)
    same(nearest(torch.from_numpy(x), name), rounded(name, x))


def test_the_spacing_of_a_grid_is_that_of_its_neighbouring_codes():
    for name, grid in GRIDS.items():
        numbers = np.unique(codes(name)[np.isfinite(codes(name))])
        middle = torch.from_numpy((numbers[1:] + numbers[:-1]) / 2)
        np.testing.assert_array_equal(grid.spacing(middle).numpy(), np.diff(numbers))


def test_powers_of_2_are_exact():
    exponents = torch.arange(-127, 128)
    assert torch.equal(power_of_2(exponents).double(), torch.tensor([2.0**k for k in range(-127, 128)]).double())


def blocks_to_try() -> np.ndarray:
    """Blocks of 32 of every magnitude of FP32, zeros, what saturates, subnormal numbers."""
    generator = np.random.default_rng(1)
    scales = 2.0 ** generator.integers(-140, 120, (60, 1))
    drawn = (generator.standard_normal((60, 32)) * scales).astype(np.float32)
    special = np.zeros((3, 32), np.float32)
    special[1] = np.nextafter(np.float32(2.0), np.float32(0.0))  # saturates in every format: just below 2^(emax + 1)
    special[2, 3], special[2, 4] = np.float32(2.0**-149), -(2.0**-126)
    return np.concatenate([drawn, special])


@pytest.mark.parametrize("name", MX)
def test_mx_blocks_are_those_of_gfloat(name):
    blocks = blocks_to_try()
    theirs = [gfloat.quantize_block(MX[name], block.astype(np.float64), gfloat.compute_scale_amax) for block in blocks]
    same(in_blocks(torch.from_numpy(blocks), name), np.stack(theirs))


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("name", BLOCK_FORMATS)
def test_a_block_with_a_nan_or_an_infinity_is_nan_whole_and_of_nvfp4_the_tensor_is(name, value):
    x = torch.ones(2, 32)
    x[0, 5] = value
    assert in_blocks(x, name).isnan().tolist() == [[True] * 32, [name == "nvfp4"] * 32]


def nvfp4(x: np.ndarray) -> np.ndarray:
    """From the definition, with gfloat's roundings, block by block in FP32."""
    f = np.float32
    of_tensor = f(np.abs(x).max() / f(448 * 6))
    out = np.zeros_like(x)
    for row in range(x.shape[0]):
        for first in range(0, x.shape[1], 16):
            block = x[row, first : first + 16]
            relative = f(f(np.abs(block).max() / f(6)) / of_tensor) if of_tensor else f(0)
            scale = f(rounded("fp8_e4m3", np.array([relative]))[0] * of_tensor)
            if scale:
                out[row, first : first + 16] = rounded("fp4_e2m1", block / scale) * scale
    return out


@pytest.mark.parametrize("magnitude", [1.0, 1e-6, 1e6])
def test_nvfp4_is_what_its_definition_says(magnitude):
    generator = np.random.default_rng(2)
    x = (generator.standard_normal((8, 40)) * 10.0 ** generator.integers(-6, 2, (8, 1)) * magnitude).astype(np.float32)
    x[3] = 0
    same(in_blocks(torch.from_numpy(x), "nvfp4").abs(), np.abs(nvfp4(x)))
    assert not in_blocks(torch.zeros(2, 16), "nvfp4").any()


def test_an_nvfp4_block_by_hand():
    """amax 6 x 448 makes the tensor's scale 1; the second block's is 3 / 6 = 0.5, whose numbers are 0, 0.25, 0.5 ..."""
    x = torch.zeros(1, 32)
    x[0, 0] = 6.0 * 448
    x[0, 16:19] = torch.tensor([3.0, 0.375, -0.13])
    assert in_blocks(x, "nvfp4")[0, [0, 16, 17, 18]].tolist() == [2688.0, 3.0, 0.5, -0.25]


def test_an_mx_block_by_hand():
    """500 has the exponent 8, which is E4M3's, so that the scale is 1; E2M1 has 2, and a scale of 64. 500 saturates."""
    x = torch.tensor([[500.0, 17.0, 19.0, 0.0009]])
    assert in_blocks(x, "mxfp8_e4m3").tolist() == [[448.0, 16.0, 20.0, 0.0]]
    assert in_blocks(x, "mxfp4_e2m1").tolist() == [[384.0, 32.0, 32.0, 0.0]]


@pytest.mark.parametrize("name", BLOCK_FORMATS)
def test_blocks_lie_along_an_axis_and_the_last_has_what_is_left(name):
    x = torch.randn(70, 5, generator=torch.Generator().manual_seed(0)) * torch.logspace(-3, 3, 70)[:, None]
    along = in_blocks(x, name, axis=0)
    assert torch.equal(along, in_blocks(x.mT.contiguous(), name).mT)
    if name != "nvfp4":
        assert torch.equal(along[64:], in_blocks(x[64:], name, axis=0))
        assert torch.equal(in_blocks(x, name, 8, 0)[8:16], in_blocks(x[8:16], name, axis=0))
    assert in_blocks(x[:0], name).shape == (0, 5)


@pytest.mark.parametrize("name", ["fp8_e4m3", "fp8_e5m2"])
def test_a_tensor_under_one_scale_is_that_of_gfloat(name):
    x = np.random.default_rng(3).standard_normal(1000).astype(np.float32) * np.float32(1e-4)
    largest = np.float32(GRIDS[name].largest)
    for factor in (1.0, 16.0, 2.0**-9):
        scale = np.float32(largest / np.abs(x).max()) * np.float32(factor)
        theirs = rounded(name, x * scale) * (np.float32(1) / scale)
        ours = in_tensor(torch.from_numpy(x), name, scale_of(torch.from_numpy(x).abs().amax(), name, factor))
        same(ours, theirs)
        assert (np.abs(theirs).max() < np.abs(x).max() * 0.9) == (factor > 1)


def test_a_scale_of_nothing_known_is_its_factor_and_of_a_tiny_tensor_finite():
    for amax in (0.0, torch.inf, torch.nan):
        assert float(scale_of(torch.tensor(amax), "fp8_e4m3", 3.0)) == 3.0
    tiny = torch.full((4,), 1e-42)
    scale = scale_of(tiny.amax(), "fp8_e4m3")
    assert scale.isfinite() and in_tensor(tiny, "fp8_e4m3", scale).isfinite().all()
