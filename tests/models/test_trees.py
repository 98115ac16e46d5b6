"""Trees of tensors: mapped in a fixed order, stacked, and refused where something could be overlooked."""

from collections import deque
from dataclasses import dataclass

import pytest
import torch

from foreshock.models.trees import map_tensors, stack_trees, tensors_of, with_tensors


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


def test_what_could_hide_tensors_is_refused():
    hidden = {"a": [deque([torch.ones(1)])]}
    with pytest.raises(TypeError, match="deque is not allowed around tensors: mappings, lists, tuples, dataclasses"):
        tensors_of(hidden)
    assert map_tensors(torch.neg, hidden) == hidden


def test_trees_that_differ_beside_their_tensors_are_not_stacked():
    trees = [{"a": torch.ones(1), "step": step} for step in (3, 4)]
    with pytest.raises(ValueError, match="differ in more than their tensors"):
        stack_trees(trees)
    assert stack_trees([trees[0], trees[0]])["step"] == 3
