"""Grouped key-value heads and sliding windows: the same equations with fewer keys, and faults in the right heads."""

import pytest
import torch

from foreshock.models.attention import attention, flash_attention
from foreshock.models.bits import ROUNDINGS
from foreshock.models.numerics import HEALTHY_LAYER, KEY_VALUE_SITES
from foreshock.models.visibility import visible_keys
from tests.models.attention_in_fp64 import NAMES, REACH, allowed, distance, emulate, exact, inputs, layer, run, shared

pytestmark = pytest.mark.numeric

SHAPES = [  # query heads, key-value heads, window, tokens: every pair of values of any two occurs
    (4, 4, None, 33),
    (4, 2, 7, 33),
    (4, 1, 1, 1),
    (4, 1, 33, 33),
    (6, 2, None, 1),
    (6, 6, 7, 64),
    (6, 3, 1, 33),
    (6, 1, 7, 33),
    (6, 2, 64, 64),
    (4, 2, 1, 64),
    (4, 1, None, 64),
]
GROUPED = {"H": 4, "G": 2, "T": 33}
WINDOW = 9


@pytest.mark.parametrize(("H", "G", "window", "T"), SHAPES)
def test_output_and_gradients_are_those_of_masked_softmax_with_repeated_heads(H, G, window, T):
    x = inputs(H=H, G=G, T=T)
    got, rounded, right = run(*x, window=window), emulate(*x, window=window), exact(*x, window=window)
    assert got["dk"].shape == got["dv"].shape == x[1].shape
    single = min(window or T, T) == 1  # one key a query: P = 1, dS = 0 up to FP32 noise
    for name in ("o", "dv") if single else NAMES:
        assert distance(got[name], right[name]) < 2.0**-7, name
        same = got[name] == rounded[name]
        assert (same[:, :, 1:] if name == "dq" else same).double().mean() > 0.98, name
        assert torch.equal(got[name], got[name].bfloat16().float()), name


@pytest.mark.parametrize(("H", "G", "window", "T"), SHAPES)
def test_the_fast_backend_in_fp64_is_exact(H, G, window, T):
    x = [t.double() for t in inputs(H=H, G=G, T=T)]
    got, right = run(*x, backend="sdpa", window=window), exact(*x, window=window)
    for name in NAMES:
        torch.testing.assert_close(got[name], right[name], rtol=1e-10, atol=1e-12, msg=name)


@pytest.mark.parametrize("backend", ["reference", "sdpa"])
@pytest.mark.parametrize("window", [33, 34, 1000])
def test_a_window_of_all_tokens_is_none_bit_for_bit(backend, window):
    x = inputs(**GROUPED)
    expected = run(*x, backend=backend)
    for name, tensor in run(*x, backend=backend, window=window).items():
        assert torch.equal(tensor, expected[name]), name


@pytest.mark.parametrize("window", [None, WINDOW])
def test_a_query_head_reads_the_keys_of_its_group(window):
    """With K and V written out for every query head, O and dQ are the same up to the order of FP32 sums."""
    q, k, v, do = inputs(**GROUPED)
    grouped, repeated = run(q, k, v, do, window=window), run(q, shared(k, 4), shared(v, 4), do, window=window)
    for name in ("o", "dq"):
        assert (grouped[name] == repeated[name])[:, :, 1:].double().mean() > 0.98, name


@pytest.mark.parametrize(("T", "window"), [(1, 1), (7, 1), (7, 3), (7, None), (7, 9)])
def test_visible_keys_are_the_last_of_the_window(T, window):
    assert torch.equal(visible_keys(T, window), allowed(T, window))


@pytest.mark.parametrize("rounding", ROUNDINGS)
@pytest.mark.parametrize(("site", "phase"), REACH)
def test_what_a_query_does_not_see_does_not_reach_it_nor_it_that(site, rounding, phase):
    """Even where every visible element of a fault's site has a bit flipped: the masked ones keep their zeros."""
    q, k, v, do = inputs(H=4, G=2, T=20)
    i, j = 15, 6  # a query, and a key that it sees no more
    t, faulty = torch.arange(20)[:, None], layer(site, phase, 7, rounding)
    first = run(q, k, v, do, faulty, window=WINDOW)
    unseen, blind = (t > i) | (t <= i - WINDOW), (t < j) | (t >= j + WINDOW)
    assert unseen[j] and blind[i]
    keys = run(q, *(torch.where(unseen, x.roll(1, -1), x) for x in (k, v)), do, faulty, window=WINDOW)
    for name in ("o", "dq"):
        assert torch.equal(keys[name][:, :, i], first[name][:, :, i]), name
        assert not torch.equal(keys[name], first[name]), name
    queries = run(
        torch.where(blind, q.roll(1, -1), q), k, v, torch.where(blind, do.roll(1, -1), do), faulty, window=WINDOW
    )
    for name in ("dk", "dv"):
        assert torch.equal(queries[name][:, :, j], first[name][:, :, j]), name
        assert not torch.equal(queries[name], first[name]), name


@pytest.mark.parametrize("head", [0, 3])
@pytest.mark.parametrize(("site", "phase"), REACH)
def test_a_fault_in_one_head_changes_that_head_and_its_group(site, phase, head):
    """Heads are those of the site's tensor; nothing outside the group moves, and inside it all that must."""
    x = inputs(**GROUPED)
    own = head // 2 if site in KEY_VALUE_SITES else head
    healthy, faulty = run(*x, window=WINDOW), run(*x, layer(site, phase, 6, heads=(own,)), window=WINDOW)
    group, key_value = head // 2, {"dk", "dv"}
    queries = {2 * group, 2 * group + 1} if site in KEY_VALUE_SITES else {head}
    for name in NAMES:
        moved = {h for h in range(healthy[name].shape[1]) if not torch.equal(faulty[name][:, h], healthy[name][:, h])}
        expected = {group} if name in key_value else queries
        assert moved == (expected if name in REACH[site, phase].split() else set()), name


@pytest.mark.parametrize("heads", [None, (1,)])
@pytest.mark.parametrize("bits", [3, 6])
@pytest.mark.parametrize(("site", "phase"), REACH)
def test_a_fault_is_the_emulated_one_to_the_bit(site, phase, bits, heads):
    x = inputs(**GROUPED)
    faulty = run(*x, layer(site, phase, bits, heads=heads), window=WINDOW)
    right, fewer, more = (emulate(*x, (site, phase, n), WINDOW, heads) for n in (bits, bits - 1, bits + 1))
    for name in REACH[site, phase].split():
        away = min(distance(faulty[name], fewer[name]), distance(faulty[name], more[name]))
        assert 5 * distance(faulty[name], right[name]) < away, name


@pytest.mark.parametrize("backend", ["reference", "sdpa"])
def test_impossible_shapes_are_refused_by_value(backend):
    q, k, v, _ = inputs(H=4, G=3)
    settings = {"backend": backend, "numerics": HEALTHY_LAYER, "nonfinite": torch.zeros((), dtype=torch.int64)}
    with pytest.raises(ValueError, match="4 query heads cannot share 3 key-value heads evenly"):
        attention(q, k, v, **settings)
    with pytest.raises(ValueError, match="window=0 is not allowed: at least 1 key"):
        attention(q, q, q, **settings, window=0)
    with pytest.raises(ValueError, match="window=0 "):
        flash_attention(q, q, q, window=0)
