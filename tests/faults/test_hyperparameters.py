"""Learning-rate, batch and auxiliary-loss faults: what they do to a step's sites, and what they refuse."""

import pytest

from foreshock.experiments.training.optimizer import learning_rate
from foreshock.faults.aux_loss_off import AuxLossOff
from foreshock.faults.base import LearningRateScale, Sites
from foreshock.faults.batch_shrink import BatchShrink
from foreshock.faults.lr_scale import LRScale
from foreshock.models.transformer import parameter_group

HEALTHY = Sites(batch_size=16)


def factors(fault, steps) -> list[float]:
    return [fault.sites(step, HEALTHY).lr_scale.mlp for step in steps]


def test_a_learning_rate_jumps_for_its_window():
    assert factors(LRScale(10.0, onset=3, duration=2), range(7)) == [1, 1, 1, 10, 10, 1, 1]


def test_a_ramp_grows_by_equal_ratios_and_stays():
    ramp = LRScale(100.0, ramp_steps=4, onset=2)
    root = 100.0**0.25
    assert factors(ramp, range(8)) == pytest.approx([1, 1, root, root**2, root**3, 100, 100, 100])


def test_only_the_chosen_groups_are_scaled():
    scale = LRScale(0.5, groups=("router", "norm")).sites(0, HEALTHY).lr_scale
    assert scale == LearningRateScale(router=0.5, norm=0.5)


@pytest.mark.parametrize(
    ("fault", "size", "factor"),
    [
        (BatchShrink(factor=0.125), 2, 1.0),
        (BatchShrink(batch_size=4), 4, 1.0),
        (BatchShrink(factor=0.25, lr_rule="linear"), 4, 0.25),
        (BatchShrink(factor=0.25, lr_rule="sqrt"), 4, 0.5),
        (BatchShrink(factor=0.3), 4, 1.0),
        (BatchShrink(factor=1.0), 16, 1.0),
    ],
)
def test_a_batch_shrinks_and_the_learning_rate_follows_its_rule(fault, size, factor):
    assert fault.sites(0, HEALTHY) == Sites(batch_size=size, lr_scale=LearningRateScale().times(factor))


def test_rounding_does_not_lose_a_sequence_to_floating_point():
    assert BatchShrink(factor=0.29).shrunk(100) == 29


def test_the_load_balance_is_off_in_its_window():
    fault = AuxLossOff(onset=2, duration=1)
    assert [fault.sites(step, HEALTHY).balance_scale for step in range(4)] == [1.0, 1.0, 0.0, 1.0]
    assert fault.sites(1, HEALTHY) is HEALTHY


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: LRScale(0.0), "fault.factor=0.0 is not allowed: above 0"),
        (lambda: LRScale(-1.0), "fault.factor=-1.0"),
        (lambda: LRScale(float("inf")), "fault.factor=inf"),
        (lambda: LRScale(2.0, ramp_steps=-1), "fault.ramp_steps=-1"),
        (lambda: LRScale(2.0, ramp_steps=9, duration=5), "ramp_steps=9 is longer than fault.duration=5"),
        (lambda: LRScale(2.0, groups=("gate",)), r"fault.groups=\['gate'\] .*embedding, attention, mlp, router, norm"),
        (lambda: LRScale(2.0, groups=()), r"fault.groups=\[\]"),
        (lambda: LRScale(2.0, onset=-1), "fault.onset=-1"),
        (lambda: BatchShrink(), "give exactly one of them"),
        (lambda: BatchShrink(factor=0.5, batch_size=4), "give exactly one of them"),
        (lambda: BatchShrink(factor=0.0), "fault.factor=0.0 is not allowed: above 0, at most 1"),
        (lambda: BatchShrink(factor=1.5), "fault.factor=1.5"),
        (lambda: BatchShrink(batch_size=0), "fault.batch_size=0 is not allowed: at least 1 sequence"),
        (lambda: BatchShrink(factor=0.5, lr_rule="cubic"), "fault.lr_rule='cubic' .*none, linear, sqrt"),
        (lambda: BatchShrink(factor=0.01).shrunk(16), "fault.factor=0.01 shrinks the batch of 16 below one sequence"),
        (lambda: BatchShrink(batch_size=32).shrunk(16), "fault.batch_size=32 is above the healthy batch of 16"),
        (lambda: AuxLossOff(duration=0), "fault.duration=0"),
    ],
)
def test_what_is_impossible_is_refused_by_name(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize("model", ["mha_nano", "moe_nano"])
def test_the_log_has_the_rate_of_every_parameter_group_that_the_model_has(make_run, model):
    run = make_run("fault=lr_scale", "fault.factor=3.0", f"model={model}")
    engine = run.new_engine()
    engine.step(0, [run.fault.sites(run.fault.onset, run.healthy_sites())])
    groups = {parameter_group(name) for name, _ in engine.model.named_parameters()}
    entries = engine.logs[0].entries()
    assert {entry["tensor"] for entry in entries} == {f"learning rate of {group}" for group in groups}
    rate = learning_rate(run.train, 0)
    assert all(entry["elements"] == 1 and entry["norm"] == pytest.approx(2 * rate) for entry in entries)
