"""A monitor that is added later reads finished runs without training anything else again."""

import shutil
from dataclasses import replace

import numpy as np
import pytest

from foreshock.experiments import trace
from foreshock.experiments.training import identity, missing_readings
from foreshock.experiments.training.loop import train
from foreshock.experiments.training.missing_readings import finish_replacing, is_complete

SHORT = ("train.steps=20", "train.held_out_every_steps=10", "monitor.delta_w.windows=[10]")
TWO = ("loss", "delta_w")
THREE = (*TWO, "gradient_norm")


@pytest.fixture(autouse=True)
def checked_often(monkeypatch):
    monkeypatch.setattr("experiments.training.loop.CHECKSUM_EVERY_STEPS", 5)


@pytest.fixture
def watched(make_run):
    """Builds the run as these monitors of its configuration watch it."""

    def build(monitors, *overrides):
        run = make_run(*SHORT, *overrides)
        return replace(run, monitors={name: run.monitors[name] for name in monitors})

    return build


def same_readings(one: trace.Trace, other: trace.Trace) -> bool:
    return one.signals.keys() == other.signals.keys() and all(
        np.array_equal(series.values, other.signals[name].values, equal_nan=True)
        for name, series in one.signals.items()
    )


@pytest.fixture
def two(watched, tmp_path):
    """A finished run that two monitors watched."""
    run = watched(TWO)
    train(run, tmp_path)
    return tmp_path / run.run_id


def test_a_monitor_renames_no_run(watched, make_run):
    assert watched(TWO).run_id == watched(THREE).run_id == make_run(*SHORT).run_id


def test_a_monitor_that_was_added_reads_what_it_would_have_read(watched, two, tmp_path):
    assert not is_complete(two, watched(THREE))
    manifest = train(watched(THREE), tmp_path)
    assert is_complete(two, watched(THREE)) and is_complete(two, watched(TWO))
    whole = watched(THREE)
    train(whole, tmp_path / "whole")
    assert same_readings(trace.read(two), trace.read(tmp_path / "whole" / whole.run_id))
    assert manifest["signals"].keys() == trace.read(tmp_path / "whole" / whole.run_id).manifest["signals"].keys()
    assert not (two / "again").exists()


def test_what_was_read_before_is_not_written_again(watched, two, tmp_path):
    before = {path: path.read_bytes() for path in (two / "trace").iterdir()}
    train(watched(THREE), tmp_path)
    assert all(path.read_bytes() == content for path, content in before.items())


def test_a_monitor_that_is_configured_otherwise_reads_again_and_its_old_readings_go(watched, two, tmp_path):
    often = watched(TWO, "monitor.delta_w.every_steps=2")
    train(often, tmp_path)
    name = "delta_w_norm.q.w10"
    assert trace.read(two).signals[name].steps.tolist() == list(range(10, 21, 2))
    assert trace.read(two).signals["train_loss_raw"].steps.tolist() == list(range(1, 21))
    assert is_complete(two, often)


def test_on_a_machine_that_rounds_otherwise_the_run_is_trained_whole(watched, two, tmp_path):
    manifest = trace.read_manifest(two)
    manifest["weights_sha256"]["10"] = "0" * 64
    trace.write_manifest(two, manifest)
    train(watched(THREE), tmp_path)
    whole = watched(THREE)
    train(whole, tmp_path / "whole")
    assert same_readings(trace.read(two), trace.read(tmp_path / "whole" / whole.run_id))
    assert trace.read_manifest(two)["weights_sha256"]["10"] != "0" * 64
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(two.name)] == [two.name]


def test_a_run_whose_readings_were_broken_off_goes_on(watched, two, tmp_path):
    def stop(now, *_):
        if now == 7:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(watched(THREE, "train.checkpoint_every_steps=5"), tmp_path, stop)
    assert trace.is_done(two) and same_readings(trace.read(two), trace.read(two))
    assert train(watched(THREE), tmp_path)["end_reason"] == "completed"
    assert is_complete(two, watched(THREE))


def test_a_monitor_whose_mathematics_changed_reads_again(watched, two, monkeypatch):
    digest = identity.monitor_digest
    monkeypatch.setattr(identity, "monitor_digest", lambda module: digest(module) + "2")
    assert missing_readings.without_readings(watched(TWO), trace.read_manifest(two)) == list(TWO)


def test_other_monitors_leave_what_was_read_before(watched, two, tmp_path):
    """All that are asked for are missing: they are added all the same."""
    train(watched(("gradient_norm",)), tmp_path)
    assert {"train_loss_raw", "grad_global_norm", "delta_w_norm.q.w10"} <= trace.read(two).signals.keys()
    assert is_complete(two, watched(THREE))


def test_readings_are_added_again_and_again(watched, two, tmp_path):
    for every in (2, 4, 5):
        train(watched(TWO, f"monitor.delta_w.every_steps={every}"), tmp_path)
        train(watched(("gradient_norm",), f"monitor.gradient_norm.every_steps={every}"), tmp_path)
    signals = trace.read(two).signals
    assert signals["delta_w_norm.q.w10"].steps.tolist() == [10, 15, 20]
    assert signals["grad_global_norm"].steps.tolist() == [5, 10, 15, 20]
    assert signals["train_loss_raw"].steps.tolist() == list(range(1, 21))
    assert trace.is_done(two)


def test_a_signal_that_its_monitor_no_longer_has_goes(watched, two, tmp_path):
    train(watched(TWO, "monitor.delta_w.windows=[5]"), tmp_path)
    assert not [name for name in trace.read(two).signals if name.endswith(".w10")]
    assert "delta_w_norm.q.w5" in trace.read(two).manifest["signals"]


def test_a_replacement_that_was_killed_is_finished(watched, two, tmp_path):
    aside = missing_readings._aside(two)
    shutil.copytree(two, aside)
    trace.write_manifest(aside, trace.read_manifest(two) | {"whole": True})
    finish_replacing(two)
    assert trace.read_manifest(two)["whole"] and not aside.exists()
    finish_replacing(two)
    assert trace.is_done(two)
