"""The folder of an attached watch is read, loaded and calibrated as a run of our own is."""

from __future__ import annotations

import pytest
import torch

import foreshock
from foreshock.analysis.calibrate import calibrate, options
from foreshock.analysis.runs.discover import find
from foreshock.experiments import trace
from foreshock.experiments.training.recorder import Recorder
from foreshock.monitors.base import Masked
from tests.attaching.loops import batches, gpt, train


def test_a_saved_run_is_loaded_and_scoring_says_that_it_has_no_fault(tmp_path):
    train(gpt(), True, out=tmp_path / "runs" / "a", profile="icu")
    table = foreshock.load(tmp_path / "runs", signals=["train_loss_raw"])
    assert table["step"].tolist() == [1, 2, 3, 4, 5, 6, 7]
    assert set(table["role"]) == {"attached"} and set(table["fault"]) == {"healthy"} and set(table["seed"]) == {-1}
    with pytest.raises(trace.TraceError, match=r"^run a is of foreshock\.attach and has no fault to score"):
        find(tmp_path / "runs")


def test_saved_runs_are_calibrated(tmp_path):
    for name in "abc":
        torch.manual_seed(ord(name))
        train(gpt(), True, steps=60, out=tmp_path / "runs" / name, monitors=["loss"], alarms=False)
    given = [f"runs={tmp_path / 'runs'}", f"out={tmp_path / 'limits.json'}", "alpha=0.34", "track=self", "joint=false"]
    assert calibrate(options(given)).runs


def test_a_manifest_says_which_readings_are_jittered(tmp_path):
    train(gpt(), True, out=tmp_path / "run", monitors=["loss", "update_to_weight"])
    saved = trace.read(tmp_path / "run")
    assert saved.described["update_to_weight"].jittered
    for name, series in saved.signals.items():
        cadence = saved.described[name].cadence
        assert series.steps.tolist() == [step for step in range(1, 8) if cadence.is_due(step)], name


def test_a_signal_that_is_masked_at_some_steps_alone_is_written():
    recorder = Recorder()
    recorder.add(1, 8, {"x": torch.tensor([1.0, 2.0])})
    recorder.add(2, 16, {"x": Masked(torch.tensor([3.0, 4.0]), torch.tensor([False, True]))})
    columns = recorder.columns()
    assert columns["value"].tolist() == [1.0, 2.0, 3.0, 4.0]
    assert columns["undefined"].tolist() == [False, False, False, True]


def test_a_part_that_cannot_be_made_stops_the_watch_and_not_the_training(tmp_path, monkeypatch):
    def broken(self, run=None):
        raise TypeError("a reading is wrong")

    monkeypatch.setattr(Recorder, "columns", broken)
    watch = train(gpt(), True, out=tmp_path / "run", monitors=["loss"]).watch
    assert watch.stopped.startswith("TypeError: a reading is wrong")
    manifest = trace.manifest_of(tmp_path / "run")
    assert (manifest["end_reason"], manifest["steps_done"], manifest["files"]) == ("stopped", 0, {})


@pytest.mark.parametrize(
    ("raised", "reason"), [(RuntimeError, "failed"), (KeyboardInterrupt, "interrupted"), (None, "completed")]
)
def test_a_manifest_says_how_the_training_ended(raised, reason, tmp_path):
    model, batch = gpt(), batches(1)[0]
    optimizer = torch.optim.AdamW(model.parameters())

    def training() -> None:
        with foreshock.attach(model, optimizer, out=tmp_path / "run", monitors=["loss"], quiet=True) as watch:
            loss = model(batch[:, :-1], batch[:, 1:])[1]
            loss.backward()
            optimizer.step()
            watch.step(loss)
            if raised is not None:
                raise raised

    if raised is None:
        training()
    else:
        with pytest.raises(raised):
            training()
    assert trace.manifest_of(tmp_path / "run")["end_reason"] == reason
