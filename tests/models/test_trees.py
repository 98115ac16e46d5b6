from dataclasses import dataclass

import pytest
import torch

from models.trees import map_tensors, stack_trees, tensors_of, with_tensors


@dataclass
class Pair:
    one: object
    other: object


def tree(value: float) -> dict:
    return {"a": Pair(torch.tensor(value), None), 3: [torch.tensor(value + 1), (torch.tensor(value + 2), "text")]}


def test_every_tensor_is_reached_and_nothing_else_changes():
    assert map_tensors(lambda x: x.item() * 10, tree(1.0)) == {"a": Pair(10.0, None), 3: [20.0, (30.0, "text")]}
    assert [x.item() for x in tensors_of(tree(1.0))] == [1.0, 2.0, 3.0]


def test_tensors_go_back_where_they_came_from():
    assert with_tensors(tree(1.0), tensors_of(tree(4.0))) == tree(4.0)


def test_stacked_trees_have_an_axis_in_front():
    stacked = stack_trees([tree(1.0), tree(5.0)])
    assert map_tensors(torch.Tensor.tolist, stacked) == {
        "a": Pair([1.0, 5.0], None),
        3: [[2.0, 6.0], ([3.0, 7.0], "text")],
    }
    assert stack_trees([None, None]) is None


def test_trees_of_different_forms_do_not_stack():
    with pytest.raises(ValueError):
        stack_trees([tree(1.0), {"a": torch.zeros(())}])
