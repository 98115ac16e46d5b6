"""Windows, and faults composed of others."""

import dataclasses

import pytest

from faults.base import Composed, Fault, Sites, Window
from faults.bf16_shift import BF16Shift
from faults.none import NoFault
from models.numerics import HEALTHY

HEALTHY_SITES = Sites(batch_size=16)


@pytest.mark.parametrize(
    ("window", "inside"),
    [
        (Window(), range(0, 12)),
        (Window(3), range(3, 12)),
        (Window(3, 1), range(3, 4)),
        (Window(0, 5), range(0, 5)),
    ],
)
def test_a_window_holds_its_steps(window, inside):
    assert [step for step in range(12) if step in window] == list(inside)


def test_a_window_without_an_end_has_none():
    assert 10**12 in Window(3)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [((-1,), "fault.onset=-1 "), ((0, 0), "fault.duration=0 .*null for no end"), ((5, -2), "fault.duration=-2 ")],
)
def test_an_impossible_window_is_refused_by_name(arguments, message):
    with pytest.raises(ValueError, match=message):
        Window(*arguments)


def test_default_sites_are_healthy():
    assert HEALTHY_SITES.numerics is HEALTHY and HEALTHY_SITES.lr_scale == 1
    with pytest.raises(dataclasses.FrozenInstanceError):
        HEALTHY_SITES.batch_size = 8


@pytest.mark.parametrize("fault", [NoFault(), BF16Shift(("o",), 7), Composed(())])
def test_every_fault_is_one(fault):
    assert isinstance(fault, Fault)


@pytest.mark.parametrize("fault", [NoFault(), Composed(()), Composed((NoFault(), NoFault()))])
def test_no_fault_returns_the_very_healthy_sites(fault):
    assert fault.onset is None
    assert all(fault.sites(step, HEALTHY_SITES) is HEALTHY_SITES for step in (0, 1, 10**9))


def test_composed_faults_act_each_in_its_window():
    early, late = BF16Shift(("o",), 7, onset=2, duration=3), BF16Shift(("do",), 5, onset=4)
    both = Composed((late, NoFault(), early))
    assert both.onset == 2
    assert both.sites(1, HEALTHY_SITES) is HEALTHY_SITES
    faults = [both.sites(step, HEALTHY_SITES).numerics.faults for step in (2, 3, 4, 5)]
    assert faults == [
        early.numerics.faults,
        early.numerics.faults,
        late.numerics.faults + early.numerics.faults,
        late.numerics.faults,
    ]


def test_two_faults_on_one_value_are_refused_where_their_windows_meet():
    both = Composed((BF16Shift(("o", "do"), 7, duration=3), BF16Shift(("o",), 2, onset=2)))
    both.sites(1, HEALTHY_SITES)
    both.sites(3, HEALTHY_SITES)
    with pytest.raises(ValueError, match="two faults on site 'o'"):
        both.sites(2, HEALTHY_SITES)


def test_two_faults_share_a_site_on_different_heads():
    both = Composed((BF16Shift(("o",), 7, heads=(0,)), BF16Shift(("o",), 2, heads=(1,))))
    assert [fault.bits for fault in both.sites(0, HEALTHY_SITES).numerics.faults] == [7, 2]
