"""The arithmetics of the Triton attention: the reference's where a tile holds a row, else those of its tiles."""

import pytest
import torch

from foreshock.models.arithmetic import ORDINARY, ROUNDS_TO_ONE, Arithmetic
from foreshock.models.attention import flash_attention
from foreshock.models.flash import _forward, check_numerics
from foreshock.models.flash_arithmetic import encode_arithmetic
from foreshock.models.numerics import HEALTHY_LAYER, KEY_VALUE_SITES, AttentionNumerics, LayerNumerics, SiteFault
from foreshock.models.tiles import Tile, Tiles
from tests.models.attention_in_fp64 import NAMES, distance, exact, inputs, run
from tests.models.attention_in_triton import DEVICE, ONE_TILE, SMALL_TILES, output_in_tiles, run_triton

pytestmark = [pytest.mark.numeric, pytest.mark.triton]

ARITHMETICS = [
    Arithmetic("bf16"),
    Arithmetic("bf16", 128),
    Arithmetic("bf16", stored_o="fp32"),
    Arithmetic("bf16", 64, stored_o="fp32"),
    Arithmetic(stored_o="fp32"),
    Arithmetic(delta="p"),
    Arithmetic("bf16", delta="p"),
    Arithmetic(row_max="dynamic", beta=2.0),
    Arithmetic("bf16", delta="p", row_max="dynamic", beta=7.5),
    Arithmetic("bf16", row_max="offset", offset=0.3),
    Arithmetic(row_max="offset", offset=2.0, stored_o="fp32"),
]


def tied():
    """q, k, v, dO where most later rows have their maximum twice, in one tile or in two."""
    q, k, v, do = inputs(B=1, H=2, G=1, T=45)
    k[:, :, 30], k[:, :, 21] = k[:, :, 12], k[:, :, 20]
    q[:, :, 22:30] += 2 * k[:, :, 20:21]
    q[:, :, 31:] += 2 * k[:, :, 12:13]
    return q.bfloat16().float(), k, v, do


def changed(name, arithmetic):
    """Whether the arithmetic reaches an output, in the inputs above."""
    if arithmetic.pv_accumulation == "bf16" or arithmetic.row_max != "plain":
        return name in ("o", "dq", "dk")
    return name in ("dq", "dk")


def same(got, expected):
    """The share of equal numbers; the first query sees one key, so that its dQ is FP32 noise."""
    return (got == expected)[:, :, 1:].double().mean().item()


@pytest.mark.parametrize("window", [None, 30])
@pytest.mark.parametrize("arithmetic", ARITHMETICS, ids=repr)
def test_in_one_tile_it_is_the_reference(arithmetic, window):
    x, numerics = tied(), LayerNumerics({}, arithmetic)
    got, expected = run_triton(*x, numerics, window), run(*x, numerics, window=window)
    ordinary = run_triton(*x, HEALTHY_LAYER, window)
    for name in NAMES:
        assert same(got[name], expected[name]) > 0.98, name
        if changed(name, arithmetic):
            assert same(got[name], ordinary[name]) < 0.97, name


@pytest.mark.parametrize("window", [None, 30])
@pytest.mark.parametrize("block", [16, 32, 64])
def test_a_running_sum_in_bf16_is_rounded_where_a_block_of_tiles_ends(block, window):
    x = tied()
    got = run_triton(*x, LayerNumerics({}, Arithmetic("bf16", block)), window, SMALL_TILES)["o"]
    right, *others = (output_in_tiles(*x[:3], window, 16, block=b) for b in (block, *{16, 32, 64, None} - {block}))
    assert same(got, right) > 0.98
    assert max(same(got, other) for other in others) < 0.95


@pytest.mark.parametrize("window", [None, 30])
def test_a_sum_rounded_once_and_an_offset_are_the_same_in_tiles(window):
    x = tied()
    got = run_triton(*x, LayerNumerics({}, Arithmetic("bf16", row_max="offset", offset=0.4)), window, SMALL_TILES)["o"]
    right, other = (output_in_tiles(*x[:3], window, 16, block=64, offset=offset) for offset in (0.4, 0.0))
    assert same(got, right) > 0.98 and same(got, other) < 0.9


@pytest.mark.parametrize("window", [None, 30])
@pytest.mark.parametrize("beta", [1.5, 8.0])
def test_a_maximum_that_moves_is_exact_in_any_tiles(beta, window):
    """What is subtracted from a row is known before its first tile is, so no tile is scaled again."""
    x, numerics = tied(), LayerNumerics({}, Arithmetic(row_max="dynamic", beta=beta))
    got, expected = run_triton(*x, numerics, window, SMALL_TILES), run(*x, numerics, window=window)
    for name in NAMES:
        assert same(got[name], expected[name]) > 0.98, name
    assert same(got["o"], run(*x, window=window)["o"]) < 0.97


