"""The taps of a stacked model as one of its slices would have them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from foreshock.models.stacked import StackedTransformer
from foreshock.models.taps import Tap, Taps
from foreshock.models.transformer import Transformer
from foreshock.models.trees import map_tensors


def with_modules_of(model: Transformer, taps: Mapping[str, Tap]) -> dict[str, Tap]:
    """The same taps, by name, as if on this model's modules."""
    return {name: replace(tap, module=model.get_submodule(name)) for name, tap in taps.items()}


class SliceTaps(Taps):
    """The part of slice ``index`` in taps on a stacked model; read only, after the step.

    A tap's module is the slice's own, its tensors are views of the stacked ones.
    """

    def __init__(self, stacked: Taps, model: StackedTransformer, index: int) -> None:
        super().__init__(model, ())
        self._stacked, self._slice, self._index = stacked, model.slices[index], index

    def at(self, place: str) -> Mapping[str, Tap]:
        if place not in self._taps:
            part = map_tensors(lambda value: value[self._index], self._stacked.at(place))
            self._taps[place] = with_modules_of(self._slice, part)
        return self._taps[place]


class GivenTaps(Taps):
    """Taps by place that were taken elsewhere, as if on this model's modules."""

    def __init__(self, model: Transformer, taps: Mapping[str, Mapping[str, Tap]]) -> None:
        super().__init__(model, ())
        self._taps = {place: with_modules_of(model, of_place) for place, of_place in taps.items()}
