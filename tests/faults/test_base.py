"""Windows and healthy sites."""

import dataclasses

import pytest

from foreshock.faults.base import Fault, LearningRateScale, Sites, Window
from foreshock.faults.bf16_shift import BF16Shift
from foreshock.faults.none import NoFault
from foreshock.models.numerics import HEALTHY
from foreshock.models.transformer import PARAMETER_GROUPS

HEALTHY_SITES = Sites(batch_size=16)


@pytest.mark.parametrize(
    ("window", "inside"),
    [
        (Window(), range(0, 12)),
        (Window(3), range(3, 12)),
        (Window(3, 1), range(3, 4)),
        (Window(0, 5), range(0, 5)),
        (Window(3, every=4), (3, 7, 11)),
        (Window(3, 6, every=4, phase=1), (4, 8)),
    ],
)
def test_a_window_holds_its_steps(window, inside):
    assert [step for step in range(12) if step in window] == list(inside)


def test_a_window_without_an_end_has_none():
    assert 10**12 in Window(3)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((-1,), "fault.onset=-1 "),
        ((0, 0), "fault.duration=0 .*null for no end"),
        ((5, -2), "fault.duration=-2 "),
        ((0, None, 0), "fault.every=0 is not allowed: at least 1 step"),
        ((0, None, 3, 3), "fault.window_phase=3 is not allowed: from 0 to 2"),
        ((0, 2, 3, 2), "fault.window_phase=2 is not allowed: from 0 to 1"),
    ],
)
def test_an_impossible_window_is_refused_by_name(arguments, message):
    with pytest.raises(ValueError, match=message):
        Window(*arguments)


def test_default_sites_are_healthy():
    assert HEALTHY_SITES.numerics is HEALTHY and HEALTHY_SITES.balance_scale == 1
    assert HEALTHY_SITES.lr_scale == LearningRateScale(1.0, 1.0, 1.0, 1.0, 1.0)
    with pytest.raises(dataclasses.FrozenInstanceError):
        HEALTHY_SITES.batch_size = 8


@pytest.mark.parametrize("fault", [NoFault(), BF16Shift(("o",), 7)])
def test_every_fault_is_one(fault):
    assert isinstance(fault, Fault)


def test_no_fault_returns_the_very_healthy_sites():
    assert NoFault().onset is None
    assert all(NoFault().sites(step, HEALTHY_SITES) is HEALTHY_SITES for step in (0, 1, 10**9))


def test_the_groups_of_the_learning_rate_are_those_of_the_model():
    assert tuple(field.name for field in dataclasses.fields(LearningRateScale)) == PARAMETER_GROUPS


def test_factors_multiply_group_by_group():
    scale = LearningRateScale(router=3.0).times(2.0).times(5.0, ("norm",))
    assert scale == LearningRateScale(2.0, 2.0, 2.0, 6.0, 10.0)


def test_a_point_that_the_training_loop_does_not_serve_yet_is_refused_by_name(make_run):
    run = make_run()
    sites = dataclasses.replace(HEALTHY_SITES, rank=(object(),))
    with pytest.raises(ValueError, match="the training loop applies nothing at 'rank' yet"):
        sites.check_fits(run.model_config, run.train)


def test_a_fault_whose_steps_are_all_healthy_is_refused(make_run):
    batch_size = make_run().train.batch_size
    with pytest.raises(ValueError, match=r"fault: BatchShrink\(.* changes nothing in train.steps=40"):
        make_run("fault=batch_shrink", "fault.factor=null", f"fault.batch_size={batch_size}")
    assert make_run("fault=batch_shrink", "fault.factor=1.0").fault.describe().control


def test_an_intermittent_fault_acts_once_a_period(make_run):
    fault = make_run("fault=bf16_shift", "fault.every=7", "fault.onset=3").fault
    assert [step for step in range(20) if fault.sites(step, HEALTHY_SITES) is not HEALTHY_SITES] == [3, 10, 17]


def test_the_faulty_update_of_a_period_is_its_phase(make_run):
    fault = make_run("fault=bf16_shift", "fault.every=7", "fault.window_phase=2", "fault.onset=3").fault
    assert [step for step in range(20) if fault.sites(step, HEALTHY_SITES) is not HEALTHY_SITES] == [5, 12, 19]
    assert {injection.window.phase for injection in fault.describe().injections} == {2}


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["fault.every=41"], r"fault\.every=41 is longer than the run: train\.steps=40"),
        (
            ["fault.every=10", "fault.onset=35", "fault.window_phase=5"],
            r"fault\.window_phase=5 is not allowed: the first faulty update, 35 \+ 5, is after the end",
        ),
    ],
)
def test_a_period_that_the_run_does_not_hold_is_refused_before_training(make_run, overrides, message):
    with pytest.raises(ValueError, match=message):
        make_run("fault=lr_scale", *overrides)


def test_two_module_faults_on_one_tensor_meet(make_run):
    with pytest.raises(ValueError, match=r"ModuleFault.* and ModuleFault.* meet: only one of them"):
        make_run(
            "fault=combined",
            "~fault.faults.attention",
            "+fault@fault.faults.a=module_shift",
            "+fault@fault.faults.b=module_shift",
        )