@pytest.mark.parametrize(("last", "moves"), [(0, True), (1, True), (3, False), (-1, True), (-3, False)])
def test_a_repeat_may_be_in_another_tile_and_differ_by_less_than_bf16_can_say(last, moves):
    """The last row's largest scores are 1/8 in the first tile and 1/8 + last/1024 in the third."""
    assert 2.0**-10 < -ROUNDS_TO_ONE < 3 * 2.0**-10
    q, k = torch.zeros(1, 1, 48, 16), torch.zeros(1, 1, 48, 16)
    q[..., 0], k[..., 0], k[..., 7, 0], k[..., 40, 0] = 4.0, -1.0, 0.125, 0.125 + last * 2.0**-10
    v, do = (x[:, :1, :48] for x in inputs(B=1, H=1, T=48)[2:])
    numerics = LayerNumerics({}, Arithmetic(row_max="dynamic", beta=2.0))
    got, right, plain = (
        run_triton(q, k, v, do, numerics, tiles=SMALL_TILES)["o"],
        run(q, k, v, do, numerics)["o"],
        run(q, k, v, do)["o"],
    )
    assert torch.equal(got[0, 0, -1], right[0, 0, -1])
    assert torch.equal(got[0, 0, -1], plain[0, 0, -1]) != moves


@pytest.mark.parametrize("tiles", [ONE_TILE, SMALL_TILES])
def test_the_fp32_o_is_that_of_fp32_sums_and_is_not_returned(tiles):
    q, k, v, _ = (x.to(DEVICE, torch.bfloat16) for x in tied())
    block = tiles.forward.keys

    def forward(arithmetic):
        way, events = encode_arithmetic(arithmetic, block), torch.zeros((), dtype=torch.int64, device=DEVICE)
        return _forward(q, k, v, events, [], [], 0, 0.25, tiles.flat(), way)[:2]

    ordinary, nothing = forward(ORDINARY)
    natural, _ = forward(Arithmetic("bf16", block))
    of_ordinary, kept = forward(Arithmetic(stored_o="fp32"))
    of_natural, kept_too = forward(Arithmetic("bf16", block, stored_o="fp32"))
    assert nothing.numel() == 0 and kept.dtype is torch.float32
    assert (
        torch.equal(of_ordinary, ordinary) and torch.equal(of_natural, natural) and not torch.equal(natural, ordinary)
    )
    assert torch.equal(kept, kept_too) and torch.equal(kept.bfloat16(), ordinary) and not torch.equal(kept, ordinary)


@pytest.mark.parametrize("tiles", [ONE_TILE, pytest.param(SMALL_TILES, marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    "arithmetic",
    [
        Arithmetic(delta="p"),
        pytest.param(Arithmetic(stored_o="fp32"), marks=pytest.mark.slow),
        pytest.param(Arithmetic("bf16"), marks=pytest.mark.slow),
    ],
)
def test_a_fault_meets_every_arithmetic_as_in_the_reference(arithmetic, tiles):
    """Each site in a group of heads of its own: one kernel shows them all."""
    sites = {"q": 6, "p": 7, "v": 6, "o": 7, "lse": 5, "do": 6, "dp": 7, "delta": 6}
    groups = len(sites)
    x = inputs(B=1, H=2 * groups, G=groups, T=40)
    faults = tuple(
        SiteFault(site, "backward", "truncate", bits, heads=(group,) if site in KEY_VALUE_SITES else (2 * group,))
        for group, (site, bits) in enumerate(sites.items())
    )
    healthy, numerics = LayerNumerics({}, arithmetic), AttentionNumerics(faults, arithmetic).layer(0)
    got = run_triton(*x, numerics, 30, tiles)
    faulty, clean = run(*x, numerics, window=30), run(*x, healthy, window=30)
    for group, site in enumerate(sites):
        for name in NAMES[1:]:
            mine, right, before = (found[name].unflatten(1, (groups, -1))[:, group] for found in (got, faulty, clean))
            assert distance(mine, right) < max(0.1 * distance(before, right), 2.0**-8), (site, name)


@pytest.mark.parametrize("tiles", [ONE_TILE, SMALL_TILES])
def test_non_finite_values_are_counted_once_where_delta_reads_no_o(tiles):
    q, k, v, do = inputs(B=1, H=4, G=2, T=40)
    do[0, 3, 2, 3], q[0, 0, 39, 1], k[0, 1, 5, 1] = torch.inf, torch.nan, torch.nan
    faults = tuple(SiteFault(site, "backward", "truncate", 3) for site in ("q", "k", "v", "o", "do"))
    numerics = AttentionNumerics(faults, Arithmetic(delta="p")).layer(0)
    got, expected = torch.zeros(2, dtype=torch.int64).unbind()
    run_triton(q, k, v, do, numerics, window=30, tiles=tiles, nonfinite=got)
    flash_attention(*(x.clone().requires_grad_() for x in (q, k, v)), numerics, expected, 30).backward(do)
    assert got.item() == expected.item() == 3


@pytest.mark.parametrize(
    "arithmetic",
    [pytest.param(a, marks=() if i % 4 == 0 else pytest.mark.slow) for i, a in enumerate(ARITHMETICS)],
    ids=repr,
)
def test_every_arithmetic_is_attention_but_for_its_rounding(arithmetic):
    x = inputs(B=1, H=4, G=2, T=150)
    tiles = Tiles(*[Tile(64, 64, 4, 1)] * 3)
    got, right = run_triton(*x, LayerNumerics({}, arithmetic), 100, tiles), exact(*x, window=100)
    for name in NAMES:
        assert distance(got[name], right[name]) < (2.0**-5 if arithmetic.pv_accumulation == "bf16" else 2.0**-7), name


@pytest.mark.parametrize("block", [1, 24, 65])
def test_a_block_that_cuts_a_tile_is_refused(block):
    with pytest.raises(ValueError, match=f"pv_block={block} is not allowed by .*null, or a multiple of the 16 keys"):
        check_numerics(LayerNumerics({}, Arithmetic("bf16", block)), SMALL_TILES)
