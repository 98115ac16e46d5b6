"""The taps of a stacked model as one of its slices would have them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

import torch.nn as nn
from torch import Tensor

from models.stacked import StackedTransformer
from models.taps import Tap, Taps


class SliceTaps(Taps):
    """The part of slice ``index`` in taps on a stacked model; read only, after the step.

    A tap's module is the slice's own, its tensors are views of the stacked ones.
    """

    def __init__(self, stacked: Taps, model: StackedTransformer, index: int) -> None:
        super().__init__(model, ())
        self._stacked, self._slice, self._index = stacked, model.slices[index], index

    def at(self, place: str) -> Mapping[str, Tap]:
        if place not in self._taps:
            self._taps[place] = {name: self._part(name, tap) for name, tap in self._stacked.at(place).items()}
        return self._taps[place]

    def _part(self, name: str, tap: Tap) -> Tap:
        values = {field.name: self._row(getattr(tap, field.name)) for field in fields(Tap)}
        return Tap(**{**values, "module": self._slice.get_submodule(name)})

    def _row(self, value: Any) -> Any:
        """This slice's part of whatever holds tensors; what holds none stays as it is."""
        if isinstance(value, Tensor):
            return value[self._index]
        if isinstance(value, tuple):
            return tuple(self._row(v) for v in value)
        if isinstance(value, dict):
            return {key: self._row(v) for key, v in value.items()}
        assert value is None or isinstance(value, nn.Module), f"a tap holds {type(value).__name__}, which has no slices"
        return value
