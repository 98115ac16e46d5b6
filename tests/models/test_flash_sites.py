"""The fault sites of the Triton attention: the reference's faults, of the same size, at the same elements."""

from functools import lru_cache

import pytest
import torch

from foreshock.models.attention import flash_attention
from foreshock.models.bits import ROUNDINGS, BitOperation, truncate
from foreshock.models.flash import _backward, _forward
from foreshock.models.flash_faults import encode
from foreshock.models.numerics import HEALTHY_LAYER, KEY_VALUE_SITES, AttentionNumerics, SiteFault
from tests.models.attention_in_fp64 import NAMES, REACH, distance, emulate, inputs, layer, run
from tests.models.attention_in_triton import (
    ADDING_TILES,
    DEVICE,
    ONE_TILE,
    PLAIN,
    SMALL_TILES,
    output_in_tiles,
    run_triton,
)

pytestmark = pytest.mark.triton

SMALL = {"B": 1, "H": 2, "G": 1, "T": 33}
DIRECT = {("o", "forward"): "o", ("dq", "backward"): "dq", ("dk", "backward"): "dk", ("dv", "backward"): "dv"}
COVER = [("truncate", 1.0), ("round_half_up", 0.3), ("flip", 0.0), ("flip", 1.0)]  # rounding, share


@lru_cache
def healthy_run(tiles=ONE_TILE, window=None, **sizes):
    return run_triton(*inputs(**sizes), tiles=tiles, window=window)


def forward(q, k, v, numerics=HEALTHY_LAYER):
    """O and L."""
    events = torch.zeros((), dtype=torch.int64, device=DEVICE)
    o, _, lse, _ = _forward(
        *(x.to(DEVICE, torch.bfloat16) for x in (q, k, v)),
        events,
        *encode(numerics),
        0,
        0.25,
        [64, 64, 4, 1] * 3,
        PLAIN,
    )
    return o.float().cpu(), lse.cpu()


def backward(q, k, v, o, lse, do, numerics=HEALTHY_LAYER):
    """dQ, dK, dV from saved tensors."""
    q, k, v, o, do = (x.to(DEVICE, torch.bfloat16) for x in (q, k, v, o, do))
    gradients = _backward(q, k, v, o, lse.to(DEVICE), do, *encode(numerics), 0, 0.25, [64, 64, 4, 1] * 3, PLAIN)[:3]
    return [gradient.cpu() for gradient in gradients]


@pytest.mark.parametrize("bits", [2, 6])
@pytest.mark.parametrize(("site", "phase"), REACH)
def test_a_fault_is_the_emulated_one_to_the_bit(site, phase, bits):
    """In the outputs that the equations say, five times closer to this many bits than to one bit more or less."""
    x, healthy = inputs(**SMALL), healthy_run(**SMALL)
    faulty = run_triton(*x, layer(site, phase, bits))
    assert {name for name in NAMES if not torch.equal(faulty[name], healthy[name])} == set(REACH[site, phase].split())
    right, fewer, more = (emulate(*x, (site, phase, n)) for n in (bits, bits - 1, bits + 1))
    for name in REACH[site, phase].split():
        away = min(distance(faulty[name], fewer[name]), distance(faulty[name], more[name]))
        assert 5 * distance(faulty[name], right[name]) < away, name


@pytest.mark.parametrize(("rounding", "share"), COVER)
@pytest.mark.parametrize(("site", "phase"), DIRECT)
def test_a_fault_on_an_output_is_the_bit_operation_on_it(site, phase, rounding, share):
    """Bit for bit, at the elements of the share and nowhere else, with several tiles."""
    sizes = {"B": 1, "H": 2, "G": 2, "T": 37, "D": 24}
    faulty = run_triton(*inputs(**sizes), layer(site, phase, 6, rounding, heads=(1,), share=share), tiles=SMALL_TILES)
    name, operation = DIRECT[site, phase], BitOperation(rounding, 6, share)
    expected = healthy_run(SMALL_TILES, **sizes)[name].clone()
    expected[:, 1] = operation(expected[:, 1], operation.hits((37, 24), expected.device))
    assert torch.equal(faulty[name], expected)


@pytest.mark.parametrize(("rounding", "share"), COVER)
@pytest.mark.parametrize("site", ["q", "k", "v"])
def test_a_forward_fault_on_an_input_is_that_input_corrupted(site, rounding, share):
    clean = dict(zip("qkv", inputs(**SMALL), strict=False))
    operation = BitOperation(rounding, 5, share)
    corrupted = operation(clean[site], operation.hits((33, 16), clean[site].device))
    got = forward(*clean.values(), layer(site, "forward", 5, rounding, share=share))
    for tensor, expected in zip(got, forward(*{**clean, site: corrupted}.values()), strict=True):
        assert torch.equal(tensor, expected)


