"""Rows in turn: every row has its time."""

import pytest

from foreshock.monitors.batch_rows import check_rows, in_turn


def test_rows_are_taken_in_turn():
    assert [in_turn(3, reading, 8) for reading in (1, 2, 3)] == [slice(3, 6), slice(6, 9), slice(1, 4)]


def test_every_row_has_its_turn():
    seen = set()
    for reading in range(1, 8):
        seen |= set(range(7)[in_turn(2, reading, 7)])
    assert seen == set(range(7))


@pytest.mark.parametrize(("rows", "available"), [(0, 4), (4, 4), (5, 4)])
def test_all_rows_where_there_is_no_choice(rows, available):
    assert in_turn(rows, 1, available) == slice(None)


def test_a_negative_number_is_refused():
    assert check_rows(0) == 0
    with pytest.raises(ValueError, match=r"monitor\.rows=-1 "):
        check_rows(-1)
