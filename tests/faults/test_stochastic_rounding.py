"""Stochastic rounding: both neighbours and no other, the mean, purity, and the fault of weights or gradients."""

import math

import numpy as np
import pytest
import torch

from foreshock.faults.operation import Moment
from foreshock.faults.rounding import FORMATS, GRIDS, STOCHASTIC, nearest, stochastic
from tests.faults.engine_steps import differing, points_logged, stepped

NARROW = [name for name in STOCHASTIC if name != "fp32"]
MOMENT = Moment(seed=3, step=7, vocab_size=10, point="weights", tensor="w")
DRAWS = 100_000


def neighbours(x: float, name: str) -> tuple[float, float]:
    """The largest number of a format that is not above x, and the smallest that is not below, from all its codes."""
    bits = 16 if name == "bf16" else 8
    codes = torch.arange(1 << bits).to(torch.int32).to(torch.int16 if bits == 16 else torch.uint8)
    numbers = codes.view(FORMATS[name]).double().numpy()
    numbers = numbers[np.isfinite(numbers)]
    return float(numbers[numbers <= x].max()), float(numbers[numbers >= x].min())


@pytest.mark.parametrize("name", NARROW)
@pytest.mark.parametrize("x", [1.03, -1.03, 1.99, 0.3, -3e-4, 7.1e-4, 100.3, -0.0171])
def test_a_number_becomes_one_of_its_neighbours_with_itself_as_the_mean(name, x):
    """Hoeffding: the mean of n independent draws between a and b is further than (b - a) sqrt(ln(2 / p) / 2n) from
    its expectation with a probability below p, here 1e-9."""
    whole = torch.full((DRAWS,), x)
    below, above = neighbours(float(whole[0]), name)
    values = stochastic(whole, name, MOMENT).double()
    assert set(values.unique().tolist()) <= {below, above}
    bound = (above - below) * math.sqrt(math.log(2 / 1e-9) / (2 * DRAWS))
    assert abs(float(values.mean()) - float(whole[0])) <= bound
    assert abs(float(nearest(whole, name).double().mean()) - float(whole[0])) > bound  # to nearest has a bias


@pytest.mark.parametrize("name", NARROW)
def test_what_the_format_holds_stays_and_so_does_a_nan(name):
    x = torch.tensor([0.0, -0.0, 1.0, -1.5, 2.0**-9, 96.0, torch.nan])
    assert torch.equal(stochastic(x, name, MOMENT)[:-1], x[:-1]) and stochastic(x, name, MOMENT)[-1].isnan()


@pytest.mark.parametrize("name", ["fp8_e4m3", "fp8_e5m2"])
def test_fp8_saturates_and_half_of_its_smallest_number_is_drawn_half_of_the_time(name):
    grid = GRIDS[name]
    x = torch.tensor([1e30, -1e30, torch.inf])
    assert stochastic(x, name, MOMENT).tolist() == [grid.largest, -grid.largest, grid.largest]
    smallest = 2.0 ** (grid.smallest_exponent - grid.mantissa_bits)
    values = stochastic(torch.full((DRAWS,), smallest / 2), name, MOMENT)
    assert set(values.tolist()) == {0.0, smallest}
    assert abs(float((values > 0).double().mean()) - 0.5) <= math.sqrt(math.log(2 / 1e-9) / (2 * DRAWS))


@pytest.mark.parametrize("name", NARROW)
def test_the_draw_is_a_function_of_seed_step_and_tensor(name):
    x = torch.randn(40, 5, generator=torch.Generator().manual_seed(0))
    first = stochastic(x, name, MOMENT)
    assert torch.equal(first, stochastic(x, name, MOMENT)) and first.dtype == x.dtype
    others = [Moment(4, 7, 10, tensor="w"), Moment(3, 8, 10, tensor="w"), Moment(3, 7, 10, tensor="v")]
    assert not any(torch.equal(first, stochastic(x, name, moment)) for moment in others)


@pytest.mark.parametrize("tensors", ["weights", "gradients"])
@pytest.mark.parametrize("form", NARROW)
def test_the_fault_reaches_the_tensors_of_its_group_alone_from_its_onset(make_run, tensors, form):
    faulty = ["fault=stochastic_rounding", f"fault.tensors={tensors}", f"fault.format={form}", "fault.onset=2"]
    engine, weights, gradients = stepped(make_run(*faulty, "fault.group=attention", "train.clip=null"), 3)
    _, clean, clean_gradients = stepped(make_run("train.clip=null"), 3)
    named = {name for name in weights[2] if ".attention." in name}
    assert [differing(weights[step], clean[step]) for step in (0, 1)] == [set(), set()]
    assert differing(weights[2], clean[2]) == named
    assert differing(gradients[2], clean_gradients[2]) == (named if tensors == "gradients" else set())
    assert set(points_logged(engine)) == {tensors}
    changed = weights[2] if tensors == "weights" else gradients[2]
    assert all(torch.equal(changed[name], nearest(changed[name], form)) for name in named)


def test_fp32_is_healthy_bit_for_bit_and_bf16_is_the_one_of_no_master_weights(make_run):
    runs = [
        make_run(),
        make_run("fault=stochastic_rounding", "fault.format=fp32"),
        make_run("fault=stochastic_rounding"),
        make_run("fault=no_master_weights", "fault.rounding=stochastic"),
    ]
    healthy, control, bf16, known = (stepped(run, 4)[1][-1] for run in runs)
    assert differing(healthy, control) == set() == differing(bf16, known)
    assert runs[1].fault.describe().control and not runs[2].fault.describe().control


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["fault.tensors=moments"], "fault.tensors='moments' is not allowed: one of weights, gradients"),
        (["fault.format=fp16"], "fault.format='fp16' is not allowed: one of bf16, fp8_e4m3, fp8_e5m2, fp32"),
        (["fault.group=heads"], "fault.group='heads' is not allowed"),
    ],
)
def test_an_impossible_fault_is_refused_before_training(make_run, overrides, message):
    with pytest.raises(ValueError, match=message):
        make_run("fault=stochastic_rounding", *overrides)
