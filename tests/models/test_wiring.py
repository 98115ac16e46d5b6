"""Wrong wirings of attention: softmax attention of what they say, exact gradient included, and nothing else."""

import pytest
import torch

from foreshock.faults.log import InjectionLog
from foreshock.faults.logged_numerics import logged
from foreshock.models.arithmetic import Arithmetic
from foreshock.models.attention import attention
from foreshock.models.numerics import HEALTHY_LAYER, AttentionNumerics, SiteFault
from foreshock.models.visibility import visible_keys
from foreshock.models.wiring import Wiring
from tests.models.attention_in_fp64 import NAMES, distance, exact, inputs, run
from tests.models.attention_in_triton import ONE_TILE, in_the_interpreter, run_triton

SHAPE = {"H": 4, "G": 2, "T": 33}
WIRINGS = [
    Wiring(mask_shift=1),
    Wiring(mask_shift=32),
    Wiring(mask_shift=2, heads=(1, 2)),
    Wiring(scalings=0),
    Wiring(scalings=2),
    Wiring(kv_offset=1),
    Wiring(mask_shift=3, scalings=2, kv_offset=1),
]


def numerics(*wirings: Wiring, layer: int = 0):
    return AttentionNumerics(wirings=wirings).layer(layer)


@pytest.mark.numeric
@pytest.mark.parametrize("window", [None, 9])
@pytest.mark.parametrize("wiring", WIRINGS, ids=str)
def test_output_and_gradients_are_those_of_softmax_attention_so_wired(wiring, window):
    x = inputs(**SHAPE)
    got, right = run(*x, numerics(wiring), window=window), exact(*x, window, wiring)
    honest = exact(*x, window)
    for name in NAMES:
        # four roundings to BF16, each of at most 2^-9 of a value, stand one after the other; as of right attention
        assert distance(got[name], right[name]) < 2.0**-7, name
        assert distance(right[name], honest[name]) > 2.0**-4, name


@pytest.mark.parametrize(
    "wiring", [Wiring(), Wiring(heads=(1,)), Wiring(layers=(0,)), Wiring(mask_shift=4, layers=(1,))]
)
def test_what_changes_nothing_in_a_layer_is_the_very_healthy_layer(wiring):
    assert numerics(wiring) is HEALTHY_LAYER


def test_the_heads_that_are_not_named_keep_their_bits():
    x = inputs(H=4, G=4, T=33)
    got, healthy = run(*x, numerics(Wiring(mask_shift=2, heads=(1, 2)))), run(*x)
    for name in NAMES:
        same = [torch.equal(a, b) for a, b in zip(got[name].unbind(1), healthy[name].unbind(1), strict=True)]
        assert same == [True, False, False, True], name


@pytest.mark.numeric
def test_a_bit_operation_on_scores_and_a_shifted_mask_act_together():
    """Zero bits on the scores take the path of a fault on S, whose products round as the other path's."""
    x, fault = inputs(**SHAPE), SiteFault("s", "both", "truncate", 1)
    both = run(*x, AttentionNumerics((fault,), wirings=(Wiring(mask_shift=2),)).layer(0))
    right = exact(*x, None, Wiring(mask_shift=2))
    # one bit of BF16 cleared in a score of up to 8 in size: 2^-7 x 8 of a weight
    assert all(distance(both[name], right[name]) < 2.0**-4 for name in NAMES)


def test_a_query_sees_as_many_keys_ahead_as_said():
    seen = visible_keys(5, 3, None, 2)
    assert seen.int().tolist() == [[1, 1, 1, 0, 0], [1, 1, 1, 1, 0], [1, 1, 1, 1, 1], [0, 1, 1, 1, 1], [0, 0, 1, 1, 1]]


