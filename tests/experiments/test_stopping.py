"""Signals: what trains saves first, workers end with their parent, and the run comes to the bits of an unbroken one."""

import os
import re
import signal
import subprocess
import sys
import threading
import time
from functools import partial
from pathlib import Path

import pytest

from foreshock.experiments import reproduce, sweep, trace
from foreshock.experiments.build import ROOT, build_run
from foreshock.experiments.training import checkpoint, stopping
from foreshock.experiments.training.loop import train
from tests.experiments.same_result import assert_same_result

PATIENCE_S = 120


def wait_for(condition, process=None) -> None:
    until = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < until and (process is None or process.poll() is None)
        time.sleep(0.02)


def holders(out: Path) -> set[int]:
    """The other processes that hold or held a run there, from the locks' own words."""
    words = [lock.read_text() for lock in out.glob("*/lock")]
    return {int(found[1]) for found in map(re.compile(r"process (\d+) on ").match, words) if found} - {os.getpid()}


def alive(pid: int) -> bool:
    """Whether it runs; one that has ended and that nobody has asked for yet does not."""
    state = subprocess.run(["ps", "-o", "stat=", "-p", str(pid)], capture_output=True, text=True).stdout.strip()
    return state != "" and not state.startswith("Z")


@pytest.mark.e2e
@pytest.mark.slow
def test_workers_end_with_their_parent_and_the_same_command_resumes_to_the_same_bits(tiny, text, tmp_path):
    """SIGTERM, then SIGKILL, of an experiment with two workers; the third time it is left alone."""
    out = tmp_path / "runs"
    small = [line for line in tiny if not line.startswith("train.steps=")]
    command = [
        sys.executable, "-m", "experiments.reproduce", "data=text", f"data.path={text}", *small,
        "scale.attention_steps=60", "scale.seeds={reference: 4, calibration: 1, test: 0, faulty: 1}",
        "scale.alpha=0.5", "at_once=2",
        "monitor.qk_increment.every_steps=10", "monitor.delta_w.every_steps=10",
        f"out={out}", f"report={tmp_path / 'report'}",
    ]  # fmt: skip
    stopped: set[int] = set()
    for number in (signal.SIGTERM, signal.SIGKILL):
        process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True)
        wait_for(lambda before=frozenset(stopped): len(holders(out) - before) == 2, process)
        stopped |= holders(out)
        process.send_signal(number)
        said = process.communicate(timeout=PATIENCE_S)[1]
        wait_for(lambda workers=frozenset(stopped): not any(map(alive, workers)))
        if number == signal.SIGTERM:
            assert process.returncode == 143
            assert said == "stopped by SIGTERM: the same command resumes from the last checkpoints\n"
            left_off = [folder for folder in out.iterdir() if (folder / checkpoint.CHECKPOINT).exists()]
            assert len(left_off) == 2
            assert {trace.read_manifest(folder)["end_reason"] for folder in left_off} == {"interrupted"}
        for folder in out.iterdir():
            with checkpoint.locked(folder):
                pass
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    assert (tmp_path / "report" / "index.html").exists()
    manifest = trace.read_manifest(left_off[0])
    train(build_run(manifest["config"]), tmp_path / "whole")
    assert_same_result(left_off[0], tmp_path / "whole" / left_off[0].name)


@pytest.mark.e2e
@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGHUP, 129)])
def test_a_run_that_is_asked_to_end_saves_first(tiny, text, tmp_path, number, code):
    """Between checkpoints, which are far apart here."""
    out = tmp_path / "runs"
    command = [sys.executable, "-m", "experiments.train", "data=text", f"data.path={text}", *tiny, f"out={out}"]
    command += ["quiet=true", "train.steps=100000", "train.checkpoint_every_steps=100000"]
    heard = partial(signal.signal, number, signal.SIG_DFL)  # a suite under nohup ignores hangups
    process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True, preexec_fn=heard)
    try:
        wait_for(lambda: list(out.glob("*/status.json")), process)
        process.send_signal(number)
        said = process.communicate(timeout=PATIENCE_S)[1]
    finally:
        process.kill()
    assert process.returncode == code
    assert said == f"stopped by {number.name}: the same command resumes from the last checkpoints\n"
    (folder,) = out.iterdir()
    manifest = trace.read_manifest(folder)
    assert manifest["end_reason"] == "interrupted" and 0 < manifest["steps_done"] < 100000
    assert (folder / checkpoint.CHECKPOINT).exists() and not (folder / "status.json").exists()


def signal_after(step: int, number: int):
    def progress(now, *_):
        if now == step:
            signal.raise_signal(number)

    return progress


def test_training_in_a_program_of_one_s_own_saves_and_hands_the_signal_on(make_run, tmp_path):
    run, delivered = make_run(), []
    before = signal.signal(signal.SIGTERM, lambda number, _: delivered.append(number))
    try:
        manifest = train(run, tmp_path, signal_after(13, signal.SIGTERM))
    finally:
        signal.signal(signal.SIGTERM, before)
    assert delivered == [signal.SIGTERM]
    assert (manifest["end_reason"], manifest["steps_done"]) == ("interrupted", 13)
    assert train(run, tmp_path)["end_reason"] == "completed"


def test_a_second_signal_does_not_wait():
    with pytest.raises(stopping.Stopped), stopping.stoppable(), stopping.held():
        signal.raise_signal(signal.SIGTERM)
        assert stopping.asked()
        signal.raise_signal(signal.SIGTERM)
        pytest.fail("the second signal waited too")
    assert not stopping.asked()


def test_an_ignored_hangup_stays_ignored():
    """As under nohup."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with stopping.stoppable(), stopping.held():
            signal.raise_signal(signal.SIGHUP)
            assert not stopping.asked()
    finally:
        signal.signal(signal.SIGHUP, before)


def test_training_in_a_thread_leaves_signals_alone(make_run, tmp_path):
    thread = threading.Thread(target=train, args=(make_run("train.steps=2", "train.held_out_every_steps=2"), tmp_path))
    thread.start()
    thread.join()
    assert trace.is_done(next(tmp_path.iterdir()))


def test_a_stopped_experiment_in_one_process_launches_no_further_run(make_config, tiny, text, tmp_path, monkeypatch):
    """A stack of two is asked after some steps; both are saved, and the healthy runs do not begin."""
    arguments = [
        "data=text", f"data.path={text}", *tiny, "scale.attention_steps=40", "train.stack=2",
        "scale.alpha=0.5", "at_once=1",
        "scale.seeds={reference: 4, calibration: 1, test: 0, faulty: 2}",
        "monitor.qk_increment.every_steps=10", "monitor.delta_w.every_steps=10",
        f"out={tmp_path / 'runs'}", f"report={tmp_path / 'report'}",
    ]  # fmt: skip
    usual = sweep.train_stack

    def asked_at_7(runs, out, progress):
        def shown(step, *rest):
            if step == 7:
                signal.raise_signal(signal.SIGTERM)
            progress(step, *rest)

        return usual(runs, out, shown)

    monkeypatch.setattr(sweep, "train_stack", asked_at_7)
    monkeypatch.setattr("sys.argv", ["reproduce", *arguments])
    with pytest.raises(SystemExit) as end, stopping.stoppable():
        reproduce.main()
    assert end.value.code == 143
    manifests = [trace.read_manifest(folder) for folder in (tmp_path / "runs").iterdir()]
    assert [(one["end_reason"], one["steps_done"]) for one in manifests] == [("interrupted", 7)] * 2
