"""Commands that leave off after ``train.piece_s`` seconds, and go on when they are given again."""

from __future__ import annotations

import pytest

from foreshock.experiments import pieces, reproduce, train
from foreshock.experiments.pieces import UNFINISHED_CODE, in_pieces


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def monotonic(self) -> float:
        return self.now


def test_jobs_share_the_seconds_of_a_piece(monkeypatch):
    """Seven jobs of 4 s, two at once, in 10 s: the third pair is cut short, the last job is not launched."""
    clock, launched = Clock(), []
    monkeypatch.setattr(pieces, "time", clock)

    def launch(jobs, left_s):
        launched.append((list(jobs), left_s))
        clock.now += min(4.0, left_s)
        return [f"job {job}" for job in jobs]

    assert in_pieces(range(7), 2, 10.0, launch) == [f"job {job}" for job in range(6)]
    assert launched == [([0, 1], 10.0), ([2, 3], 6.0), ([4, 5], 2.0)]


def test_a_run_that_leaves_off_says_so_in_one_line(tiny, text, tmp_path, monkeypatch, capsys):
    arguments = ["data=text", f"data.path={text}", *tiny, "train.steps=2", "train.held_out_every_steps=2"]
    arguments += [f"out={tmp_path}", "quiet=true"]
    monkeypatch.setattr("sys.argv", ["train", *arguments, "train.piece_s=1e-9"])
    with pytest.raises(SystemExit) as left_off:
        train.main()
    assert left_off.value.code == UNFINISHED_CODE
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("unfinished: ") and "after 1 of 2 steps" in line
    assert line.endswith("train.piece_s=1e-09 seconds; the same command goes on")
    train.main()
    assert (next(tmp_path.iterdir()) / "weights.safetensors").exists()


@pytest.mark.slow
def test_an_experiment_goes_on_piece_by_piece_until_its_report(tiny, text, tmp_path, monkeypatch, capsys):
    arguments = [
        "data=text", f"data.path={text}", *tiny, "train.steps=60", "scale.attention_steps=60",
        "scale.alpha=0.5", "train.piece_s=2",
        "scale.seeds={reference: 4, calibration: 1, test: 0, faulty: 1}", "at_once=1",
        "monitor.qk_increment.every_steps=10", "monitor.delta_w.every_steps=10",
        f"out={tmp_path / 'runs'}", f"report={tmp_path / 'report'}",
    ]  # fmt: skip
    monkeypatch.setattr("sys.argv", ["reproduce", *arguments])
    left = []
    for _ in range(100):
        try:
            reproduce.main()
            break
        except SystemExit as left_off:
            assert left_off.code == UNFINISHED_CODE
            line = next(line for line in capsys.readouterr().err.splitlines() if line.startswith("unfinished: "))
            assert line.endswith("runs are left after train.piece_s=2 seconds; the same command goes on")
            left.append(int(line.split()[1]))
            assert not (tmp_path / "report" / "index.html").exists()
    assert left == sorted(left, reverse=True) and 1 <= left[0] <= 6
    assert (tmp_path / "report" / "index.html").exists()
