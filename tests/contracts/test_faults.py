"""Every conf/fault file keeps the contract of a fault."""

import pickle

import pytest

from experiments.build import ROOT
from experiments.loop import train
from faults.base import Fault, Sites

FAULTS = sorted(path.stem for path in (ROOT / "conf" / "fault").glob("*.yaml"))
HEALTHY = Sites(batch_size=4)


@pytest.fixture(params=FAULTS)
def name(request) -> str:
    return request.param


@pytest.fixture
def overrides(name) -> list[str]:
    """The fault from step 11 on, whatever onset its YAML has."""
    return [f"fault={name}"] + ([] if name == "none" else ["fault.onset=11"])


def test_it_is_pure_frozen_and_travels_to_other_processes(make_run, overrides):
    fault = make_run(*overrides).fault
    assert isinstance(fault, Fault)
    assert pickle.loads(pickle.dumps(fault)) == fault
    for step in (0, 7, 39):
        assert fault.sites(step, HEALTHY) == fault.sites(step, HEALTHY)
    assert Sites(batch_size=4) == HEALTHY
    with pytest.raises(AttributeError):
        fault.onset = 3


def test_it_is_healthy_before_its_onset_and_acts_at_it(make_run, name, overrides):
    fault = make_run(*overrides).fault
    assert fault.sites(10, HEALTHY) is HEALTHY
    assert (fault.sites(11, HEALTHY) == HEALTHY) == (name == "none")


def test_it_trains(make_run, overrides, tmp_path):
    assert train(make_run(*overrides, "train.steps=12"), tmp_path)["steps_done"] == 12
