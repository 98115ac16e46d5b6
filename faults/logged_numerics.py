"""Attention's numerics with an injection log."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

from torch import Tensor

from foreshock.faults.log import InjectionLog
from foreshock.models.arithmetic import ORDINARY
from foreshock.models.numerics import AttentionNumerics, LayerNumerics
from foreshock.models.stacked import StackedNumerics


class _LoggedLayer(LayerNumerics):
    """A layer's numerics with the logs of the runs of one fault that follow one another in the batch."""

    __slots__ = ("_logs",)

    def __init__(self, layer: LayerNumerics, logs: Sequence[InjectionLog]) -> None:
        super().__init__(dict(layer.items()), layer.arithmetic, layer.wiring)
        self._logs = logs

    def apply(self, site: str, phase: str, x_BHT: Tensor, nonfinite: Tensor, window: int | None = None) -> Tensor:
        out, change = super().apply(site, phase, x_BHT, nonfinite, window), ("numerics", f"{site} {phase}", site)
        if out is not x_BHT and self._logs[0].wants(*change):  # they have measured the same steps
            runs = len(self._logs)
            for log, before, after in zip(self._logs, x_BHT.chunk(runs), out.chunk(runs), strict=True):
                log.add(*change, before, after)
        return out

    def hears(self, change: str) -> bool:
        return self._logs[0].wants(*_entry(change))  # they have measured the same steps

    def note(self, change: str, before: Tensor, after: Tensor, batched: bool = False) -> None:
        runs = len(self._logs)
        befores, afters = (x.chunk(runs) if batched else [x] * runs for x in (before, after))
        for log, *of_run in zip(self._logs, befores, afters, strict=True):
            log.add(*_entry(change), *of_run)


def _entry(change: str) -> tuple[str, str, str]:
    """Under which point, operation and tensor a log has what is noted."""
    return "numerics", f"{change} both", change


@dataclass(frozen=True)
class LoggedNumerics:
    """The numerics of a run, or of a stack, with a log for each run.

    Wirings are measured on every backend. What bit operations and ``arithmetic`` change is measured where attention is
    plain PyTorch (``reference``), not in a kernel; of what ``arithmetic`` does, the product P V alone.
    """

    numerics: AttentionNumerics | StackedNumerics
    logs: Sequence[InjectionLog]

    def layer(self, index: int) -> LayerNumerics | list[tuple[LayerNumerics, int]]:
        layers = self.numerics.layer(index)
        if isinstance(layers, LayerNumerics):
            return _logged(layers, self.logs)
        ends = accumulate(size for _, size in layers)
        return [(_logged(layer, self.logs[e - size : e]), size) for (layer, size), e in zip(layers, ends, strict=True)]


def logged(
    numerics: AttentionNumerics | StackedNumerics, logs: Sequence[InjectionLog], backend: str
) -> AttentionNumerics | StackedNumerics | LoggedNumerics:
    """The numerics with a log where they are faulty and the backend lets it see, else as they are."""
    runs = numerics.slices if isinstance(numerics, StackedNumerics) else (numerics,)
    in_pytorch = backend == "reference"
    watched = any(run.wirings or (in_pytorch and (run.faults or run.arithmetic != ORDINARY)) for run in runs)
    return LoggedNumerics(numerics, logs) if watched else numerics


def _logged(layer: LayerNumerics, logs: Sequence[InjectionLog]) -> LayerNumerics:
    return _LoggedLayer(layer, logs) if layer else layer
