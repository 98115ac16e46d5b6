"""A run that was stopped, killed or broken goes on to the same bits, and nothing measured is lost."""

import errno
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from foreshock.experiments import trace
from foreshock.experiments.build import ROOT
from foreshock.experiments.trace import TraceError
from foreshock.experiments.training import checkpoint
from foreshock.experiments.training.checkpoint import RunError
from foreshock.experiments.training.loop import train
from tests.experiments.same_result import WEIGHTS, assert_same_result

MOE = (
    "model=moe_nano", "model.moe.n_experts=4", "model.moe.capacity_factor=1.0", "model.moe.bias_update_speed=0.01",
    "monitor.expert_load.window=7",
)  # fmt: skip


class Killed(BaseException):
    pass


def stop_at(step: int):
    def progress(now, *_):
        if now == step:
            raise Killed

    return progress


@pytest.fixture
def whole(make_run, tmp_path) -> Path:
    run = make_run("fault=bf16_shift")
    train(run, tmp_path / "whole")
    return tmp_path / "whole" / run.run_id


@pytest.mark.parametrize("stops", [[3], [10], [11], [25], [39], [7, 19, 20, 33]])
def test_a_stopped_run_resumes_to_the_same_bits(make_run, tmp_path, whole, stops):
    for step in stops:
        with pytest.raises(Killed):
            train(make_run("fault=bf16_shift"), tmp_path / "out", stop_at(step))
    manifest = train(make_run("fault=bf16_shift"), tmp_path / "out")
    assert manifest["end_reason"] == "completed"
    assert_same_result(tmp_path / "out" / manifest["run_id"], whole)


@pytest.mark.parametrize("stops", [[10], [11, 25]])
def test_a_mixture_of_experts_resumes_to_the_same_bits(make_run, tmp_path, stops):
    """The balancing bias and the load monitor's window are part of the checkpoint."""
    whole = train(make_run("fault=combined", *MOE), tmp_path / "whole")
    for step in stops:
        with pytest.raises(Killed):
            train(make_run("fault=combined", *MOE), tmp_path / "out", stop_at(step))
    train(make_run("fault=combined", *MOE), tmp_path / "out")
    assert_same_result(tmp_path / "out" / whole["run_id"], tmp_path / "whole" / whole["run_id"])


@pytest.mark.slow
@pytest.mark.parametrize("pieces", [("train.micro_batch=4",), ("train.micro_batch=3", "train.watched_sequences=1")])
def test_mixed_precision_in_micro_batches_resumes_to_the_same_bits(make_run, tmp_path, pieces):
    mixed = ("fault=combined", "model=moe_nano", "train.precision=bf16", *pieces)
    end_to_end = train(make_run(*mixed), tmp_path / "whole")
    with pytest.raises(Killed):
        train(make_run(*mixed), tmp_path / "out", stop_at(25))
    train(make_run(*mixed), tmp_path / "out")
    assert end_to_end["dtype"] == "bfloat16"
    assert_same_result(tmp_path / "out" / end_to_end["run_id"], tmp_path / "whole" / end_to_end["run_id"])


def test_a_part_written_after_the_last_checkpoint_is_cut_back(make_run, tmp_path, whole, monkeypatch):
    """A kill between a part and its checkpoint leaves rows that no checkpoint knows."""
    saved = checkpoint.save

    def killed_at_20(folder, state):
        if state["step"] == 20:
            raise Killed
        saved(folder, state)

    monkeypatch.setattr(checkpoint, "save", killed_at_20)
    with pytest.raises(Killed):
        train(make_run("fault=bf16_shift"), tmp_path / "out")
    folder = tmp_path / "out" / whole.name
    assert [path.stem[-9:] for path in sorted((folder / "trace").iterdir())] == ["000000010", "000000020"]
    monkeypatch.setattr(checkpoint, "save", saved)
    train(make_run("fault=bf16_shift"), tmp_path / "out")
    assert_same_result(folder, whole)


