"""Faults composed of others."""

import pytest

from foreshock.faults.base import LearningRateScale, Sites
from foreshock.faults.batch_shrink import BatchShrink
from foreshock.faults.bf16_shift import BF16Shift
from foreshock.faults.combined import Combined
from foreshock.faults.lr_scale import LRScale
from foreshock.faults.none import NoFault

HEALTHY = Sites(batch_size=16)


def combined(*faults) -> Combined:
    return Combined({str(i): fault for i, fault in enumerate(faults)})


def test_each_acts_in_its_own_window():
    early, late = BF16Shift(("o",), 7, onset=2, duration=3), BF16Shift(("do",), 5, onset=4)
    both = combined(late, NoFault(), early)
    assert both.onset == 2
    assert both.sites(1, HEALTHY) is HEALTHY
    faults = [both.sites(step, HEALTHY).numerics.faults for step in (2, 3, 4, 5)]
    assert faults == [
        early.corrupt.operation.faults,
        early.corrupt.operation.faults,
        late.corrupt.operation.faults + early.corrupt.operation.faults,
        late.corrupt.operation.faults,
    ]


def test_a_control_is_not_what_leads_are_counted_from():
    """Its onset is where the composed fault may begin to say something; the first faulty update is another's."""
    control, late = LRScale(1.0), BF16Shift(("o",), 7, onset=9)
    both = combined(control, late)
    assert (both.onset, both.describe().first_step) == (0, 9)
    assert combined(control, LRScale(1.0, onset=3)).describe().first_step == 0


def test_each_acts_on_what_the_one_before_left():
    both = combined(BatchShrink(factor=0.5), BatchShrink(factor=0.5, lr_rule="linear"), LRScale(3.0))
    assert both.sites(0, HEALTHY) == Sites(batch_size=4, lr_scale=LearningRateScale().times(1.5))


def test_it_is_healthy_without_a_faulty_member():
    nothing = combined(NoFault(), NoFault())
    assert nothing.onset is None
    assert nothing.sites(5, HEALTHY) is HEALTHY


def test_an_empty_one_is_refused():
    with pytest.raises(ValueError, match=r"fault.faults=\{\}"):
        Combined({})


def test_two_faults_on_one_value_are_refused_where_their_windows_meet():
    both = combined(BF16Shift(("o", "do"), 7, duration=3), BF16Shift(("o",), 2, onset=2))
    both.sites(1, HEALTHY)
    both.sites(3, HEALTHY)
    with pytest.raises(ValueError, match="two faults on site 'o'"):
        both.sites(2, HEALTHY)


def test_two_faults_share_a_site_on_different_heads():
    both = combined(BF16Shift(("o",), 7, heads=(0,)), BF16Shift(("o",), 2, heads=(1,)))
    assert [fault.bits for fault in both.sites(0, HEALTHY).numerics.faults] == [7, 2]
