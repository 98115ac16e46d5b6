"""A flipped bit: one bit of as many neighbouring weights as said, and nothing else."""

import pytest
import torch

from foreshock.faults.base import Sites
from foreshock.faults.operation import Moment
from foreshock.faults.points import corrupt_tensors
from foreshock.faults.weight_bitflip import WeightBitflip

HEALTHY = Sites(batch_size=8)
NAME = "blocks.0.attention.q.weight"


def weights() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {name: torch.randn(6, 5, generator=generator) for name in (NAME, "blocks.0.attention.k.weight")}


def flipped(fault: WeightBitflip, seed: int = 0, step: int = 0) -> dict[str, torch.Tensor]:
    tensors = weights()
    corrupt_tensors("weights", tensors, fault.sites(step, HEALTHY).weights, Moment(seed, step, 11))
    return tensors


@pytest.mark.parametrize("bit", [1, 23, 24, 31, 32])
@pytest.mark.parametrize("count", [1, 7, 30])
def test_one_bit_of_neighbours_is_inverted_and_every_other_bit_stays(bit, count):
    before, after = weights(), flipped(WeightBitflip(NAME, bit, count))
    raw_before, raw_after = (x[NAME].view(torch.int32).flatten().to(torch.int64) for x in (before, after))
    differing = (raw_before ^ raw_after) & 0xFFFFFFFF
    places = differing.nonzero().flatten()
    assert len(places) == count and torch.equal(places, torch.arange(places[0], places[0] + count))
    assert set(differing[places].tolist()) == {1 << (bit - 1)}
    assert torch.equal(before["blocks.0.attention.k.weight"], after["blocks.0.attention.k.weight"])


def test_the_place_is_a_function_of_seed_and_step_alone():
    fault = WeightBitflip(NAME, 20, duration=None)
    torch.manual_seed(3)
    first = flipped(fault)[NAME]
    torch.manual_seed(4)
    assert torch.equal(first, flipped(fault)[NAME])
    others = [flipped(fault, seed=seed, step=step)[NAME] for seed, step in ((1, 0), (0, 1), (2, 0), (0, 2))]
    assert any(not torch.equal(first, other) for other in others)


def test_it_happens_at_its_onset_alone():
    fault = WeightBitflip(NAME, 20, onset=3, duration=1)
    assert [step for step in range(9) if fault.sites(step, HEALTHY) is not HEALTHY] == [3]


def test_bit_zero_is_the_healthy_control():
    fault = WeightBitflip(NAME, 0)
    assert fault.describe().control and torch.equal(flipped(fault)[NAME], weights()[NAME])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((NAME, 33), "fault.bit=33 is not allowed: 1 to 32, or 0 for the healthy control"),
        ((NAME, 3, 0), "fault.count=0 is not allowed: at least 1 element"),
    ],
)
def test_an_impossible_fault_is_refused_by_name(arguments, message):
    with pytest.raises(ValueError, match=message):
        WeightBitflip(*arguments)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        (
            "fault.parameter=blocks.0.attention.qq.weight",
            "the model has no such parameter; .* blocks.0.attention.q.wei",
        ),
        ("fault.count=257", "fault.count=257 is not allowed: blocks.0.attention.q.weight has 256 elements"),
    ],
)
def test_what_the_model_lacks_is_refused_before_training(make_run, override, message):
    with pytest.raises(ValueError, match=message):
        make_run("fault=weight_bitflip", override)
