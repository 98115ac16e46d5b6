"""Tensors inside mappings, sequences and dataclasses: how to reach them all without knowing what holds them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import fields, is_dataclass
from typing import Any

import torch
from torch import Tensor


def map_tensors(function: Callable[[Tensor], Any], tree: Any) -> Any:
    """The same tree with ``function`` of each tensor in its place, in a fixed order; what holds none stays as it is."""
    if isinstance(tree, Tensor):
        return function(tree)
    if isinstance(tree, Mapping):
        return {key: map_tensors(function, value) for key, value in tree.items()}
    if isinstance(tree, (list, tuple)):
        return type(tree)(map_tensors(function, value) for value in tree)
    if is_dataclass(tree):
        return type(tree)(**{field.name: map_tensors(function, getattr(tree, field.name)) for field in fields(tree)})
    return tree


def tensors_of(tree: Any) -> list[Tensor]:
    """All tensors, in the order of ``map_tensors``."""
    found: list[Tensor] = []
    map_tensors(found.append, tree)
    return found


def with_tensors(tree: Any, tensors: Iterable[Tensor]) -> Any:
    """The same tree with these in place of its own, in the order of ``tensors_of``."""
    remaining = iter(tensors)
    return map_tensors(lambda _: next(remaining), tree)


def stack_trees(trees: Sequence[Any]) -> Any:
    """Trees of one form as one, whose tensors have an axis in front; what is no tensor is that of the first."""
    return with_tensors(trees[0], [torch.stack(alike) for alike in zip(*map(tensors_of, trees), strict=True)])
