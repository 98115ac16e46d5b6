"""Pairs of detectors, seed by seed, with a known order."""

import numpy as np
import pandas as pd
import pytest

from foreshock.analysis.order import leads, main, order_table

PAPER = {"Delta2 entropy": [3770, 4390, 5030, 4320, 4290], "Delta W entropy": [2970, 3890, 5030, 4670, 3090]}


def runs(found, **columns) -> pd.DataFrame:
    rows = [(name, 3000 + i, "attention", lead) for name, steps in found.items() for i, lead in enumerate(steps)]
    return pd.DataFrame(rows, columns=["detector", "seed", "fault", "restricted_lead_steps"]).assign(**columns)


def test_the_papers_order_by_hand():
    """800 + 500 + 0 - 350 + 1200: of 32 patterns of signs 4 reach that sum, for the tie has two signs."""
    row = order_table(leads(runs(PAPER), "attention"), "Delta2 entropy").loc[0]
    assert row[["against", "seeds", "earlier", "tied", "later"]].tolist() == ["Delta W entropy", 5, 3, 1, 1]
    assert (row["mean_steps"], row["p"], row["smallest_p"]) == (430, 4 / 32, 1 / 32)
    assert np.isnan([row["low"], row["high"]]).all()  # five seeds carry no interval
    back = order_table(leads(runs(PAPER), "attention"), "Delta W entropy").loc[0]
    assert (back["mean_steps"], back["earlier"], back["later"]) == (-430, 1, 3) and back["p"] > 0.5


def test_many_seeds_have_an_interval():
    first = 100 + np.random.default_rng(0).normal(size=30)
    row = order_table(leads(runs({"a": first, "b": np.full(30, 58.0)}), "attention"), "a", ["b"]).loc[0]
    assert 41 < row["low"] < row["mean_steps"] < row["high"] < 43 and row["p"] == row["smallest_p"]


def test_a_board_of_many_tracks_and_kinds_is_confined_to_one(tmp_path, capsys):
    board = runs(PAPER, track="reference", model="mha_nano", kind="detector").rename(
        columns={"restricted_lead_steps": "lead"}
    )
    others = [board.assign(track="self", lead=0), board.assign(model="moe_nano", lead=0), board.assign(fault="ramp")]
    oracle = board[board["detector"] == "Delta2 entropy"].assign(detector="onset oracle", kind="control")
    healthy = board.assign(fault="healthy", lead=np.nan)
    pd.concat([board, *others, oracle, healthy]).to_csv(tmp_path / "runs.csv", index=False)
    main([f"table={tmp_path}/runs.csv", "detector=Delta2 entropy"])
    said = capsys.readouterr().out
    assert "Delta W entropy      5        3     1      1" in said and "oracle" not in said


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (["detector=Delta2 entrop"], "detector 'Delta2 entrop' is not in the table: did you mean 'Delta2 entropy'?"),
        (["detector=Delta2 entropy", "against=nobody"], "detector 'nobody' is not in the table"),
        (["detector=Delta2 entropy", "against=Delta2 entropy"], "no detector is compared with itself"),
        (["detector=Delta2 entropy", "against=Delta W entropy,Delta W entropy"], "Delta W entropy stands there twice"),
        (["detector=Delta2 entropy", "fault=rmap"], "fault='rmap' is not allowed: one of attention"),
    ],
)
def test_what_is_not_there_is_named_in_one_line(given, said, tmp_path, capsys):
    runs(PAPER).to_csv(tmp_path / "runs.csv", index=False)
    with pytest.raises(SystemExit) as ended:
        main([f"table={tmp_path}/runs.csv", *given])
    captured = capsys.readouterr()
    assert ended.value.code == 2 and said in captured.err and captured.err.count("\n") == 1


TWICE = "detector,seed,fault,restricted_lead_steps\na,1,attention,5\na,1,attention,7\n"


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "is empty: a CSV with columns detector, seed, fault is needed"),
        (TWICE.encode("utf-16"), "is no CSV in UTF-8"),
        (bytes(range(256)), "is no CSV"),
        (b"detector,seed\na,1\n", "has no column 'fault'"),
        (b"detector,seed,fault\na,1,attention\n", "no column 'lead' or 'restricted_lead_steps'"),
        (TWICE.encode(), "seed 1 has two rows of 'a'"),
        (TWICE.replace("a,1,attention,7", "b,1,attention,soon").encode(), "restricted_lead_steps='soon'"),
        (TWICE.replace("a,1,attention,7", "a,2,attention,7").encode(), "detector 'a' is alone in the table"),
    ],
)
def test_a_file_that_is_no_table_of_runs_is_named_in_one_line(content, said, tmp_path, capsys):
    path = tmp_path / "mine.csv"
    path.write_bytes(content)
    with pytest.raises(SystemExit) as ended:
        main([f"table={path}", "detector=a"])
    captured = capsys.readouterr()
    assert ended.value.code == 2 and captured.err.startswith(f"error: table={path}") and said in captured.err
    assert captured.err.count("\n") == 1


@pytest.mark.parametrize("path", ["nowhere.csv", "."])
def test_a_file_that_cannot_be_read_is_named_in_one_line(path, capsys):
    with pytest.raises(SystemExit) as ended:
        main([f"table={path}", "detector=a"])
    captured = capsys.readouterr()
    assert ended.value.code == 2 and captured.err.startswith(f"error: table={path} ")
    assert captured.err.count("\n") == 1
