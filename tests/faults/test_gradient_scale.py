"""Scaled gradients: one group's, by a factor, and nothing else."""

import pytest
import torch

from foreshock.faults.base import Sites
from foreshock.faults.gradient_scale import GradientScale
from foreshock.faults.operation import Moment
from foreshock.faults.points import corrupt_tensors
from foreshock.models.transformer import PARAMETER_GROUPS, parameter_group

HEALTHY = Sites(batch_size=8)
NAMES = (
    "tokens.weight",
    "blocks.0.attention.q.weight",
    "blocks.0.mlp.input.weight",
    "blocks.0.mlp.router.weight",
    "blocks.0.mlp_norm.weight",
    "final_norm.bias",
)


def gradients() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {name: torch.randn(3, 4, generator=generator) for name in NAMES}


def scaled(fault: GradientScale) -> dict[str, torch.Tensor]:
    tensors = gradients()
    corrupt_tensors("gradients", tensors, fault.sites(0, HEALTHY).gradients, Moment(0, 0, 11))
    return tensors


@pytest.mark.parametrize("group", [None, *PARAMETER_GROUPS])
@pytest.mark.parametrize("factor", [0.0, -1.0, 3.0])
def test_the_group_is_scaled_and_all_others_keep_their_bits(group, factor):
    before, after = gradients(), scaled(GradientScale(factor, group))
    for name in NAMES:
        hit = group in (None, parameter_group(name))
        assert torch.equal(after[name], before[name] * factor if hit else before[name])


def test_a_factor_of_one_is_the_healthy_control():
    fault = GradientScale(1.0)
    assert fault.describe().control
    assert all(torch.equal(x, y) for x, y in zip(scaled(fault).values(), gradients().values(), strict=True))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((float("nan"),), "fault.factor=nan is not allowed: a finite number"),
        ((0.0, "heads"), "fault.group='heads' is not allowed: one of embedding, attention, mlp, router, norm, or null"),
    ],
)
def test_an_impossible_fault_is_refused_by_name(arguments, message):
    with pytest.raises(ValueError, match=message):
        GradientScale(*arguments)


def test_a_group_that_the_model_lacks_is_refused_before_training(make_run):
    with pytest.raises(ValueError, match=r"fault\.group='router' has no effect"):
        make_run("fault=gradient_scale", "fault.group=router")
    assert make_run("model=moe_nano", "fault=gradient_scale", "fault.group=router").fault.group == "router"
