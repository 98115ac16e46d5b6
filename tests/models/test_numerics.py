"""The BF16 grid around all 65,536 patterns, and the descriptions of fault sites."""

import itertools
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from foreshock.models.bits import ROUNDINGS, round_half_up, truncate
from foreshock.models.numerics import (
    FORWARD_SITES,
    HEALTHY,
    HEALTHY_LAYER,
    SITES,
    AttentionNumerics,
    SiteFault,
    to_bf16_grid,
)

BAD_BITS = (-1, 9, True, 1.5)


def fault(site="o", phase="backward", rounding="truncate", bits=7, layers=None, heads=None, share=1.0) -> SiteFault:
    return SiteFault(site, phase, rounding, bits, layers, heads, share)


def count() -> torch.Tensor:
    return torch.zeros((), dtype=torch.int64)


@pytest.mark.parametrize(
    ("x", "rounded"),
    [
        (1 + 2**-8, 1.0),  # a tie goes to the even mantissa, here down
        (1 + 3 * 2**-8, 1 + 2**-6),  # and here up
        (-1 - 2**-8, -1.0),
        (1 + 2**-8 + 2**-23, 1 + 2**-7),
        (1 + 3 * 2**-8 - 2**-22, 1 + 2**-7),
        (2**-133, 2**-133),  # the smallest subnormal
        (2**-134, 0.0),  # a tie between it and zero
        (3.3895e38, 3.3895313892515355e38),  # the largest finite number
        (3.4e38, float("inf")),
    ],
)
def test_bf16_grid_by_hand(x, rounded):
    assert to_bf16_grid(torch.tensor([x], dtype=torch.float32)).item() == rounded


def test_bf16_grid_is_nearest_even_around_every_pattern():
    low = np.array([0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF], dtype=np.uint32)
    raw = ((np.arange(1 << 16, dtype=np.uint32) << 16)[:, None] | low).ravel()
    x = torch.from_numpy(raw.view(np.float32))
    got = to_bf16_grid(x)
    assert got.dtype is torch.float32
    nan = np.isnan(raw.view(np.float32))
    expected = ((raw[~nan].astype(np.uint64) + 0x7FFF + ((raw[~nan] >> 16) & 1)) >> 16 << 16).astype(np.uint32)
    np.testing.assert_array_equal(got.numpy().view(np.uint32)[~nan], expected)
    assert got[torch.from_numpy(nan)].isnan().all()
    assert torch.equal(got[torch.from_numpy(~nan)], x.bfloat16().float()[torch.from_numpy(~nan)])


def test_bf16_grid_is_contiguous():
    assert to_bf16_grid(torch.randn(3, 4, 5).transpose(1, 2)).is_contiguous()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"site": "dO"}, "site='dO' .* one of q, k, v"),
        ({"phase": "sideways"}, "phase='sideways' .*forward, backward, both"),
        ({"rounding": "shift"}, "rounding='shift' .*truncate, round_half_up, flip"),
        ({"share": 2.0}, "share=2.0 "),
        *(({"bits": bits}, f"bits={bits!r} ") for bits in BAD_BITS),
        ({"layers": ()}, r"layers=\[\]"),
        ({"layers": (0, 0)}, r"layers=\[0, 0\]"),
        ({"heads": (-1,)}, r"heads=\[-1\]"),
        *(
            ({"site": site, "phase": phase}, f"site='{site}' has no {phase} value")
            for site in SITES
            if site not in FORWARD_SITES
            for phase in ("forward", "both")
        ),
    ],
)
def test_an_impossible_fault_is_refused_by_name(change, message):
    with pytest.raises(ValueError, match=message):
        fault(**change)


@pytest.mark.parametrize("site", SITES)
def test_every_site_has_a_backward_fault(site):
    assert fault(site).phase == "backward"


@pytest.mark.parametrize(
    ("one", "other", "meet"),
    [
        ({}, {}, True),
        ({}, {"bits": 2, "rounding": "round_half_up"}, True),
        ({}, {"site": "do"}, False),
        ({}, {"phase": "forward"}, False),
        ({}, {"phase": "both"}, True),
        ({"phase": "forward"}, {"phase": "both"}, True),
        ({"heads": (0, 1)}, {"heads": (1, 2)}, True),
        ({"heads": (0, 1)}, {"heads": (2,)}, False),
        ({"heads": (0,)}, {}, True),
        ({"layers": (0,)}, {"layers": (1,)}, False),
        ({"layers": (0,)}, {"heads": (1,)}, True),
        ({"layers": (0,), "heads": (1,)}, {"layers": (0,), "heads": (0,)}, False),
        ({"layers": (0,), "heads": (1,)}, {"layers": (1,), "heads": (1,)}, False),
    ],
)
def test_two_faults_on_one_value_are_refused(one, other, meet):
    a, b = fault(**one), fault(**other)
    assert a.overlaps(b) is b.overlaps(a) is meet
    for build in (lambda: AttentionNumerics((a, b)), lambda: AttentionNumerics((a,)) + AttentionNumerics((b,))):
        if meet:
            with pytest.raises(ValueError, match="two faults on site 'o'"):
                build()
        else:
            assert build().faults == (a, b)


def shape(n_layers: int, n_heads: int, kv_heads: int) -> SimpleNamespace:
    return SimpleNamespace(n_layers=n_layers, n_heads=n_heads, kv_heads=kv_heads)


