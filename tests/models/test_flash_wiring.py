"""Wrong wirings in the Triton attention: the reference's masks and scales, alone and with everything else at once."""

from functools import lru_cache

import pytest
import torch

from foreshock.faults.log import InjectionLog
from foreshock.faults.logged_numerics import logged
from foreshock.models.arithmetic import Arithmetic
from foreshock.models.attention import attention, flash_attention
from foreshock.models.bits import BitOperation
from foreshock.models.flash import _forward, check_numerics
from foreshock.models.flash_faults import encode
from foreshock.models.numerics import HEALTHY_LAYER, AttentionNumerics, LayerNumerics, SiteFault
from foreshock.models.tiles import Tile, Tiles
from foreshock.models.wiring import Wiring
from tests.models.attention_in_fp64 import NAMES, allowed, distance, error_bounds, exact, inputs, run
from tests.models.attention_in_triton import ADDING_TILES, DEVICE, ONE_TILE, PLAIN, SMALL_TILES, run_triton

pytestmark = [pytest.mark.numeric, pytest.mark.triton]

WIDE_KEYS = Tiles(Tile(16, 32, 4, 1), Tile(32, 16, 4, 1), Tile(16, 32, 4, 1))
T = 53
"""No multiple of a tile."""

CASES = [  # wiring, query heads, key-value heads, window, tiles
    (Wiring(mask_shift=1), 1, 1, None, SMALL_TILES),
    (Wiring(mask_shift=1), 2, 1, 17, ADDING_TILES),
    (Wiring(mask_shift=4, heads=(1, 2)), 4, 2, None, SMALL_TILES),
    (Wiring(mask_shift=16), 1, 1, 1, WIDE_KEYS),
    (Wiring(mask_shift=20, heads=(1,), scalings=2), 2, 1, 40, ADDING_TILES),
    (Wiring(mask_shift=T - 2), 1, 1, None, WIDE_KEYS),
    (Wiring(mask_shift=T - 1, heads=(0,)), 2, 1, 7, SMALL_TILES),
    (Wiring(scalings=0), 2, 1, None, SMALL_TILES),
    (Wiring(scalings=2), 2, 2, 17, ADDING_TILES),
]


def wired(*wirings, faults=(), arithmetic=None):
    settings = {} if arithmetic is None else {"arithmetic": arithmetic}
    return AttentionNumerics(faults, wirings=wirings, **settings).layer(0)


def neighbours(wiring):
    """The wirings whose mask is off by one, or whose scale is applied once more."""
    shifts = [wiring.mask_shift - 1, wiring.mask_shift + 1] if wiring.mask_shift else []
    near = [Wiring(shift, wiring.scalings, heads=wiring.heads) for shift in shifts if shift < T - 1]
    return near if near else [Wiring(scalings=wiring.scalings + 1)]


@pytest.mark.parametrize(("wiring", "H", "G", "window", "tiles"), CASES, ids=str)
def test_output_and_gradients_are_those_of_softmax_attention_so_wired(wiring, H, G, window, tiles):
    """Every number within its bound, and a mask one key longer or shorter outside it."""
    x = inputs(B=1, H=H, G=G, T=T)
    got, right = run_triton(*x, wired(wiring), window, tiles), exact(*x, window, wiring)
    bounds = error_bounds(*x, window, wiring)
    for name in NAMES:
        assert ((got[name] - right[name]).abs() <= bounds[name]).all(), name
    for other in neighbours(wiring):
        wrong = exact(*x, window, other)
        for name in NAMES:
            assert ((wrong[name] - right[name]).abs() > 2 * bounds[name]).any(), (other, name)


@pytest.mark.parametrize("window", [None, 9])
@pytest.mark.parametrize(
    "wiring", [Wiring(mask_shift=3, heads=(1, 2)), Wiring(scalings=0), Wiring(mask_shift=T - 1, scalings=2)], ids=str
)
def test_in_one_tile_it_is_the_reference(wiring, window):
    """As many equal bits as of right attention: sums in another order round a few numbers to their neighbours."""
    x = inputs(B=1, H=4, G=2, T=T)
    got, expected = run_triton(*x, wired(wiring), window), run(*x, wired(wiring), window=window)
    for name in NAMES:
        assert (got[name] == expected[name])[:, :, 1:].double().mean() > 0.98, name


