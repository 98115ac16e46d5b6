"""A bad job of -m does not end the others, and is named at the end."""

import subprocess
import sys

import pytest

from foreshock.experiments import cli, trace, train
from foreshock.experiments.build import ROOT
from foreshock.experiments.pieces import UNFINISHED_CODE


@pytest.fixture
def arguments(tiny, text, tmp_path) -> list[str]:
    return [
        "-m", "data=text", f"data.path={text}", *tiny, "train.steps=2", "train.held_out_every_steps=2",
        "quiet=true", "fault=bf16_shift",
        f"out={tmp_path / 'runs'}", f"hydra.sweep.dir={tmp_path}",
    ]  # fmt: skip


def finished(out) -> int:
    return sum(trace.is_done(folder) for folder in out.iterdir())


def swept(arguments, monkeypatch) -> int:
    monkeypatch.setattr("sys.argv", ["train", *arguments])
    with pytest.raises(SystemExit) as end:
        cli.guarded(train.main, "config")
    return end.value.code


def test_a_bad_job_does_not_end_the_others(arguments, tmp_path, monkeypatch, capsys):
    bad = tmp_path / "runs"
    assert swept([*arguments, "fault.bits=9,5,8,12"], monkeypatch) == 2
    lines = capsys.readouterr().err.splitlines()
    assert [line.split(":")[:2] for line in lines] == [
        ["error", " job 0 (fault.bits=9)"],
        ["error", " job 3 (fault.bits=12)"],
    ]
    assert "bits=9 is not allowed" in lines[0]
    assert finished(bad) == 2


def test_an_error_that_nobody_expected_keeps_its_traceback_and_the_others_their_turn(
    arguments, tmp_path, monkeypatch, capsys
):
    usual = train.run_one

    def broken_at_8(config):
        return usual(config) if config.fault.bits != 8 else 1 / 0

    monkeypatch.setattr(train, "run_one", broken_at_8)
    assert swept([*arguments, "fault.bits=8,5"], monkeypatch) == 2
    said = capsys.readouterr().err
    assert "Traceback" in said and said.splitlines()[-1] == "error: job 0 (fault.bits=8): division by zero"
    assert finished(tmp_path / "runs") == 1


def test_jobs_that_leave_off_do_not_end_the_others(arguments, monkeypatch, capsys):
    assert swept([*arguments, "train.piece_s=1e-9", "seed=0,1"], monkeypatch) == UNFINISHED_CODE
    assert [line.split("(")[0] for line in capsys.readouterr().err.splitlines()] == [
        "unfinished: job 0 ",
        "unfinished: job 1 ",
    ]


@pytest.mark.e2e
@pytest.mark.slow
def test_joblib_s_processes_name_their_bad_jobs_too(arguments, tmp_path):
    command = [sys.executable, "-m", "experiments.train", *arguments, "hydra/launcher=joblib", "fault.bits=9,5"]
    done = subprocess.run([*command, "hydra.launcher.n_jobs=2"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.splitlines() == [
        "error: job 0 (fault.bits=9): fault.bits=9 is not allowed: an integer from 0 to 8"
    ]
    assert finished(tmp_path / "runs") == 1