@pytest.mark.parametrize("field", ["layers", "heads"])
def test_a_fault_must_fit_the_model(field):
    numerics = AttentionNumerics((fault(**{field: (0, 3)}),))
    numerics.check_fits(shape(4, 4, 4), None)
    with pytest.raises(ValueError, match=rf"fault\.{field}=\[0, 3\] .*3 {field}, 0 to 2"):
        numerics.check_fits(shape(**{"n_layers": 4, "n_heads": 4, "kv_heads": 1, f"n_{field}": 3}), None)


@pytest.mark.parametrize("site", SITES)
def test_a_fault_s_heads_are_those_of_its_site(site):
    numerics = AttentionNumerics((fault(site, heads=(3,)),))
    numerics.check_fits(shape(1, 4, 4), None)
    if site not in ("k", "v", "dk", "dv"):
        numerics.check_fits(shape(1, 4, 2), None)
        return
    with pytest.raises(ValueError, match=rf"fault\.heads=\[3\] .*2 key-value heads for '{site}', 0 to 1"):
        numerics.check_fits(shape(1, 4, 2), None)


def test_the_healthy_numerics_fit_any_model_and_touch_nothing():
    HEALTHY.check_fits(shape(1, 1, 1), None)
    assert HEALTHY.layer(0) is HEALTHY_LAYER and not HEALTHY_LAYER
    x = torch.ones(1, 1, 1)
    for site, phase in itertools.product(SITES, ("forward", "backward")):
        assert not HEALTHY_LAYER.touches(site, phase)
        assert HEALTHY_LAYER.apply(site, phase, x, count()) is x


@pytest.mark.parametrize("rounding", ROUNDINGS)
def test_zero_bits_leave_a_layer_healthy(rounding):
    assert AttentionNumerics((fault(bits=0, rounding=rounding),)).layer(0) is HEALTHY_LAYER


def test_a_layer_sees_only_its_own_faults():
    faults = fault("o", layers=(1,)), fault("do", bits=0), fault("q", phase="both", layers=(0, 2))
    numerics = AttentionNumerics(faults)
    touched = [
        {(s, p) for s, p in itertools.product(SITES, ("forward", "backward")) if numerics.layer(i).touches(s, p)}
        for i in range(3)
    ]
    both = {("q", "forward"), ("q", "backward")}
    assert touched == [both, {("o", "backward")}, both]


def test_apply_corrupts_a_copy_of_the_chosen_heads():
    x = torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(0)).bfloat16().float()
    before = x.clone()
    layer = AttentionNumerics((fault(heads=(2,)), fault(heads=(0,), bits=3, rounding="round_half_up"))).layer(0)
    got = layer.apply("o", "backward", x, count())
    assert got.dtype is torch.float32 and torch.equal(x, before)
    assert torch.equal(got[:, 1], x[:, 1])
    assert torch.equal(got[:, 2], truncate(x[:, 2].bfloat16(), 7).float())
    assert torch.equal(got[:, 0], round_half_up(x[:, 0].bfloat16(), 3).float())
    assert layer.apply("o", "forward", x, count()) is x


@pytest.mark.parametrize("share", [0.0, 0.2])
@pytest.mark.parametrize("site", ["dp", "dq"])
def test_a_share_hits_the_same_elements_of_every_row_and_head_and_counts_only_those(site, share):
    x = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    broken = fault(site, bits=7, heads=(1,), share=share)
    hits = broken.operation.hits((16, 16), x.device, causal=site == "dp")
    x[0, 1][hits] = torch.inf
    x[1, 1][~hits] = torch.inf
    x[0, 0] = torch.inf
    events = count()
    got = AttentionNumerics((broken,)).layer(0).apply(site, "backward", x, events)
    assert events.item() == hits.sum()
    assert torch.equal(got[:, [0, 2]], x[:, [0, 2]]) and torch.equal(got[:, 1][:, ~hits], x[:, 1][:, ~hits])
    assert torch.equal(got[1, 1][hits], truncate(x[1, 1][hits].bfloat16(), 7).float())


def test_an_fp32_site_is_rounded_to_bf16_before_the_fault():
    x = torch.tensor([[[1 + 3 * 2**-8, -2.999]]])  # nearest BF16: 1 + 2^-6 and -3
    got = AttentionNumerics((fault("delta", bits=1),)).layer(0).apply("delta", "backward", x, count())
    assert got.flatten().tolist() == [1 + 2**-6, -3.0]


@pytest.mark.parametrize(
    ("value", "bits", "hidden_as"),
    [(float("nan"), 7, "inf"), (float("inf"), 8, "finite"), (-float("inf"), 8, "finite"), (float("nan"), 1, "nan")],
)
def test_non_finite_values_are_counted_before_the_fault_hides_them(value, bits, hidden_as):
    x = torch.ones(2, 3, 4)
    x[0, 1, 2] = x[1, 1, 0] = x[1, 2, 3] = value
    events = count()
    layer = AttentionNumerics((fault(bits=bits, heads=(1,)),)).layer(0)
    got = layer.apply("o", "backward", x, events)
    assert events.item() == 2  # head 2 is not chosen
    seen = got[0, 1, 2]
    assert {"inf": seen.isinf(), "nan": seen.isnan(), "finite": seen.isfinite()}[hidden_as]
    layer.apply("o", "backward", x, events)
    assert events.item() == 4  # the count adds up
    layer.apply("do", "backward", x, events)
    HEALTHY_LAYER.apply("o", "backward", x, events)
    assert events.item() == 4  # no active fault, no count
