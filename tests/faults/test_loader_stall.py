"""A batch that arrives late: real seconds, and no other weight."""

from dataclasses import replace

import pytest

from foreshock.experiments.training.loop import train
from foreshock.experiments.training.stacking import why_single
from foreshock.faults.base import Sites
from foreshock.faults.loader_stall import LoaderStall
from tests.experiments.same_result import assert_same_result

DELAY_S = 0.03
SHORT = ("train.steps=12", "train.held_out_every_steps=6")


@pytest.fixture
def short_run(make_run):
    def make(*overrides: str):
        run = make_run(*SHORT, *overrides)
        return replace(run, monitors={"loss": run.monitors["loss"]})

    return make


def test_the_steps_of_its_window_wait_and_no_bit_changes(short_run, tmp_path):
    stalled = ("fault=loader_stall", f"fault.delay_s={DELAY_S}", "fault.onset=3", "fault.every=4")
    faulty, healthy = train(short_run(*stalled), tmp_path), train(short_run(), tmp_path)
    assert_same_result(tmp_path / faulty["run_id"], tmp_path / healthy["run_id"])
    assert faulty["weights_sha256"] == healthy["weights_sha256"]
    (entry,) = faulty["injected"]
    assert (entry["point"], entry["tensor"], entry["steps"], entry["elements"]) == ("system", "read_s", 3, 3)
    assert entry["norm"] >= 3**0.5 * DELAY_S
    assert faulty["wall_s"] >= 3 * DELAY_S


def test_a_view_has_the_seconds_of_its_read(short_run):
    run = short_run("fault=loader_stall", f"fault.delay_s={DELAY_S}", "fault.onset=1", "fault.every=2")
    engine, healthy = run.new_engine(), run.healthy_sites()
    views = [engine.step(step, [run.fault.sites(step, healthy)]) for step in range(4)]
    assert all(view.read_s > 0 for view in views)
    assert min(view.read_s for view in views[1::2]) >= DELAY_S


def test_no_delay_is_a_control_that_does_not_wait(short_run, tmp_path, monkeypatch):
    monkeypatch.setattr("foreshock.faults.loader_stall.LateRead.wait", lambda *_: pytest.fail("it waits"))
    manifest = train(short_run("fault=loader_stall", "fault.delay_s=0"), tmp_path)
    assert manifest["injection"]["injections"][0]["control"] and manifest["injected"] == []


@pytest.mark.parametrize("delay_s", [-0.1, 61, float("nan"), float("inf")])
def test_impossible_delays_are_refused_by_name(delay_s):
    with pytest.raises(ValueError, match=r"fault\.delay_s=.* is not allowed: 0 \(the healthy control\) to 60 seconds"):
        LoaderStall(delay_s)


def test_it_is_healthy_outside_of_its_window():
    healthy = Sites(batch_size=8)
    assert LoaderStall(0.1, onset=3, every=4).sites(4, healthy) is healthy


def test_such_a_run_trains_by_itself(short_run):
    assert "is applied in single runs alone" in why_single(short_run("fault=loader_stall"))