@pytest.mark.parametrize(("rounding", "share"), COVER)
@pytest.mark.parametrize("site", ["q", "k", "v", "o", "lse", "do"])
def test_a_backward_fault_on_a_saved_tensor_is_that_tensor_corrupted(site, rounding, share):
    q, k, v, do = inputs(**SMALL)
    saved = dict(zip(("q", "k", "v", "o", "lse", "do"), (q, k, v, *forward(q, k, v), do), strict=True))
    operation = BitOperation(rounding, 5, share)
    clean = saved[site].unsqueeze(-1) if site == "lse" else saved[site]
    corrupted = operation(clean, operation.hits(clean.shape[2:], clean.device)).view(saved[site].shape)
    got = backward(*saved.values(), layer(site, "backward", 5, rounding, share=share))
    for gradient, expected in zip(got, backward(*{**saved, site: corrupted}.values()), strict=True):
        assert torch.equal(gradient, expected)


@pytest.mark.parametrize(("rounding", "share"), COVER)
def test_the_stored_p_and_ds_are_corrupted_bit_for_bit(rounding, share):
    """With dO = 1, dV is P^T; with Q = 1, dK is dS^T / sqrt(D): each element of the tile can be read off."""
    _, k, v, do = inputs(B=1, H=1, T=16)
    identity = torch.eye(16).expand(1, 1, 16, 16)
    operation, seen = BitOperation(rounding, 3, share), torch.ones(16, 16, dtype=torch.bool).tril()
    for site, name, scale, x in (("p", "dv", 1, (k, k, v, identity)), ("ds", "dk", 4, (identity, k, v, do))):
        numerics = layer(site, "backward", 3, rounding, share=share)
        stored, corrupted = (run_triton(*x, n)[name][0, 0].mT * scale for n in (HEALTHY_LAYER, numerics))
        expected = operation(stored, operation.hits((16, 16), k.device, causal=True))
        assert torch.equal(corrupted, torch.where(seen, expected, stored)), site
        assert not torch.equal(corrupted, stored), site


@pytest.mark.parametrize(("site", "share"), [("s", 0.3), ("p", 0.3), ("dp", 0.0), ("delta", 0.3)])
def test_a_share_of_a_register_tile_is_the_reference_s(site, share):
    """A flipped exponent bit in another element would be an error as large as the fault."""
    x, numerics = inputs(**SMALL), layer(site, "backward", 10, "flip", share=share)
    healthy, faulty, got = run(*x), run(*x, numerics), run_triton(*x, numerics, tiles=SMALL_TILES)
    for name in REACH[site, "backward"].split():
        assert distance(got[name], faulty[name]) < 0.05 * distance(healthy[name], faulty[name]), name


@pytest.mark.parametrize("bits", [3, 6])
def test_a_forward_fault_on_p_meets_each_tile_as_it_is_stored(bits):
    """The emulation with the kernel's tiles, to the bit; one tile a row makes another error of the same size."""
    x = inputs(**SMALL)

    def emulated(n, keys):
        return output_in_tiles(*x[:3], None, keys, lambda p: truncate(p.bfloat16(), n).double())

    got, keys = run_triton(*x, layer("p", "forward", bits), tiles=SMALL_TILES)["o"], SMALL_TILES.forward.keys
    right = distance(got, emulated(bits, keys))
    for other in (emulated(bits - 1, keys), emulated(bits + 1, keys), emulated(bits, 64)):
        assert 5 * right < distance(got, other)


IN_TILES = [(*key, SMALL_TILES) for key in REACH if key != ("p", "forward")]
IN_TILES += [(*key, ADDING_TILES) for key in REACH if key[1] == "backward"]


@pytest.mark.parametrize(
    ("site", "phase", "tiles"),
    [pytest.param(*case, marks=() if case[0] in ("o", "ds") else pytest.mark.slow) for case in IN_TILES],
)
def test_tiles_and_a_window_change_no_fault(site, phase, tiles):
    """On grouped heads, at 7 bits: as near to the reference as the roundings of the online softmax let it."""
    sizes = {"B": 1, "H": 2, "G": 1, "T": 45}
    x, numerics = inputs(**sizes), layer(site, phase, 7)
    got, faulty = run_triton(*x, numerics, 20, tiles), run(*x, numerics, window=20)
    healthy = run(*x, window=20)
    for name in REACH[site, phase].split():
        assert distance(got[name], faulty[name]) < 0.1 * distance(healthy[name], faulty[name]), name


def heads_hit(site, name):
    """Which heads of an output a fault on head 1 reaches, of 4 query heads that share 2 key-value heads."""
    if name in KEY_VALUE_SITES:
        return [1] if site in KEY_VALUE_SITES else [0]
    return [2, 3] if site in KEY_VALUE_SITES else [1]