@pytest.mark.parametrize(("wiring", "H", "G", "window", "tiles"), CASES[1:5], ids=str)
def test_the_log_sum_exp_is_of_the_keys_that_are_seen(wiring, H, G, window, tiles):
    q, k, v, do = inputs(B=1, H=H, G=G, T=T)
    numerics, events = wired(wiring), torch.zeros((), dtype=torch.int64, device=DEVICE)
    tensors = (x.to(DEVICE, torch.bfloat16) for x in (q, k, v))
    lse = _forward(*tensors, events, *encode(numerics), window or 0, wiring.scale(16), tiles.flat(), PLAIN)[2].cpu()
    seen = [allowed(T, window, wiring.mask_shift if h in (wiring.heads or range(H)) else 0) for h in range(H)]
    s = q.double() @ k.double().repeat_interleave(H // G, 1).mT * wiring.scale(16)
    right = s.masked_fill(~torch.stack(seen), -torch.inf).logsumexp(-1)
    bound = error_bounds(q, k, v, do, window, wiring)["l"].squeeze(-1)
    assert ((lse - right).abs() <= bound).all()


@pytest.mark.parametrize("tiles", [SMALL_TILES, ADDING_TILES])
def test_heads_that_are_not_named_keep_the_bits_of_the_healthy_kernel(tiles):
    """And those that are named have the bits of a mask that is shifted in all heads."""
    x = inputs(B=1, H=3, G=3, T=T)
    some, every, healthy = (
        run_triton(*x, numerics, 30, tiles)
        for numerics in (wired(Wiring(mask_shift=5, heads=(1,))), wired(Wiring(mask_shift=5)), HEALTHY_LAYER)
    )
    for name in NAMES:
        assert torch.equal(some[name][:, 1], every[name][:, 1]), name
        assert torch.equal(some[name][:, ::2], healthy[name][:, ::2]), name
        assert not torch.equal(every[name], healthy[name]), name


def test_a_right_mask_and_scale_are_the_healthy_kernel():
    """Nothing is said to the kernel that would compile it otherwise; the scale is the same FP32 number."""
    numerics = LayerNumerics({}, wiring=Wiring(heads=(1,), kv_offset=1))
    assert encode(numerics) == encode(HEALTHY_LAYER) == ([], [])
    for d_head in range(16, 257, 8):
        assert torch.tensor(Wiring().scale(d_head)) == torch.tensor(d_head**-0.5), d_head


@pytest.mark.parametrize("wiring", [Wiring(mask_shift=1, heads=(0,)), Wiring(scalings=4), Wiring(kv_offset=1)])
@pytest.mark.parametrize("arithmetic", [None, Arithmetic(row_max="dynamic", beta=2.0), Arithmetic(delta="p")])
def test_nothing_of_it_is_refused(wiring, arithmetic):
    fault = SiteFault("ds", "backward", "flip", 3, share=0.5)
    check_numerics(wired(wiring, faults=(fault,), arithmetic=arithmetic), SMALL_TILES)


@lru_cache
def both_shifted(*faults):
    """What the reference and the kernel make of faults in their heads, of a mask that is shifted in all of them."""
    x, numerics = inputs(B=1, H=4, G=4, T=45), wired(Wiring(mask_shift=9), faults=faults)
    return run(*x, numerics, window=20), run_triton(*x, numerics, 20, SMALL_TILES)


@pytest.mark.parametrize(
    ("rounding", "bits", "share"), [("truncate", 7, 1.0), ("truncate", 7, 0.4), ("flip", 9, 1.0), ("flip", 9, 0.4)]
)
def test_a_fault_on_scores_under_a_shifted_mask_hits_the_elements_of_the_reference(rounding, bits, share):
    """s, p, dp and ds, each in a head of its own: all that is seen, or right keys alone where bits flip or a share is
    hit. A hit of the keys ahead, where the reference has none, would be an error as large as the fault.
    """
    sites = ("s", "p", "dp", "ds")
    faults = tuple(
        SiteFault(site, "backward", rounding, bits, heads=(head,), share=share) for head, site in enumerate(sites)
    )
    (right, got), (clean, _) = both_shifted(*faults), both_shifted()
    for head, site in enumerate(sites):
        for name in ("dq", "dk", "dv") if site in ("s", "p") else ("dq", "dk"):
            mine, expected, before = (x[name][:, head] for x in (got, right, clean))
            assert distance(mine, expected) < 0.1 * distance(before, expected), (site, name)


@pytest.mark.parametrize(("rounding", "share"), [("truncate", 1.0), ("truncate", 0.3), ("flip", 1.0), ("flip", 0.3)])
def test_the_stored_p_and_ds_under_a_shifted_mask_are_corrupted_bit_for_bit(rounding, share):
    """Read off as in ``test_flash_sites``: dV is P^T where dO = 1, dK is dS^T / sqrt(D) where Q = 1. One head has the
    share, the other all of its elements.
    """
    _, k, v, do = (x.repeat(1, 2, 1, 1) for x in inputs(B=1, H=1, T=16))
    identity = torch.eye(16).expand(1, 2, 16, 16)
    wiring, seen = Wiring(mask_shift=3), allowed(16, None, 3)
    for site, name, scale, x in (("p", "dv", 1, (k, k, v, identity)), ("ds", "dk", 4, (identity, k, v, do))):
        shares = (share, 1.0)
        faults = tuple(SiteFault(site, "backward", rounding, 3, heads=(h,), share=s) for h, s in enumerate(shares))
        stored, corrupted = (run_triton(*x, wired(wiring, faults=which))[name][0].mT * scale for which in ((), faults))
        for head, of_head in enumerate(shares):
            operation = BitOperation(rounding, 3, of_head)
            hit = operation(stored[head], operation.hits((16, 16), k.device, causal=True))
            assert torch.equal(corrupted[head], torch.where(seen, hit, stored[head])), (site, head)
            assert not torch.equal(corrupted[head], stored[head]), (site, head)


@pytest.mark.parametrize("tiles", [ONE_TILE, SMALL_TILES, ADDING_TILES])
def test_non_finite_values_are_counted_once_where_later_keys_are_read(tiles):
    """Each key and each query by the tile that it is counted in under the right mask, free of a mask or not."""
    q, k, v, do = inputs(B=1, H=4, G=2, T=40)
    do[0, 3, 2, 3], q[0, 0, 39, 1] = torch.inf, torch.nan
    k[0, 1, 5, 1], v[0, 1, 33, 0] = torch.nan, -torch.inf
    faults = (SiteFault("do", "backward", "truncate", 7), *(SiteFault(s, "both", "truncate", 7) for s in "qkv"))
    numerics = wired(Wiring(mask_shift=36), faults=faults)
    got, expected = torch.zeros(2, dtype=torch.int64).unbind()
    run_triton(q, k, v, do, numerics, tiles=tiles, nonfinite=got)
    flash_attention(*(x.clone().requires_grad_() for x in (q, k, v)), numerics, expected).backward(do)
    assert got.item() == expected.item() == 7


@pytest.mark.parametrize(
    ("arithmetic", "tiles"),
    [
        (Arithmetic(row_max="dynamic", beta=2.0), SMALL_TILES),
        (Arithmetic(row_max="offset", offset=0.3, delta="p"), ONE_TILE),
        (Arithmetic(stored_o="fp32"), ONE_TILE),
    ],
    ids=repr,
)
def test_every_arithmetic_under_a_shifted_mask_and_another_scale_is_the_reference_s(arithmetic, tiles):
    x, wiring = inputs(B=1, H=2, G=1, T=45), Wiring(mask_shift=6, scalings=0, heads=(1,))
    x[1][:, :, 1::2] = x[1][:, :, :-1:2]  # keys in pairs, so that largest scores repeat, which moves a row's maximum
    numerics = wired(wiring, arithmetic=arithmetic)
    got, expected = run_triton(*x, numerics, 30, tiles), run(*x, numerics, window=30)
    ordinary = run(*x, wired(wiring), window=30)
    for name in NAMES:
        assert (got[name] == expected[name])[:, :, 1:].double().mean() > 0.98, name
    assert not torch.equal(expected["dq"], ordinary["dq"])


def test_a_running_sum_in_bf16_has_another_scale_as_in_the_reference():
    x, numerics = inputs(B=1, H=2, G=1, T=45), wired(Wiring(scalings=2), arithmetic=Arithmetic("bf16", 64))
    got, expected = run_triton(*x, numerics, 30), run(*x, numerics, window=30)
    for name in NAMES:
        assert (got[name] == expected[name])[:, :, 1:].double().mean() > 0.98, name


@pytest.mark.parametrize(
    "wiring", [Wiring(mask_shift=2, heads=(0, 3)), Wiring(mask_shift=1, scalings=2, kv_offset=1)], ids=str
)
def test_the_log_has_what_it_has_of_the_reference(wiring):
    q, k, v, _ = inputs(B=1, H=4, G=2, T=20)
    entries = []
    for backend in ("reference", "triton"):
        log = InjectionLog()
        numerics = logged(AttentionNumerics(wirings=(wiring,)), (log,), backend).layer(0)
        none = torch.zeros((), dtype=torch.int64, device=DEVICE)
        attention(
            *(x.to(DEVICE) for x in (q, k, v)),
            backend=backend,
            numerics=numerics,
            nonfinite=none,
            window=7,
            tiles=ONE_TILE,
        )
        entries.append(log.entries())
    assert entries[0] == entries[1] and len(entries[0]) == len(wiring.wrong)
