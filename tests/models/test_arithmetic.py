"""Accumulation in BF16 against a loop over numbers, the mechanism of its bias, and cures that leave softmax alone."""

import math

import pytest
import torch

from foreshock.models.arithmetic import ORDINARY, ROUNDS_TO_ONE, Arithmetic, product_in_bf16, row_shift
from foreshock.models.attention import flash_attention
from foreshock.models.numerics import HEALTHY, HEALTHY_LAYER, AttentionNumerics, LayerNumerics, SiteFault
from tests.models.attention_in_fp64 import NAMES, allowed, distance, exact, inputs, layer, run

pytestmark = pytest.mark.numeric

CURES = {
    "stored O": Arithmetic("bf16", 1, stored_o="fp32"),
    "delta": Arithmetic("bf16", 1, delta="p"),
    "dynamic": Arithmetic("bf16", 1, row_max="dynamic", beta=2.0),
    "offset": Arithmetic("bf16", 1, row_max="offset", offset=0.1),
}
NATURAL = Arithmetic("bf16", 1)


def kernel(*x, arithmetic, window=None):
    return run(*x, LayerNumerics({}, arithmetic), window=window)


def bf16(x: float) -> float:
    return float(torch.tensor(x, dtype=torch.float32).bfloat16())


def fp32(x: float) -> float:
    return float(torch.tensor(x, dtype=torch.float64).float())