@pytest.mark.parametrize(("site", "phase"), REACH)
def test_a_fault_stays_in_the_heads_of_its_tensor(site, phase):
    sizes = {"B": 1, "H": 4, "G": 2, "T": 9}
    healthy, faulty = healthy_run(**sizes), run_triton(*inputs(**sizes), layer(site, phase, 6, heads=(1,)))
    for name in REACH[site, phase].split():
        changed = (faulty[name] != healthy[name]).any(-1).any(-1)[0].nonzero().flatten().tolist()
        assert changed == heads_hit(site, name), name


def test_heads_may_have_faults_of_different_size_and_share():
    x = inputs(B=1, H=3, T=20)
    faults = (
        SiteFault("o", "forward", "truncate", 3, heads=(0,)),
        SiteFault("o", "forward", "truncate", 6, heads=(2,), share=0.5),
    )
    both = forward(*x[:3], AttentionNumerics(faults).layer(0))[0]
    first, second = (forward(*x[:3], AttentionNumerics((fault,)).layer(0))[0] for fault in faults)
    assert torch.equal(both, torch.stack([first[:, 0], forward(*x[:3])[0][:, 1], second[:, 2]], 1))
    assert not torch.equal(first, second)


def test_one_site_of_a_pass_has_one_rounding():
    faults = tuple(
        SiteFault("q", "forward", rounding, 3, heads=(head,)) for head, rounding in enumerate(("truncate", "flip"))
    )
    with pytest.raises(ValueError, match="site 'q': the Triton kernel does one rounding a pass"):
        run_triton(*inputs(T=2), AttentionNumerics(faults).layer(0))


def test_a_fault_on_a_head_that_is_not_there_is_an_error():
    with pytest.raises(ValueError, match=r"heads=\[2\] does not fit site 'dk': it has 2, 0 to 1"):
        run_triton(*inputs(H=4, G=2, T=2), layer("dk", "backward", 3, heads=(2,)))


@pytest.mark.parametrize("rounding", ROUNDINGS)
def test_zero_bits_are_healthy_bit_for_bit(rounding):
    """They are compiled to the kernel without faults."""
    numerics = AttentionNumerics(tuple(SiteFault(site, phase, rounding, 0) for site, phase in REACH)).layer(0)
    assert encode(numerics) == ([], [])


@pytest.mark.parametrize("tiles", [ONE_TILE, SMALL_TILES, ADDING_TILES])
def test_non_finite_values_at_a_fault_are_counted_once(tiles):
    """Though several query tiles and a whole group of query heads read a key; as often as in the reference."""
    q, k, v, do = inputs(B=1, H=4, G=2, T=40)
    do[0, 3, 2, 3] = torch.inf
    q[0, 0, 39, 1] = torch.nan
    k[0, 1, 5, 1], v[0, 1, 33, 0] = torch.nan, -torch.inf
    faults = (SiteFault("do", "backward", "truncate", 7), *(SiteFault(s, "both", "truncate", 7) for s in "qkv"))
    numerics = AttentionNumerics(faults).layer(0)
    got, expected = torch.zeros(2, dtype=torch.int64).unbind()
    run_triton(q, k, v, do, numerics, window=30, tiles=tiles, nonfinite=got)
    flash_attention(*(x.clone().requires_grad_() for x in (q, k, v)), numerics, expected, 30).backward(do)
    assert got.item() == expected.item() == 7


@pytest.mark.parametrize(
    ("site", "count"), [("q", 1), ("lse", 1), ("s", 7), ("p", 7), ("dp", 7), ("ds", 14), ("dq", 32)]
)
@pytest.mark.parametrize("tiles", [ONE_TILE, SMALL_TILES, ADDING_TILES])
def test_what_a_query_s_gradient_reads_is_counted_once(tiles, site, count):
    """One query and another one's dO are NaN, and with each a row of scores, as long as its window."""
    q, k, v, do = inputs(B=1, H=1, T=40)
    q[0, 0, 38, 3], do[0, 0, 20, 5] = torch.nan, torch.nan
    got = torch.zeros((), dtype=torch.int64)
    run_triton(q, k, v, do, layer(site, "backward", 3), window=7, tiles=tiles, nonfinite=got)
    assert got.item() == count


@pytest.mark.parametrize(("site", "phase"), REACH)
def test_a_finite_run_counts_nothing_at_any_site(site, phase):
    """Not even the -inf of masked scores."""
    events = torch.zeros((), dtype=torch.int64)
    run_triton(*inputs(B=1, H=1, T=4), layer(site, phase, 8), nonfinite=events)
    assert events.item() == 0
