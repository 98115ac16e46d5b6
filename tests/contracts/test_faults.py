"""Every conf/fault file keeps the contract of a fault."""

import json
import pickle
from collections.abc import Mapping
from dataclasses import asdict, fields

import pytest

from foreshock.experiments.build import ROOT
from foreshock.experiments.plain_config import construct
from foreshock.experiments.training.loop import train
from foreshock.faults.base import Fault, Sites

FAULTS = sorted(path.stem for path in (ROOT / "conf" / "fault").glob("*.yaml"))
HEALTHY = Sites(batch_size=8)


@pytest.fixture(params=FAULTS)
def name(request) -> str:
    return request.param


def _onsets(node, where="fault") -> list[str]:
    """The keys of every onset in a fault's configuration, those of the faults that it is made of included."""
    inside = [
        key for name, value in node.items() if isinstance(value, Mapping) for key in _onsets(value, f"{where}.{name}")
    ]
    return ([f"{where}.onset"] if "onset" in node else []) + inside


@pytest.fixture
def overrides(name, make_config) -> list[str]:
    """The fault from step 11 on, whatever onset its YAML has, on a model that has all there is to break."""
    model = ["model=moe_nano", "model.moe.n_experts=4", "model.positions=rope", "model.dropout=0.1"]
    model += ["model.n_heads=4", "model.n_kv_heads=2"] if name == "kv_group_swap" else []
    chosen = [f"fault={name}", *model, "train.micro_batch=4", "train.clip=0.1", "train.warmup_steps=20"]
    chosen += ["train.precision=fp16"] if name == "fp16_overflow" else []
    return chosen + [f"{key}=11" for key in _onsets(make_config(*chosen).fault)]


def test_it_is_pure_frozen_and_travels_to_other_processes(make_run, overrides):
    fault = make_run(*overrides).fault
    assert isinstance(fault, Fault)
    assert pickle.loads(pickle.dumps(fault)) == fault
    for step in (0, 7, 39):
        assert fault.sites(step, HEALTHY) == fault.sites(step, HEALTHY)
    assert Sites(batch_size=8) == HEALTHY
    with pytest.raises(AttributeError):
        fault.onset = 3


def test_it_is_healthy_before_its_onset_and_acts_at_it(make_run, name, overrides):
    fault = make_run(*overrides).fault
    assert fault.sites(10, HEALTHY) is HEALTHY
    assert (fault.sites(11, HEALTHY) == HEALTHY) == (name == "none")


def test_its_card_names_its_family_and_every_point_that_it_changes(make_run, name, overrides):
    run = make_run(*overrides)
    card, sites = run.fault.describe(), run.fault.sites(11, HEALTHY)
    assert card.family == run.config["fault"].get("family", "healthy")
    assert json.loads(json.dumps(asdict(card)))["family"] == card.family
    changed = {field.name for field in fields(Sites) if getattr(sites, field.name) != getattr(HEALTHY, field.name)}
    assert {injection.where["point"] for injection in card.injections} == changed
    assert all(injection.window.onset == 11 for injection in card.injections)
    assert card.control == (name == "none")


def test_it_trains_and_logs_every_injection_of_its_card(make_run, overrides, tmp_path):
    run = make_run(*overrides, "train.steps=12")
    manifest = train(run, tmp_path)
    assert manifest["steps_done"] == 12
    meant = {injection.where["point"] for injection in run.fault.describe().injections}
    assert {entry["point"] for entry in manifest["injected"] if entry["elements"]} == meant


def test_its_doses_are_faults_that_differ(name):
    doses = construct("fault", name).doses if name not in ("none", "combined", "lr_and_batch") else ()
    faults = [construct("fault", name, onset=20, **dose) for dose in doses]
    assert len(set(faults)) == len(faults)
    assert not any(fault.describe().control for fault in faults)
    assert doses or name in ("none", "combined", "lr_and_batch")


def test_a_dose_of_another_key_is_refused():
    with pytest.raises(ValueError, match=r"fault\.doses=\{'bit': 3\} is not allowed: of the keys bits, "):
        construct("fault", "bf16_shift", doses=[{"bit": 3}])
