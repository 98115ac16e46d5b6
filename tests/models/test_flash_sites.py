"""The fault sites of the Triton attention: the same faults as the reference's, of the same size, at the same elements."""

import pytest
import torch

from models.bits import ROUNDINGS, BitOperation
from models.flash import _backward, _forward
from models.flash_faults import encode
from models.numerics import HEALTHY_LAYER, KEY_VALUE_SITES, AttentionNumerics, SiteFault
from tests.models.attention_in_fp64 import NAMES, REACH, distance, emulate, grid, inputs, layer, run
from tests.models.attention_in_triton import ONE_TILE, SMALL_TILES, output_in_tiles, run_triton

SMALL = {"B": 1, "H": 2, "G": 1, "T": 33}
DIRECT = {("o", "forward"): "o", ("dq", "backward"): "dq", ("dk", "backward"): "dk", ("dv", "backward"): "dv"}
FLAT_TILES = [64, 64, 4, 1] * 3
COUNT = torch.zeros((), dtype=torch.int64)


def forward(q, k, v, numerics=HEALTHY_LAYER):
    o, _, lse, _ = _forward(*(x.bfloat16() for x in (q, k, v)), COUNT, *encode(numerics), 0, FLAT_TILES)
    return o.float(), lse


def backward(q, k, v, o, lse, do, numerics=HEALTHY_LAYER):
    q, k, v, o, do = (x.bfloat16() for x in (q, k, v, o, do))
    return _backward(q, k, v, o, lse, do, *encode(numerics), 0, FLAT_TILES)[:3]


@pytest.mark.parametrize("rounding", ["truncate", "flip"])
@pytest.mark.parametrize(("site", "phase"), REACH)
def test_a_fault_reaches_the_outputs_that_the_equations_say(site, phase, rounding):
    x = inputs(**SMALL)
    healthy, faulty = run_triton(*x), run_triton(*x, layer(site, phase, 7, rounding))
    changed = {name for name in NAMES if not torch.equal(faulty[name], healthy[name])}
    assert changed == set(REACH[site, phase].split())


@pytest.mark.parametrize("bits", [2, 5, 7])
@pytest.mark.parametrize(("site", "phase"), REACH)
def test_a_fault_is_the_emulated_one_to_the_bit(site, phase, bits):
    """With one tile a row: five times closer to the emulation with this many bits than to one bit more or less."""
    x = inputs(**SMALL)
    faulty = run_triton(*x, layer(site, phase, bits))
    right, fewer, more = (emulate(*x, (site, phase, n)) for n in (bits, bits - 1, bits + 1))
    for name in REACH[site, phase].split():
        away = min(distance(faulty[name], fewer[name]), distance(faulty[name], more[name]))
        assert 5 * distance(faulty[name], right[name]) < away, name


@pytest.mark.parametrize("rounding", ROUNDINGS)
@pytest.mark.parametrize(("site", "phase"), DIRECT)
def test_a_fault_on_an_output_is_the_bit_operation_on_it(site, phase, rounding):
    """Bit for bit, at the elements of the share and nowhere else, with several tiles."""
    x = inputs(B=2, H=4, G=2, T=37, D=24)
    for share in (1.0, 0.3, 0.0):
        healthy = run_triton(*x, tiles=SMALL_TILES)
        faulty = run_triton(*x, layer(site, phase, 6, rounding, heads=(1,), share=share), tiles=SMALL_TILES)
        name = DIRECT[site, phase]
        operation = BitOperation(rounding, 6, share)
        expected = healthy[name].clone()
        expected[:, 1] = operation(expected[:, 1], operation.hits((37, 24), expected.device))
        assert torch.equal(faulty[name], expected)


@pytest.mark.parametrize("rounding", ROUNDINGS)
@pytest.mark.parametrize("share", [1.0, 0.4])
@pytest.mark.parametrize("index", [0, 1, 2])
def test_a_forward_fault_on_an_input_is_that_input_corrupted(index, share, rounding):
    x = inputs(**SMALL)[:3]
    operation = BitOperation(rounding, 5, share)
    corrupted = list(x)
    corrupted[index] = operation(x[index], operation.hits((33, 16), x[index].device))
    for got, expected in zip(
        forward(*x, layer("qkv"[index], "forward", 5, rounding, share=share)), forward(*corrupted), strict=True
    ):
        assert torch.equal(got, expected)


