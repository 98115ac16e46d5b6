"""What a watch has read is not lost where it stops itself, and what it has written not where the process is killed."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import foreshock
from foreshock.analysis.calibrate import healthy_runs, left_out
from foreshock.analysis.runs.discover import find
from foreshock.attaching.sight import Sight
from foreshock.experiments import runs, trace
from foreshock.experiments.files import write_whole
from foreshock.monitors.optimization import GradientNorm
from tests.attaching.loops import gpt, same, train

ROOT = Path(__file__).parents[2]
BROKEN_AT = 5

KILLED = """
import os, signal, sys
from foreshock.monitors.optimization import GradientNorm
from tests.attaching.loops import gpt, train
last = int(sys.argv[2])
kill = lambda step, _: os.kill(os.getpid(), signal.SIGKILL) if step == last else None
train(gpt(), True, steps=last + 1, out=sys.argv[1], monitors="loss", alarms=False, on_readings=kill)
"""


def steps_of(folder: Path) -> list[int]:
    return trace.read(folder).signals["train_loss_raw"].steps.tolist()


def stopped(folder: Path, monkeypatch, **options):
    """A training whose watch is stopped by a hook that raises."""
    keep = Sight._keep

    def broken(self, arguments, named):
        self.calls = getattr(self, "calls", 0) + 1
        if self.calls == BROKEN_AT:
            raise RuntimeError("a batch is wrong")
        keep(self, arguments, named)

    with monkeypatch.context() as patch:
        patch.setattr(Sight, "_keep", broken)
        return train(gpt(), True, out=folder, profile="icu", **options)


def test_a_watch_that_stops_itself_writes_what_it_has_read(tmp_path, monkeypatch):
    without, watched = train(gpt(), False), stopped(tmp_path / "run", monkeypatch)
    assert same(without.left, watched.left)
    assert watched.watch.stopped.startswith("RuntimeError: a batch is wrong")
    saved = trace.read(tmp_path / "run")
    assert (saved.end_reason, saved.horizon, saved.manifest["steps_done"]) == ("stopped", BROKEN_AT - 1, BROKEN_AT - 1)
    assert steps_of(tmp_path / "run") == list(range(1, BROKEN_AT))
    train(gpt(), True, out=tmp_path / "whole", profile="icu")
    whole = trace.read(tmp_path / "whole").signals
    for name, series in saved.signals.items():
        assert series.values.tolist() == whole[name].values[: len(series.values)].tolist(), name


@pytest.mark.parametrize("failures", [1, 2])
def test_a_disk_that_is_full_for_a_while_costs_the_watch_and_no_reading(tmp_path, monkeypatch, failures):
    """It is tried again at once, and once more at ``close()``."""
    left = [None, *[OSError(errno.ENOSPC, "No space left on device")] * failures]

    def full(path, data):
        error = left.pop(0) if left and (path.suffix == ".parquet" or left[0] is None) else None
        if error is not None:
            raise error
        write_whole(path, data)

    monkeypatch.setattr("foreshock.experiments.trace.write_whole", full)
    monkeypatch.setattr("foreshock.experiments.trace.PART_STEPS", 3)
    watch = train(gpt(), True, out=tmp_path / "run", profile="icu").watch
    assert "No space left on device" in watch.stopped and not left
    assert ("out" in watch.tracebacks) == (failures == 2)
    assert trace.read(tmp_path / "run").end_reason == "stopped"
    assert steps_of(tmp_path / "run") == [1, 2, 3]
    assert [event.signal for event in watch.alarms if event.rule == "watch"] == ["out_folder"]


def test_a_reading_that_cannot_be_written_costs_its_own_signal_alone(tmp_path, monkeypatch):
    monkeypatch.setattr(GradientNorm, "observe", lambda self, view: {"grad_global_norm": torch.ones(view.step)})
    watch = train(gpt(), True, out=tmp_path / "run", profile="icu", alarms=False).watch
    assert watch.stopped.startswith("RuntimeError: stack expects each tensor to be equal size")
    saved = trace.read(tmp_path / "run")
    assert saved.end_reason == "stopped" and "grad_global_norm" not in saved.signals
    assert saved.signals["tokens_per_update"].steps.tolist() == steps_of(tmp_path / "run") == list(range(1, 8))


def test_every_command_says_of_a_stopped_run_what_it_is(tmp_path, monkeypatch, capsys):
    folder = tmp_path / "runs"
    stopped(folder / "broken", monkeypatch)
    table = foreshock.load(folder, signals=["train_loss_raw"])
    assert table["step"].tolist() == list(range(1, BROKEN_AT)) and set(table["role"]) == {"attached"}
    with pytest.raises(trace.TraceError, match=r"^run broken is of foreshock\.attach and has no fault to score"):
        find(folder)
    with pytest.raises(trace.TraceError, match="holds no finished healthy run"):
        healthy_runs(folder)
    assert left_out(folder) == ["broken (stopped)"]
    monkeypatch.setenv("COLUMNS", "200")
    runs.main([f"out={folder}"])
    (line,) = [line for line in capsys.readouterr().out.splitlines() if "broken" in line]
    assert "stopped" in line and "it was not trained by this project" in line
    runs.main(["prune", "delete=true", f"out={folder}"])
    assert steps_of(folder / "broken") == list(range(1, BROKEN_AT))  # nobody could train it again


@pytest.mark.parametrize("last", [3, trace.PART_STEPS + 10])
def test_what_a_kill_leaves_is_read(tmp_path, last):
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", KILLED, str(tmp_path / "runs" / "killed"), str(last)]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == -signal.SIGKILL, done.stderr
    folder = tmp_path / "runs" / "killed"
    if last < trace.PART_STEPS:
        with pytest.raises(trace.TraceError, match=r"^run killed \(running\) has no readings: .* every 200 steps"):
            trace.read(folder)
        return
    saved = trace.read(folder)
    assert (saved.end_reason, saved.horizon) == ("running", trace.PART_STEPS)
    assert steps_of(folder) == list(range(1, trace.PART_STEPS + 1))
    assert len(foreshock.load(folder.parent, signals=["train_loss_raw"])) == trace.PART_STEPS
    assert left_out(folder.parent) == ["killed (running)"]
