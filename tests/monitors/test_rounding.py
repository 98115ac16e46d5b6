"""Healthy BF16 attention breaks its laws by what is predicted, and faults by more."""

import math

import pytest
import torch

from foreshock.models.attention import flash_attention
from foreshock.models.numerics import KEY_VALUE_SITES, LayerNumerics, SiteFault, to_bf16_grid
from foreshock.monitors import attention_laws
from foreshock.monitors.attention_twin import twin_of
from foreshock.monitors.dot_product import DotProductStep
from foreshock.monitors.kernel_rounding import REFERENCE

pytestmark = pytest.mark.numeric

PREDICTION = {  # of the root mean square over 64 rows; a trace is one number a row, a vector or matrix many
    "key_shift_residual": 0.15,
    "value_shift_residual": 0.15,
    "qk_gauge_residual": 0.35,
    "qk_gauge_residual.matrix": 0.1,
    "vo_gauge_residual": 0.35,
    "vo_gauge_residual.matrix": 0.1,
}


def step(
    sharpness: float, fault: SiteFault | None = None, groups: int = 4, window: int | None = None
) -> DotProductStep:
    """A backward of the reference kernel on random tensors, 16 rows of 4 query heads; sharpness: spread of the scores.

    groups: key-value heads; window: keys that a query sees.
    """
    generator = torch.Generator().manual_seed(7)
    q, k, v, do = (to_bf16_grid(torch.randn(16, h, 48, 16, generator=generator)) for h in (4, groups, groups, 4))
    q = to_bf16_grid(sharpness * q).requires_grad_()
    k, v = k.requires_grad_(), v.requires_grad_()
    table = {(fault.site, "backward"): (fault,)} if fault else {}
    o = flash_attention(q, k, v, LayerNumerics(table), window=window)
    o.backward(do)
    return DotProductStep(*(x.detach() for x in (q, k, v, o, q.grad, k.grad, v.grad, do)), window)


def over_noise(t: DotProductStep) -> dict[str, torch.Tensor]:
    """By law and head, the root mean square over rows."""
    ratios = attention_laws.over_noise(t, twin_of(t, REFERENCE))
    return {name: ratio.square().mean(0).sqrt() for name, ratio in ratios.items()}


@pytest.mark.parametrize("sharpness", [0.1, 1.0, 4.0])
def test_a_healthy_kernel_breaks_its_laws_by_what_is_predicted(sharpness):
    for name, ratio in over_noise(step(sharpness)).items():
        overall = ratio.square().mean().sqrt()
        assert abs(math.log(overall)) < PREDICTION[name], (name, float(overall))


CLASSES = {  # what the derivations of monitors.conservation say, site by site
    "o delta dp ds v": {"key_shift_residual"},
    "do dv lse": {"value_shift_residual", "vo_gauge_residual.matrix"},
    "dq": {"qk_gauge_residual.matrix"},
    "dk": {"key_shift_residual", "qk_gauge_residual.matrix"},
    "p s": {"key_shift_residual", "value_shift_residual", "vo_gauge_residual.matrix"},
    "q k": {"key_shift_residual", "value_shift_residual", "qk_gauge_residual.matrix", "vo_gauge_residual.matrix"},
}
SHARP_LAWS = ("key_shift_residual", "value_shift_residual", "qk_gauge_residual.matrix", "vo_gauge_residual.matrix")


@pytest.mark.parametrize(("site", "broken"), [(s, laws) for sites, laws in CLASSES.items() for s in sites.split()])
def test_each_site_breaks_exactly_the_laws_of_its_class(site, broken):
    fault = SiteFault(site, "backward", "truncate", 4, heads=(1,))
    ratio = over_noise(step(1.0, fault))
    for name in SHARP_LAWS:
        assert (ratio[name][1] > 2) == (name in broken), (name, ratio[name])
        assert (ratio[name][[0, 2, 3]] < 1.5).all(), (name, ratio[name])


@pytest.mark.parametrize("site", ["o", "do"])
def test_one_truncated_bit_is_felt(site):
    ratio = over_noise(step(1.0, SiteFault(site, "backward", "truncate", 1)))
    felt = ratio["key_shift_residual" if site == "o" else "vo_gauge_residual.matrix"]
    assert (felt > 1.3).all()


@pytest.mark.parametrize("window", [None, 9])
@pytest.mark.parametrize("groups", [1, 2])
def test_grouped_heads_and_windows_are_predicted_as_well(groups, window):
    """Query heads on one key-value head: their gradients of K and V add up in FP32, and are rounded once."""
    t = step(1.0, groups=groups, window=window)
    for name, ratio in over_noise(t).items():
        assert ratio.shape == (groups,)
        overall = ratio.square().mean().sqrt()
        assert abs(math.log(overall)) < PREDICTION[name], (name, float(overall))


@pytest.mark.parametrize(("site", "broken"), [(s, laws) for sites, laws in CLASSES.items() for s in sites.split()])
def test_a_site_of_one_head_breaks_the_laws_of_its_group_alone(site, broken):
    head = 1 if site in KEY_VALUE_SITES else 2
    ratio = over_noise(step(1.0, SiteFault(site, "backward", "truncate", 5, heads=(head,)), groups=2, window=24))
    for name in SHARP_LAWS:
        assert (ratio[name][1] > 2) == (name in broken), (name, ratio[name])
        assert ratio[name][0] < 1.5, (name, ratio[name])