@pytest.mark.parametrize("rounding", ROUNDINGS)
@pytest.mark.parametrize("share", [1.0, 0.4])
@pytest.mark.parametrize("site", ["q", "k", "v", "o", "lse", "do"])
def test_a_backward_fault_on_a_saved_tensor_is_that_tensor_corrupted(site, share, rounding):
    q, k, v, do = inputs(**SMALL)
    saved = dict(zip(("q", "k", "v", "o", "lse", "do"), (q, k, v, *forward(q, k, v), do), strict=True))
    operation = BitOperation(rounding, 5, share)
    clean = saved[site].unsqueeze(-1) if site == "lse" else saved[site]
    corrupted = operation(clean, operation.hits(clean.shape[2:], clean.device)).view(saved[site].shape)
    got = backward(*saved.values(), layer(site, "backward", 5, rounding, share=share))
    for gradient, expected in zip(got, backward(*{**saved, site: corrupted}.values()), strict=True):
        assert torch.equal(gradient, expected)


@pytest.mark.parametrize("rounding", ROUNDINGS)
@pytest.mark.parametrize("share", [1.0, 0.3, 0.0])
def test_the_stored_p_and_ds_are_corrupted_bit_for_bit(share, rounding):
    """With dO = 1, dV is P^T; with Q = 1, dK is dS^T / sqrt(D): each tile element can be read off."""
    _, k, v, do = inputs(B=1, H=1, T=16)
    identity = torch.eye(16).expand(1, 1, 16, 16)
    operation = BitOperation(rounding, 3, share)
    hits = operation.hits((16, 16), k.device, causal=True)
    seen = torch.ones(16, 16, dtype=torch.bool).tril()

    def expected(stored):
        return torch.where(seen, operation(stored, hits), stored)

    for site, name, scale, x in (("p", "dv", 1, (k, k, v, identity)), ("ds", "dk", 4, (identity, k, v, do))):
        healthy, faulty = run_triton(*x), run_triton(*x, layer(site, "backward", 3, rounding, share=share))
        stored, corrupted = (y[name][0, 0].mT * scale for y in (healthy, faulty))
        assert torch.equal(corrupted, expected(stored)), site
        assert not torch.equal(corrupted, stored), site


@pytest.mark.parametrize("site", ["s", "p", "dp", "delta"])
@pytest.mark.parametrize("share", [0.3, 0.0])
def test_a_share_of_a_register_tile_is_the_reference_s(site, share):
    """A flipped exponent bit is far larger than what the order of sums can change."""
    x = inputs(**SMALL)
    healthy, faulty = run(*x), run(*x, layer(site, "backward", 10, "flip", share=share))
    got = run_triton(*x, layer(site, "backward", 10, "flip", share=share), tiles=SMALL_TILES)
    for name in REACH[site, "backward"].split():
        assert distance(got[name], faulty[name]) < 1e-3 * distance(healthy[name], faulty[name]), name


@pytest.mark.parametrize("bits", [2, 5, 7])
def test_a_forward_fault_on_p_meets_each_tile_as_it_is_stored(bits):
    """The tiles' own emulation to the bit; that of one tile a row is another fault."""
    x = inputs(**SMALL)

    def truncated(n, keys):
        return output_in_tiles(
            *x[:3],
            None,
            keys,
            lambda p: p.bfloat16().view(torch.int16).bitwise_and(-1 << n).view(torch.bfloat16).double(),
        )

    got = run_triton(*x, layer("p", "forward", bits), tiles=SMALL_TILES)["o"]
    right = distance(got, truncated(bits, 32))
    for other in (truncated(bits - 1, 32), truncated(bits + 1, 32), truncated(bits, 64)):
        assert 5 * right < distance(got, other)