@pytest.mark.parametrize("window", [None, 4])
@pytest.mark.parametrize("block", [1, 3, 7, 100, None])
def test_the_accumulator_is_rounded_after_every_block_of_keys(block, window):
    """A loop over single numbers, of values whose sums within a block FP32 holds exactly."""
    H, G, T, D = 4, 2, 7, 3
    generator = torch.Generator().manual_seed(0)
    p = (torch.randint(1, 256, (2, H, T, T), generator=generator) / 256) * allowed(T, window)
    v = torch.randint(-255, 256, (2, G, T, D), generator=generator) / 64
    got = product_in_bf16(p, v, block, window)
    for b, h, i, d in ((b, h, i, d) for b in range(2) for h in range(H) for i in range(T) for d in range(D)):
        total = 0.0
        for first in range(0, T, block or T):
            keys = range(first, min(first + (block or T), T))
            of_block = sum(float(p[b, h, i, j]) * float(v[b, h // 2, j, d]) for j in keys)
            total = bf16(fp32(total + of_block))
        assert got[b, h, i, d].item() == total


def test_addends_of_one_sign_round_away_from_zero_together():
    """4 + n (1 + 3/128), in units of 1/32: each addition leaves 3/4 of a unit over, and rounds up."""
    v = torch.tensor([4.0, *[1 + 3 / 128] * 3]).view(1, 1, 4, 1)
    p = torch.ones(4, 4).tril().view(1, 1, 4, 4)
    for sign in (1, -1):
        error = product_in_bf16(p, sign * v, 1, None).flatten().double() - sign * v.flatten().double().cumsum(0)
        assert error.tolist() == [0.0, sign / 128, sign / 64, sign * 3 / 128]
    together = product_in_bf16(p, v, 4, None).flatten()
    assert together[-1] == bf16(7 + 9 / 128)


def test_small_addends_of_one_sign_are_lost_together():
    v = torch.tensor([256.0, *[0.5] * 40]).view(1, 1, 41, 1)
    p = torch.ones(41, 41).tril().view(1, 1, 41, 41)
    assert (product_in_bf16(p, v, 1, None) == 256).all()
    assert product_in_bf16(p, v, 41, None)[0, 0, -1, 0] == 276


def test_ordinary_arithmetic_is_healthy_and_any_other_is_not():
    assert AttentionNumerics(arithmetic=ORDINARY) == HEALTHY and HEALTHY.layer(3) is HEALTHY_LAYER
    for arithmetic in (NATURAL, *CURES.values(), Arithmetic(stored_o="fp32")):
        numerics = AttentionNumerics(arithmetic=arithmetic)
        assert numerics != HEALTHY and numerics.layer(0) and numerics.layer(0).arithmetic == arithmetic


def test_two_arithmetics_do_not_meet_and_one_meets_any_fault_of_a_site():
    natural, fault = (
        AttentionNumerics(arithmetic=NATURAL),
        AttentionNumerics((SiteFault("o", "backward", "truncate", 7),)),
    )
    both = natural + fault
    assert both == fault + natural and both.arithmetic == NATURAL and both.faults == fault.faults
    with pytest.raises(ValueError, match="two faults both change the arithmetic of attention"):
        natural + AttentionNumerics(arithmetic=CURES["delta"])


@pytest.mark.parametrize("row_max", [{"row_max": "dynamic", "beta": 4.0}, {"row_max": "offset", "offset": 0.7}])
def test_softmax_is_what_it_was_in_exact_arithmetic(row_max):
    s = torch.randn(3, 20, 20, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    s[:, :, 7] = s[:, :, 3] = 2 * s.amax(-1)
    s[2] = s[2] - 9
    s = s.masked_fill(~allowed(20), -math.inf)
    shift = row_shift(s, Arithmetic(**row_max))
    assert not torch.equal(shift, row_shift(s, ORDINARY))
    p_bar = torch.exp(s - shift)
    torch.testing.assert_close(p_bar / p_bar.sum(-1, keepdim=True), s.softmax(-1), rtol=1e-12, atol=1e-300)
    torch.testing.assert_close((shift + p_bar.sum(-1, keepdim=True).log()).squeeze(-1), s.logsumexp(-1))


def test_the_maximum_moves_where_it_repeats_and_nowhere_else():
    near, far = ROUNDS_TO_ONE / 2, 2 * ROUNDS_TO_ONE
    s = torch.tensor([[3.0, 3.0, 1.0], [3.0, 3 + near, 1.0], [3.0, 3 + far, 1.0], [-2.0, -2.0, -9.0], [0.0, 0.0, -1.0]])
    shift = row_shift(s, Arithmetic(row_max="dynamic", beta=2.0)).flatten()
    assert shift.tolist() == [6.0, 6.0, 3.0, 0.0, 0.0]
    stored = torch.exp(s - s.amax(-1, keepdim=True)).bfloat16() == 1
    assert (stored.sum(-1) > 1).tolist() == [True, True, False, True, True]
    assert row_shift(s, Arithmetic(row_max="offset", offset=0.5)).flatten().tolist() == [3.5, 3.5, 3.5, -1.5, 0.5]


@pytest.mark.parametrize("window", [None, 9])
@pytest.mark.parametrize("pv", [("fp32", None), ("bf16", 1), ("bf16", 16)])
@pytest.mark.parametrize(
    "cure",
    [
        {},
        {"stored_o": "fp32"},
        {"delta": "p"},
        {"row_max": "dynamic", "beta": 2.0},
        {"row_max": "offset", "offset": 0.3},
    ],
)
def test_every_arithmetic_is_attention_but_for_its_rounding(pv, cure, window):
    x = inputs(H=4, G=2)
    got, right = kernel(*x, arithmetic=Arithmetic(*pv, **cure), window=window), exact(*x, window=window)
    for name in NAMES:
        assert distance(got[name], right[name]) < (2.0**-5 if pv[0] == "bf16" else 2.0**-7), name


def tied(keys: int, sign: float = 1.0):
    """q, k, v, dO: the first ``keys`` keys tie at the maximum of every row, far above the rest, and V has one sign."""
    generator, shape = torch.Generator().manual_seed(0), (4, 4, 64, 16)
    q, k = torch.zeros(shape), torch.zeros(shape)
    q[..., 0] = 10 + 4 * torch.rand(shape[:3], generator=generator)
    k[..., :keys, 0] = 4.0
    v, do = 1 + torch.rand(shape, generator=generator), torch.rand(shape, generator=generator)
    return tuple(x.bfloat16().float() for x in (q, k, sign * v, do))


def biases(arithmetic: Arithmetic, keys: int, sign: float = 1.0) -> tuple[float, float]:
    """Mean relative error of O away from zero, and mean error of delta, in rows that see all tied keys.

    An error of delta_i moves dQ_i by as much times -(P K)_i / sqrt(D), which is -1 in the first component.
    """
    x = tied(keys, sign)
    got, right = kernel(*x, arithmetic=arithmetic), exact(*x)
    of_o = (got["o"] / right["o"] - 1)[:, :, keys:]
    of_delta = (right["dq"] - got["dq"])[:, :, keys:, 0]
    return of_o.mean().item(), of_delta.mean().item()


ONCE = {"pv_accumulation": "bf16"}


@pytest.mark.parametrize("sign", [1.0, -1.0])
@pytest.mark.parametrize("keys", [2, 3])
def test_tied_maxima_and_values_of_one_sign_push_o_away_from_zero(keys, sign):
    """The mechanism of arXiv:2510.04212 and its controls: a moved maximum cures it, a fixed offset does not."""
    assert biases(Arithmetic(**ONCE), keys, sign)[0] > 7e-4
    assert abs(biases(ORDINARY, keys, sign)[0]) < 3e-4
    assert abs(biases(Arithmetic(**ONCE, row_max="dynamic", beta=2.0), keys, sign)[0]) < 3e-4
    assert biases(Arithmetic(**ONCE, row_max="offset", offset=0.1), keys, sign)[0] > 1e-3


def test_one_maximum_pushes_nothing_and_neither_do_single_additions():
    assert abs(biases(Arithmetic(**ONCE), 1)[0]) < 1e-4
    assert abs(biases(NATURAL, 2)[0]) < 3e-4


def test_a_fixed_offset_pushes_o_without_ties_where_its_own_pbar_is_no_bf16_number():
    """The maximum of every row then has the Pbar exp(-offset), which is rounded one way: 0.9048 to 0.90625."""
    x = inputs(T=64)
    right = exact(*x)["o"][:, :, 1:]

    def bias(**offset):
        o = kernel(*x, arithmetic=Arithmetic(**offset))["o"][:, :, 1:]
        return (((o - right) * right.sign()).sum() / right.abs().sum()).item()

    assert bias(row_max="offset", offset=0.1) > 5e-4
    assert abs(bias(row_max="offset", offset=math.log(2))) < 3e-5 and abs(bias()) < 3e-5


def test_the_bias_enters_delta_unless_the_backward_reads_another_o():
    """sum dO * O of some 12 a row errs by its share; rowsum(dP * P) and an FP32 O do not."""
    natural = biases(Arithmetic(**ONCE), 2)[1]
    assert natural > 5e-3
    for cure in ({"stored_o": "fp32"}, {"delta": "p"}, {"row_max": "dynamic", "beta": 2.0}):
        assert abs(biases(Arithmetic(**ONCE, **cure), 2)[1]) < 0.25 * natural, cure
    assert biases(Arithmetic(**ONCE, row_max="offset", offset=0.1), 2)[1] > 0.8 * natural


def test_even_attention_loses_what_single_additions_are_too_small_for():
    q, k, v, do = inputs(T=64)
    x = q, torch.zeros_like(k), 1 + v.abs() / 8, do
    each, once = (kernel(*x, arithmetic=a)["o"] / exact(*x)["o"] - 1 for a in (NATURAL, Arithmetic(**ONCE)))
    assert each[:, :, 32:].mean() < -3e-3 and abs(once[:, :, 32:].mean()) < 3e-4


def test_the_forward_of_a_cure_of_the_backward_is_the_natural_one():
    x = inputs()
    natural = kernel(*x, arithmetic=NATURAL)
    for cure in ("stored O", "delta"):
        got = kernel(*x, arithmetic=CURES[cure])
        assert torch.equal(got["o"], natural["o"]) and torch.equal(got["dv"], natural["dv"])
        assert not torch.equal(got["dq"], natural["dq"])


def test_without_o_in_delta_a_fault_of_o_is_not_felt():
    x = inputs()
    fault = layer("o", "backward", 7)
    table = {("o", "backward"): fault._table["o", "backward"]}
    clean, faulty = (run(*x, LayerNumerics(t, Arithmetic(delta="p"))) for t in ({}, table))
    assert all(torch.equal(clean[name], faulty[name]) for name in NAMES)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"pv_accumulation": "fp8"}, "pv_accumulation='fp8' is not allowed: one of fp32, bf16"),
        ({"stored_o": "fp64"}, "stored_o='fp64' .*bf16, fp32"),
        ({"delta": "q"}, "delta='q' .*o, p"),
        ({"row_max": "none"}, "row_max='none' .*plain, dynamic, offset"),
        ({"pv_block": 4}, "pv_block=4 .*goes with pv_accumulation=bf16 alone"),
        ({"pv_accumulation": "bf16", "pv_block": 0}, "pv_block=0 is not allowed: at least 1 key"),
        ({"beta": 2.0}, "beta=2.0 .*row_max=dynamic alone"),
        ({"row_max": "dynamic"}, "beta=None .*row_max=dynamic alone"),
        ({"row_max": "dynamic", "beta": 1.0}, "beta=1.0 is not allowed: above 1, at most 8"),
        ({"row_max": "offset", "offset": 0.0}, "offset=0.0 is not allowed: above 0"),
        ({"offset": 1.0}, "offset=1.0 .*row_max=offset alone"),
        ({"stored_o": "fp32", "delta": "p"}, "stored_o='fp32' has no effect with delta='p'"),
    ],
)
def test_an_impossible_or_idle_setting_is_refused_by_name(change, message):
    with pytest.raises(ValueError, match=message):
        Arithmetic(**change)


def test_the_fast_backend_refuses_another_arithmetic():
    with pytest.raises(ValueError, match="'sdpa' has no fault sites"):
        run(*inputs(T=4), LayerNumerics({}, NATURAL), backend="sdpa")


def test_non_finite_values_propagate():
    q, k, v, _ = inputs(T=6)
    v[0, 0, 3, 0] = math.inf
    o = flash_attention(q, k, v, LayerNumerics({}, NATURAL))
    assert o[0, 0, :3].isfinite().all() and not o[0, 0, 3:, 0].isfinite().any() and o[1:].isfinite().all()
