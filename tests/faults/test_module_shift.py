"""The fault outside attention: its window, what it reaches, and what it refuses."""

import dataclasses

import pytest

from foreshock.faults.base import Sites
from foreshock.faults.module_shift import ModuleShift
from foreshock.models.corruption import ModuleFault

HEALTHY = Sites(batch_size=16)


@pytest.mark.parametrize(
    ("onset", "duration", "faulty"), [(0, None, range(0, 9)), (3, None, range(3, 9)), (3, 2, range(3, 5))]
)
def test_outside_its_window_it_returns_the_very_healthy_sites(onset, duration, faulty):
    fault = ModuleShift(("head",), "dy", 3, onset=onset, duration=duration)
    assert [step for step in range(9) if fault.sites(step, HEALTHY) is not HEALTHY] == list(faulty)


def test_every_field_reaches_the_sites_and_nothing_else_changes():
    earlier = dataclasses.replace(HEALTHY, modules=(ModuleFault("head", "dw", "truncate", 1),))
    got = ModuleShift(("head", "final_norm"), "y", 5, "flip", 0.1).sites(0, earlier)
    added = tuple(ModuleFault(name, "y", "flip", 5, 0.1) for name in ("head", "final_norm"))
    assert got == dataclasses.replace(earlier, modules=earlier.modules + added)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"modules": ()}, r"modules=\[\]"),
        ({"modules": ("head", "head")}, r"modules=\['head', 'head'\]"),
        ({"site": "w"}, "site='w'"),
        ({"bits": 9}, "bits=9 "),
        ({"onset": -1}, "fault.onset=-1 "),
        ({"duration": 0}, "fault.duration=0 "),
    ],
)
def test_an_impossible_fault_is_refused_by_name(change, message):
    with pytest.raises(ValueError, match=message):
        ModuleShift(**{"modules": ("head",), "site": "dw", "bits": 3} | change)


def test_a_module_that_the_model_lacks_is_refused_before_training(make_run):
    with pytest.raises(ValueError, match=r"fault.modules: the model has no 'blocks.0.mlp.router'; the nearest are "):
        make_run("fault=module_shift", "fault.modules=[blocks.0.mlp.router]")
    assert make_run("model=moe_nano", "fault=module_shift", "fault.modules=[blocks.0.mlp.router]").fault.onset == 0
