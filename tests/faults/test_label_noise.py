"""Label noise: as many wrong targets as said, and right inputs."""

import math

import pytest
import torch

from foreshock.faults.base import Sites
from foreshock.faults.label_noise import LabelNoise
from foreshock.faults.operation import Moment
from foreshock.faults.points import corrupt_batch

HEALTHY = Sites(batch_size=8)
VOCABULARY = 13
BATCH = torch.randint(VOCABULARY, (4, 11), generator=torch.Generator().manual_seed(0))


def noisy(share: float, seed: int = 0, step: int = 0) -> torch.Tensor:
    operations = LabelNoise(share).sites(step, HEALTHY).batch
    return corrupt_batch(BATCH, operations, Moment(seed, step, VOCABULARY))


@pytest.mark.parametrize("share", [1e-6, 0.1, 0.5, 1.0])
def test_a_share_of_the_targets_is_another_token_and_every_input_is_right(share):
    inputs, targets = noisy(share).unbind(1)
    assert torch.equal(inputs, BATCH[:, :-1])
    assert (targets != BATCH[:, 1:]).sum() == math.ceil(share * 40)
    assert targets.min() >= 0 and targets.max() < VOCABULARY


def test_wrong_tokens_are_uniform():
    """Chi-squared of the shift over 12 wrong tokens: at most the 1 - 1e-6 quantile with 11 degrees of freedom."""
    shift = torch.cat([(noisy(1.0, step=step)[:, 1] - BATCH[:, 1:]).flatten() % VOCABULARY for step in range(60)])
    counts = torch.bincount(shift, minlength=VOCABULARY)[1:].double()
    expected = len(shift) / 12
    assert ((counts - expected) ** 2 / expected).sum() < 49.0


def test_it_is_a_function_of_seed_and_step_alone():
    torch.manual_seed(3)
    first = noisy(0.2)
    torch.manual_seed(4)
    assert torch.equal(first, noisy(0.2))
    assert not torch.equal(first, noisy(0.2, seed=1)) and not torch.equal(first, noisy(0.2, step=1))


def test_a_share_of_zero_is_the_healthy_control():
    assert LabelNoise(0.0).describe().control and noisy(0.0) is BATCH


@pytest.mark.parametrize("share", [-0.1, 1.5])
def test_an_impossible_share_is_refused_by_name(share):
    with pytest.raises(ValueError, match=f"fault.share={share} is not allowed: 0 "):
        LabelNoise(share)
