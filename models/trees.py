"""Tensors inside mappings, sequences and dataclasses: how to reach them all without knowing what holds them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import fields, is_dataclass
from typing import Any

import torch
from torch import Tensor, nn

LEAVES = (str, int, float, type(None), torch.dtype, torch.device, nn.Module)
"""What may stand beside tensors, and holds none that are meant."""


def _as_it_is(leaf: Any) -> Any:
    return leaf


def map_tensors(function: Callable[[Tensor], Any], tree: Any, of_others: Callable[[Any], Any] = _as_it_is) -> Any:
    """The same tree with ``function`` of each tensor in its place, in a fixed order.

    of_others: the same for whatever is neither a tensor nor a mapping, list, tuple or dataclass.
    """
    if isinstance(tree, Tensor):
        return function(tree)
    if isinstance(tree, Mapping):
        return {key: map_tensors(function, value, of_others) for key, value in tree.items()}
    values: list[Any] | dict[str, Any]
    if isinstance(tree, (list, tuple)):
        values = [map_tensors(function, value, of_others) for value in tree]
        return type(tree)(*values) if hasattr(tree, "_fields") else type(tree)(values)
    if is_dataclass(tree):
        values = {field.name: map_tensors(function, getattr(tree, field.name), of_others) for field in fields(tree)}
        return type(tree)(**values)  # type: ignore[misc]  # a value, where is_dataclass allows a class as well
    return of_others(tree)


def _refuse_what_may_hold_tensors(leaf: Any) -> None:
    if not isinstance(leaf, LEAVES):
        raise TypeError(f"{type(leaf).__name__} is not allowed around tensors: mappings, lists, tuples, dataclasses")


def tensors_of(tree: Any) -> list[Tensor]:
    """All tensors, in the order of ``map_tensors``. Raises TypeError where some could hide in what it cannot open."""
    found: list[Tensor] = []
    map_tensors(found.append, tree, _refuse_what_may_hold_tensors)
    return found


def with_tensors(tree: Any, tensors: Iterable[Tensor]) -> Any:
    """The same tree with these in place of its own, in the order of ``tensors_of``."""
    remaining = iter(tensors)
    return map_tensors(lambda _: next(remaining), tree)


def stack_trees(trees: Sequence[Any]) -> Any:
    """Trees of one form as one, whose tensors have an axis in front.

    Raises ValueError where they differ in anything but their tensors.
    """
    forms = [map_tensors(lambda _: None, tree) for tree in trees]
    if any(form != forms[0] for form in forms):
        raise ValueError("trees that differ in more than their tensors cannot be stacked")
    return with_tensors(trees[0], [torch.stack(alike) for alike in zip(*map(tensors_of, trees), strict=True)])