@pytest.mark.parametrize(("site", "phase"), REACH)
def test_several_tiles_and_a_window_change_no_fault(site, phase):
    """On a grouped model, at 7 bits: no further from one tile a row than 2 % of the fault."""
    x = inputs(B=1, H=4, G=2, T=45)
    one, several = (run_triton(*x, layer(site, phase, 7), window=20, tiles=t) for t in (ONE_TILE, SMALL_TILES))
    healthy = run_triton(*x, window=20)
    for name in REACH[site, phase].split():
        assert distance(several[name], one[name]) < 0.05 * distance(healthy[name], one[name]), name


@pytest.mark.parametrize(("site", "phase"), REACH)
def test_a_fault_stays_in_the_heads_of_its_tensor(site, phase):
    x = inputs(B=1, H=4, G=2, T=20)
    healthy, everywhere, here = (
        run_triton(*x, n, tiles=SMALL_TILES)
        for n in (HEALTHY_LAYER, layer(site, phase, 6), layer(site, phase, 6, heads=(1,)))
    )
    for name in REACH[site, phase].split():
        by_query_head = site not in KEY_VALUE_SITES and name in ("o", "dq")
        if by_query_head:
            hit, rest = slice(1, 2), [0, 2, 3]
        elif name in KEY_VALUE_SITES and site in KEY_VALUE_SITES or name in KEY_VALUE_SITES:
            group = 1 if site in KEY_VALUE_SITES else 0
            hit, rest = slice(group, group + 1), [1 - group]
        else:
            hit, rest = slice(2, 4), [0, 1]
        assert torch.equal(here[name][:, rest], healthy[name][:, rest]), name
        assert not torch.equal(here[name][:, hit], healthy[name][:, hit]), name
        if site in KEY_VALUE_SITES or by_query_head:
            assert torch.equal(here[name][:, hit], everywhere[name][:, hit]), name


def test_heads_may_have_faults_of_different_size_and_share():
    x = inputs(B=1, H=3, T=20)
    faults = (
        SiteFault("o", "forward", "truncate", 3, heads=(0,)),
        SiteFault("o", "forward", "truncate", 6, heads=(2,), share=0.5),
    )
    both = run_triton(*x, AttentionNumerics(faults).layer(0))["o"]
    first, second = (run_triton(*x, AttentionNumerics((fault,)).layer(0))["o"] for fault in faults)
    assert torch.equal(both, torch.stack([first[:, 0], run_triton(*x)["o"][:, 1], second[:, 2]], 1))


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
@pytest.mark.parametrize(("site", "phase"), REACH)
def test_zero_bits_are_healthy_bit_for_bit(site, phase, rounding):
    assert not layer(site, phase, 0, rounding)
    code, table = encode(layer(site, phase, 0, rounding))
    assert not code and not table


@pytest.mark.parametrize("tiles", [ONE_TILE, SMALL_TILES])
def test_non_finite_values_at_a_fault_are_counted_once(tiles):
    """Though several query tiles and a whole group of query heads read a key; as often as in the reference."""
    q, k, v, do = inputs(B=1, H=4, G=2, T=40)
    do[0, 3, 2, 3] = torch.inf
    q[0, 0, 39, 1] = torch.nan
    k[0, 1, 5, 1], v[0, 1, 33, 0] = torch.nan, -torch.inf
    faults = tuple(SiteFault(s, "both", "truncate", 7) for s in "qkv") + (SiteFault("do", "backward", "truncate", 7),)
    numerics = AttentionNumerics(faults).layer(0)
    got, reference = torch.zeros((2,), dtype=torch.int64)
    run_triton(q, k, v, do, numerics, window=30, tiles=tiles, nonfinite=got)
    assert got.item() == 7
    leaves = [x.clone().requires_grad_() for x in (q, k, v)]
    from models.attention import flash_attention

    flash_attention(*leaves, numerics, reference, 30).backward(do)
    assert reference.item() == 7


@pytest.mark.parametrize(("site", "phase"), REACH)
def test_a_finite_run_counts_nothing_at_any_site(site, phase):
    events = torch.zeros((), dtype=torch.int64)
    run_triton(*inputs(B=1, H=1, T=4), layer(site, phase, 8), nonfinite=events)
    assert events.item() == 0
