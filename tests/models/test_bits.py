"""BF16 bit operations against plain integer arithmetic on all 65,536 patterns, and where a share of them is done."""

import numpy as np
import pytest
import torch

from foreshock.models.bits import MOST_BITS, ROUNDINGS, BitOperation, flip, round_half_up, truncate

PATTERNS = range(1 << 16)
ALL_BITS = range(9)
BAD_BITS = (-1, 17, True, 1.5)


def bf16(patterns) -> torch.Tensor:
    return torch.from_numpy(np.array(patterns, dtype=np.uint16).view(np.int16)).view(torch.bfloat16)


def patterns(x: torch.Tensor) -> np.ndarray:
    return x.view(torch.int16).numpy().view(np.uint16)


@pytest.mark.parametrize("bits", ALL_BITS)
def test_truncate_clears_the_low_bits_of_every_pattern(bits):
    expected = [raw // 2**bits * 2**bits for raw in PATTERNS]
    np.testing.assert_array_equal(patterns(truncate(bf16(PATTERNS), bits)), expected)


@pytest.mark.parametrize("bits", ALL_BITS)
def test_round_half_up_adds_half_a_kept_bit_to_every_pattern(bits):
    half = 2**bits // 2
    expected = [(raw + half) % 2**16 // 2**bits * 2**bits for raw in PATTERNS]
    np.testing.assert_array_equal(patterns(round_half_up(bf16(PATTERNS), bits)), expected)


@pytest.mark.parametrize("bits", range(1, 8))
def test_truncate_rounds_finite_numbers_toward_zero_and_round_half_up_to_the_nearest(bits):
    """As values, not bits: the grid of 2**bits neighbouring patterns has its larger end away from zero."""
    finite = [raw for raw in PATTERNS if raw & 0x7FFF < 0x7F00]
    x = bf16(finite).double()
    low, near = truncate(bf16(finite), bits).double(), round_half_up(bf16(finite), bits).double()
    high = bf16([(raw | (2**bits - 1)) + 1 for raw in finite]).double()
    assert (low.abs() <= x.abs()).all() and (low * x >= 0).all() and (x.abs() < high.abs()).all()
    assert torch.equal(near, torch.where((x - low).abs() < (high - x).abs(), low, high))


@pytest.mark.parametrize("operation", ROUNDINGS.values())
class TestBitOperation:
    def test_leaves_its_input_and_shape_alone(self, operation):
        x = bf16(PATTERNS).view(4, -1, 2)
        before = patterns(x).copy()
        assert operation(x, 7).shape == x.shape
        np.testing.assert_array_equal(patterns(x), before)

    def test_zero_bits_return_the_very_tensor(self, operation):
        x = bf16(PATTERNS)
        assert operation(x, 0) is x

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.float64, torch.int16])
    def test_refuses_another_dtype(self, operation, dtype):
        with pytest.raises(TypeError, match=str(dtype)):
            operation(torch.zeros(2, dtype=dtype), 7)

    @pytest.mark.parametrize("bits", BAD_BITS)
    def test_refuses_an_impossible_number_of_bits_by_value(self, operation, bits):
        with pytest.raises(ValueError, match=f"bits={bits!r} .*0 to (8|16)"):
            operation(bf16([0]), bits)


def test_roundings_are_named():
    assert dict(ROUNDINGS) == {"truncate": truncate, "round_half_up": round_half_up, "flip": flip}
    assert MOST_BITS.keys() == ROUNDINGS.keys()


@pytest.mark.parametrize("bits", range(1, 17))
def test_flip_inverts_one_bit_of_every_pattern(bits):
    expected = [raw ^ 2 ** (bits - 1) for raw in PATTERNS]
    np.testing.assert_array_equal(patterns(flip(bf16(PATTERNS), bits)), expected)
    np.testing.assert_array_equal(patterns(flip(flip(bf16(PATTERNS), bits), bits)), list(PATTERNS))


@pytest.mark.parametrize("operation", [truncate, round_half_up])
def test_a_cleared_exponent_is_refused(operation):
    with pytest.raises(ValueError, match=r"bits=9 .*0 to 8"):
        operation(bf16([0]), 9)


CPU = torch.device("cpu")


class TestShare:
    """Which elements a share of them is."""

    @pytest.mark.parametrize("shape", [(64, 64), (64, 32), (7,), (33, 1), (1024, 128)])
    @pytest.mark.parametrize("share", [0.5, 0.1, 0.01, 0.001])
    def test_it_is_the_share_and_at_least_one(self, shape, share):
        hits = BitOperation("truncate", 2, share).hits(shape, CPU)
        assert hits.shape == shape and abs(hits.sum().item() - max(1, share * hits.numel())) <= 2 and hits.any()

    @pytest.mark.parametrize("shape", [(64, 64), (64, 32), (7,), (33, 1), (1024, 128)])
    def test_none_of_them_is_one(self, shape):
        assert BitOperation("flip", 7, 0.0).hits(shape, CPU).sum() == 1

    @pytest.mark.parametrize("share", [0.0, 0.01, 0.3])
    def test_where_keys_are_masked_none_of_those_is_hit(self, share):
        hits = BitOperation("flip", 7, share).hits((64, 64), CPU, causal=True)
        assert hits.any() and not hits.triu(1).any()

    @pytest.mark.parametrize("share", [0.0, 0.01, 0.3, 1.0])
    def test_a_window_leaves_fewer_to_hit(self, share):
        operation = BitOperation("flip", 7, share)
        hits, causal = (operation.hits((64, 64), CPU, True, window) for window in (8, None))
        visible = torch.ones(64, 64, dtype=torch.bool).tril().triu(-7)
        assert hits.any() and not hits[~visible].any()
        if share > 0:
            assert torch.equal(hits, causal & visible)  # the very elements, those that are out of sight left out
        assert share < 1 or torch.equal(hits, visible)

    @pytest.mark.parametrize("rounding", ["truncate", "round_half_up"])
    def test_all_is_no_mask_where_a_masked_zero_stays_zero(self, rounding):
        assert BitOperation(rounding, 7).hits((8, 8), CPU, causal=True) is None
        assert not BitOperation(rounding, 7)(torch.zeros(3), None).any()

    def test_it_is_spread_evenly(self):
        hits = BitOperation("flip", 7, 0.05).hits((64, 64), CPU)
        assert hits.sum(0).max() <= 6 and hits.sum(1).max() <= 6

    def test_all_is_no_mask(self):
        assert BitOperation("flip", 7).hits((64, 64), CPU) is None

    def test_what_is_not_hit_keeps_its_fp32_bits(self):
        operation = BitOperation("truncate", 3, 0.25)
        x = torch.randn(5, 16, 8, generator=torch.Generator().manual_seed(0))
        hits = operation.hits(x.shape[1:], CPU)
        got = operation(x, hits)
        assert torch.equal(got[:, ~hits], x[:, ~hits])
        assert torch.equal(got[:, hits], truncate(x[:, hits].bfloat16(), 3).float())

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"share": 1.5}, "share=1.5 .*0 .one element. to 1"),
            ({"share": -0.1}, "share=-0.1 "),
            ({"share": float("nan")}, "share=nan "),
            ({"rounding": "swap"}, "rounding='swap' .*truncate, round_half_up, flip"),
            ({"bits": 9}, "bits=9 .*0 to 8"),
            ({"rounding": "flip", "bits": 17}, "bits=17 .*0 to 16"),
        ],
    )
    def test_an_impossible_one_is_refused_by_name(self, change, message):
        with pytest.raises(ValueError, match=message):
            BitOperation(**{"rounding": "truncate", "bits": 2} | change)