@pytest.mark.parametrize(
    ("wiring", "change", "elements"),
    [
        (Wiring(mask_shift=1), "mask", 4 * 32),  # in each of 4 heads, a key more of every query but the last
        (Wiring(mask_shift=1, heads=(3,)), "mask", 32),
        (Wiring(scalings=2), "scale", 1),
        (Wiring(kv_offset=1), "key-value heads", 2),
    ],
)
def test_the_log_has_what_was_wired_otherwise_and_bits_stay(wiring, change, elements):
    x, log = inputs(**SHAPE), InjectionLog()
    watched = logged(AttentionNumerics(wirings=(wiring,)), (log,), "reference").layer(0)
    got, unwatched = run(*x, watched), run(*x, numerics(wiring))
    assert all(torch.equal(got[name], unwatched[name]) for name in NAMES)
    (entry,) = log.entries()
    assert (entry["point"], entry["tensor"], entry["elements"]) == ("numerics", change, elements)


def test_two_wirings_of_one_thing_meet_only_in_one_layer():
    first, second = Wiring(mask_shift=1, layers=(0,)), Wiring(mask_shift=2, layers=(1,))
    assert [AttentionNumerics(wirings=(first, second)).layer(i).wiring.mask_shift for i in (0, 1, 2)] == [1, 2, 0]
    together = AttentionNumerics(wirings=(first, Wiring(scalings=0))).layer(0).wiring
    assert (together.mask_shift, together.scalings) == (1, 0)
    with pytest.raises(ValueError, match=r"Wiring.* and Wiring.* meet: give each its own layers"):
        AttentionNumerics(wirings=(first,)) + AttentionNumerics(wirings=(Wiring(mask_shift=3),))


@pytest.mark.triton
@in_the_interpreter[1]
def test_the_triton_kernels_read_another_key_value_head():
    """The very bits of the right kernel on keys and values that are exchanged by hand."""
    q, k, v, do = inputs(**SHAPE)
    leaves, none = [x.clone().requires_grad_() for x in (q, k, v)], torch.zeros((), dtype=torch.int64)
    wired = numerics(Wiring(kv_offset=1))
    o = attention(*leaves, backend="triton", numerics=wired, nonfinite=none, tiles=ONE_TILE)
    got = dict(zip(NAMES, (o.detach(), *torch.autograd.grad(o, leaves, do)), strict=True))
    right = run_triton(q, k.flip(1), v.flip(1), do, tiles=ONE_TILE)
    assert torch.equal(got["o"], right["o"]) and torch.equal(got["dq"], right["dq"])
    assert torch.equal(got["dk"], right["dk"].flip(1)) and torch.equal(got["dv"], right["dv"].flip(1))


def test_a_running_sum_in_bf16_has_no_shifted_mask():
    with pytest.raises(ValueError, match="a shifted mask is not possible with pv_accumulation=bf16"):
        AttentionNumerics(arithmetic=Arithmetic("bf16"), wirings=(Wiring(mask_shift=1),))


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["fault=mask_shift", "fault.shift=-1"], r"fault.shift=-1 is not allowed: 0 \(the healthy control\) or more"),
        (
            ["fault=mask_shift", "fault.shift=16"],
            "fault.shift=16 does not fit the model: below model.context_length=16",
        ),
        (["fault=mask_shift", "fault.heads=[2]"], r"fault.heads=\[2\] does not fit the model: it has 2 heads"),
        (["fault=mask_shift", "fault.layers=[0,0]"], r"fault.layers=\[0, 0\] is not allowed: distinct"),
        (["fault=score_scale", "fault.times=5"], "fault.times=5 is not allowed: 0 to 4"),
        (["fault=score_scale", "fault.layers=[2]"], r"fault.layers=\[2\] does not fit the model: it has 2 layers"),
        (["fault=kv_group_swap", "fault.offset=2"], "fault.offset=2 does not fit the model: it has 2 key-value heads"),
        (["fault=kv_group_swap"], "fault.offset needs query heads in groups: model.n_kv_heads below model.n_heads"),
        (["fault=mask_shift", "model.backend=sdpa"], "model.backend='sdpa' has no fault sites"),
    ],
)
def test_an_impossible_wiring_is_refused_before_training(make_run, overrides, message):
    with pytest.raises(ValueError, match=message):
        make_run(*overrides)
