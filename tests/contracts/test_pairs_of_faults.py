"""Any two faults in one run: each does there what it does alone, or the two are refused by name."""

from dataclasses import fields, replace
from itertools import combinations

import pytest

from foreshock.experiments.build import ROOT
from foreshock.experiments.plain_config import construct
from foreshock.experiments.training.loop import train
from foreshock.faults.base import LearningRateScale, Sites
from foreshock.faults.combined import Combined

COMPOSED = ("none", "combined", "lr_and_batch")
NAMES = sorted({path.stem for path in (ROOT / "conf" / "fault").glob("*.yaml")} - {*COMPOSED})
STEP = 11
HEALTHY = Sites(batch_size=8)
ONE_SAYS = ("data_step", "schedule")
"""Points that have one value, which two faults of different parts may make together, and are else refused."""
PAIRS = [
    ("bf16_shift", "lr_scale"),
    ("module_shift", "gradient_noise"),
    ("label_noise", "clip_scope"),
    ("near_duplicates", "adam_constants"),
    ("data_repeat", "weight_tile"),
    ("warmup_off", "adam_state_format"),
    ("fp8_linear", "gradient_stale"),
    ("untied", "decay_wrong"),
    ("stochastic_rounding", "padding_counted"),
    ("resume_lossy", "mask_shift"),
    ("telemetry_gap", "batch_shrink"),
    ("loader_stall", "double_update"),
]


def changed(sites: Sites) -> set[str]:
    return {field.name for field in fields(Sites) if getattr(sites, field.name) != getattr(HEALTHY, field.name)}


@pytest.fixture(scope="module")
def alone():
    """By name, the fault from step 11 on and its sites there."""
    faults = {name: construct("fault", name, onset=STEP) for name in NAMES}
    return {name: (fault, fault.sites(STEP, HEALTHY)) for name, fault in faults.items()}


def product(one: LearningRateScale, other: LearningRateScale) -> LearningRateScale:
    return LearningRateScale(**{group: factor * getattr(other, group) for group, factor in vars(one).items()})


@pytest.mark.parametrize("first", NAMES)
def test_in_a_pair_each_has_the_values_that_it_has_alone(first, alone):
    for second in NAMES[NAMES.index(first) + 1 :]:
        (fault, own), (other_fault, other) = alone[first], alone[second]
        try:
            together = Combined({first: fault, second: other_fault}).sites(STEP, HEALTHY)
        except ValueError as refusal:
            assert changed(own) & changed(other), (first, second, refusal)
            continue
        assert changed(together) <= changed(own) | changed(other)
        for point in changed(own) | changed(other):
            ours, theirs, both = (getattr(sites, point) for sites in (own, other, together))
            if point not in changed(other):
                assert both == ours, (first, second, point)
            elif point not in changed(own):
                assert both == theirs, (first, second, point)
            elif point == "sampling":  # what a resume draws again comes first
                assert sorted(map(repr, both)) == sorted(map(repr, ours + theirs)), (first, second)
            elif isinstance(both, tuple):
                assert both == ours + theirs, (first, second, point)
            elif point == "lr_scale":
                assert both == product(ours, theirs), (first, second)
            elif point == "balance_scale":
                assert both == ours * theirs, (first, second)
            elif point == "batch_size":
                assert both <= min(ours, theirs), (first, second)
            elif point == "numerics":
                assert {*both.faults} == {*ours.faults, *theirs.faults}, (first, second)
                assert {*both.wirings} == {*ours.wirings, *theirs.wirings}, (first, second)
            else:
                assert point in ONE_SAYS, (first, second, point)


def test_the_order_of_two_faults_of_different_points_does_not_matter(alone):
    for (first, (fault, own)), (second, (other_fault, other)) in combinations(alone.items(), 2):
        if not changed(own) & changed(other):
            pair = Combined({first: fault, second: other_fault}).sites(STEP, HEALTHY)
            turned = Combined({second: other_fault, first: fault}).sites(STEP, HEALTHY)
            assert pair == turned, (first, second)
            assert pair == replace(own, **{point: getattr(other, point) for point in changed(other)}), (first, second)


@pytest.mark.parametrize("pair", PAIRS, ids="+".join)
def test_a_pair_trains_and_both_are_logged(pair, make_run, tmp_path):
    model = ["model.n_heads=4", "model.n_kv_heads=2", "train.clip=0.1", "train.warmup_steps=20", "train.steps=13"]
    added = [f"+fault@fault.faults.{name}={name}" for name in pair] + [f"fault.faults.{name}.onset=11" for name in pair]
    dropped = ["~fault.faults.attention", "~fault.faults.learning_rate"]
    run = make_run("fault=combined", *dropped, *added, *model, "train.held_out_every_steps=13")
    manifest = train(run, tmp_path)
    assert manifest["end_reason"] == "completed"
    meant = {injection.where["point"] for injection in run.fault.describe().injections}
    assert {entry["point"] for entry in manifest["injected"] if entry["elements"]} == meant