@pytest.mark.e2e
@pytest.mark.slow
def test_a_sigkill_loses_nothing_that_a_resume_does_not_bring_back(tiny, text, tmp_path):
    command = [
        sys.executable,
        "-m",
        "experiments.train",
        "data=text",
        f"data.path={text}",
        *tiny,
        "train.steps=400",
        "quiet=true",
    ]
    out = tmp_path / "killed"
    process = subprocess.Popen([*command, f"out={out}"], cwd=ROOT, start_new_session=True)
    deadline = time.monotonic() + 60
    while not list(out.glob("*/checkpoint.pt")) and time.monotonic() < deadline:
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    folder = next(out.iterdir())
    assert not (folder / WEIGHTS).exists()
    for target in (out, tmp_path / "whole"):
        subprocess.run([*command, f"out={target}"], cwd=ROOT, check=True)
    assert_same_result(folder, tmp_path / "whole" / folder.name)


@pytest.mark.slow
def test_pieces_resume_to_the_same_bits_and_say_that_they_go_on(make_run, tmp_path, whole):
    """No time at all: every piece is one step, and none of them writes what only a finished run has."""
    pieces = 0
    folder = tmp_path / make_run("fault=bf16_shift").run_id
    while train(make_run("fault=bf16_shift", "train.piece_s=1e-9"), tmp_path)["end_reason"] != "completed":
        pieces += 1
        manifest = trace.read_manifest(folder)
        assert (manifest["end_reason"], manifest["steps_done"]) == ("interrupted", pieces)
        assert (folder / "checkpoint.pt").exists() and not (folder / WEIGHTS).exists()
    assert pieces == 39
    assert_same_result(folder, whole)


def test_a_finished_run_is_skipped(make_run, tmp_path):
    run = make_run()
    train(run, tmp_path)
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / run.run_id).rglob("*") if path.name != "lock"}
    assert train(make_run(), tmp_path, stop_at(1)) == trace.read_manifest(tmp_path / run.run_id)
    assert {path: path.stat().st_mtime_ns for path in before} == before


def test_two_processes_cannot_share_a_run_folder(make_run, tmp_path):
    run = make_run()
    holder = f"in use by process {os.getpid()} on {re.escape(socket.gethostname())} since 2"
    with checkpoint.locked(tmp_path / run.run_id), pytest.raises(RunError, match=holder):
        train(run, tmp_path)
    assert train(run, tmp_path)["end_reason"] == "completed"


def test_a_corrupted_checkpoint_is_named_and_nothing_is_lost(make_run, tmp_path):
    run = make_run()
    with pytest.raises(Killed):
        train(run, tmp_path, stop_at(25))
    path = tmp_path / run.run_id / "checkpoint.pt"
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    parts = sorted((tmp_path / run.run_id / "trace").iterdir())
    with pytest.raises(TraceError, match=rf"checkpoint\.pt is damaged \(does not match.*\): rm -r {path.parent}, then"):
        train(make_run(), tmp_path)
    assert sorted((tmp_path / run.run_id / "trace").iterdir()) == parts


def test_a_full_disk_keeps_what_is_measured_and_the_run_resumes(make_run, tmp_path, whole, monkeypatch):
    write, written = trace.write_whole, []

    def full_after_20(path, data):
        if path.suffix == ".parquet" and len(written) >= 2:
            raise OSError(errno.ENOSPC, "No space left on device", str(path))
        written.append(path) if path.suffix == ".parquet" else None
        write(path, data)

    monkeypatch.setattr(trace, "write_whole", full_after_20)
    with pytest.raises(OSError, match="No space left"):
        train(make_run("fault=bf16_shift"), tmp_path / "out")
    folder = tmp_path / "out" / whole.name
    assert len(list((folder / "trace").glob("*.parquet"))) == 2
    assert trace.read_manifest(folder)["end_reason"] == "failed"
    monkeypatch.setattr(trace, "write_whole", write)
    train(make_run("fault=bf16_shift"), tmp_path / "out")
    assert_same_result(folder, whole)
