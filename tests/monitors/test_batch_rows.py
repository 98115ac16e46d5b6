"""Rows in turn: every row has its time, and the step alone says when."""

import pytest

from monitors.batch_rows import RowsInTurn


def test_rows_are_taken_in_turn():
    rows = RowsInTurn(3, every_steps=10)
    assert [rows.at(step, 8) for step in (10, 20, 30)] == [slice(3, 6), slice(6, 9), slice(1, 4)]


def test_every_row_has_its_turn():
    rows, seen = RowsInTurn(2, every_steps=5), set()
    for step in range(5, 45, 5):
        seen |= set(range(7)[rows.at(step, 7)])
    assert seen == set(range(7))


@pytest.mark.parametrize(("rows", "available"), [(0, 4), (4, 4), (5, 4)])
def test_all_rows_where_there_is_no_choice(rows, available):
    assert RowsInTurn(rows, every_steps=10).at(10, available) == slice(None)


def test_a_negative_number_is_refused():
    with pytest.raises(ValueError, match=r"monitor\.rows=-1 "):
        RowsInTurn(-1, every_steps=10)
