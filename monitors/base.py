"""What a monitor is, what it sees, and what it says."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, Protocol, overload, runtime_checkable

import torch
from torch import Tensor, nn

from foreshock.models.anatomy import Anatomy
from foreshock.models.moe import Routing
from foreshock.models.numerics import HEALTHY, AttentionNumerics
from foreshock.models.taps import NO_TAPS, LinearModule, NormModule, Tap, Taps
from foreshock.monitors.cadence import Cadence
from foreshock.monitors.needs import Lookback, Needs
from foreshock.monitors.signal import Signal


@dataclass(frozen=True)
class Masked:
    """A reading of which some entries do not exist, such as the entropy of a zero update.

    value: the reading; undefined: boolean, same shape. An undefined entry is a missing sample; a NaN
    or Inf that is *not* masked arose from a nonzero computation and counts as an alarm.
    """

    value: Tensor
    undefined: Tensor


Reading = Tensor | Masked


@dataclass(frozen=True)
class LossScaling:
    """A GradScaler's scale after the update, and how many updates it has skipped so far for gradients that overflow."""

    scale: float
    skipped: int


class WeightHistory:
    """Copies of the FP32 weights at just those past steps that some monitor will ask for."""

    def __init__(self, lookbacks: Iterable[Lookback]) -> None:
        self._lookbacks = tuple(lookbacks)
        self._snapshots: dict[int, dict[str, Tensor]] = {}

    def _readers(self, step: int) -> list[Lookback]:
        """The lookbacks that will ask for this step's weights."""
        return [lb for lb in self._lookbacks if lb.cadence.is_due(step + lb.steps)]

    @torch.no_grad()
    def record(self, step: int, anatomy: Anatomy) -> None:
        """Forget what no later reading needs, then keep this step's weights for those that will."""
        for old in [s for s in self._snapshots if not any(s + lb.steps >= step for lb in self._readers(s))]:
            del self._snapshots[old]
        due = self._readers(step)
        if due:
            names = {name for lb in due for role in lb.roles for name in anatomy.parameters(role)}
            self._snapshots[step] = {n: weight.clone() for n, weight in anatomy.weights().items() if n in names}

    def at(self, step: int) -> Mapping[str, Tensor] | None:
        """The weights at a past step, or None before the run's first."""
        return None if step < 0 else self._snapshots[step]

    def state_dict(self) -> dict[int, dict[str, Tensor]]:
        return dict(self._snapshots)

    def load_state_dict(self, state: Mapping[int, dict[str, Tensor]]) -> None:
        self._snapshots = dict(state)


NO_HISTORY = WeightHistory(())


@dataclass(frozen=True, kw_only=True)
class StepView:
    """What a monitor sees after an optimizer update. Everything stays on the device; nothing may be written.

    step: updates applied so far, this one included; tokens: training tokens seen so far;
    loss: this batch's mean NLL (0-dim, nats); grad_norm: global L2 norm before the clip (0-dim);
    anatomy: the roles of the model's parts, the model after the update; history: earlier weights, by ``Needs.history``;
    routings: what each layer's router did with this batch, before the update; empty for a dense model; taps: of the
    places in ``Needs.taps``. With ``train.micro_batch`` or ``train.watched_sequences`` routings, taps and objective_at
    are of the batch's last sequences alone. optimizer: after the update, each ``grad`` still as it took it, clipped;
    numerics: what this step's attention was made to do, for oracles alone; objective_at: this step's training
    objective, NLL plus auxiliary losses on its batch without rounding or faults, as a smooth function of all weights by
    name (``models.objective``); batch: the tokens that taps, routings and objective_at are of, (B, T + 1), or inputs
    and targets apart (``models.batch``); loss_scale: what the tapped gradients are times those of the mean over the
    tapped tokens, None for 1; scaling: of the loop's GradScaler, None where nothing scales the loss; skipped: whether
    the GradScaler has thrown this step's gradients away, so that there was no update; read_s: seconds that the read of
    the batch took, None where nobody measured it; update_tokens: training tokens of this update, of attached loops
    alone, None where they are not known. ``Watch.seen`` adds history and optimizer to what an engine gives.
    """

    step: int
    tokens: int
    loss: Tensor
    grad_norm: Tensor
    anatomy: Anatomy
    history: WeightHistory = NO_HISTORY
    routings: tuple[Routing, ...] = ()
    taps: Taps = NO_TAPS
    optimizer: torch.optim.Optimizer | None = None
    numerics: AttentionNumerics = HEALTHY
    objective_at: Callable[[Mapping[str, Tensor]], Tensor] | None = None
    batch: Tensor | None = None
    loss_scale: float | None = None
    scaling: LossScaling | None = None
    skipped: bool = False
    update_tokens: int | None = None
    read_s: float | None = None

    @property
    def model(self) -> nn.Module:
        """The model after the update."""
        return self.anatomy.model

    @overload
    def tapped(self, place: Literal["linear"], role: str) -> list[Tap[LinearModule]]: ...

    @overload
    def tapped(self, place: Literal["norm"], role: str) -> list[Tap[NormModule]]: ...

    def tapped(self, place: str, role: str) -> list[Tap[Any]]:
        """The taps of a role: one, or one a block. None where the model lacks it (``models.anatomy.Anatomy.taps``)."""
        return self.anatomy.taps(role, self.taps.at(place))

    def weights_before(self, steps: int) -> Mapping[str, Tensor] | None:
        """Weights ``steps`` updates ago, or None where the run is younger than that."""
        return self.history.at(self.step - steps)


@runtime_checkable
class Monitor(Protocol):
    """A read-only observer; its constructor's arguments are the keys of ``conf/monitor/<name>.yaml``.

    signals: the series that it gives, each described whole; needs: what it reads for them.

    The loop calls ``observe`` at every step at which some signal is due (``monitors.cadence``), and takes the signals
    that are. Values are 0-dim, per-layer or per-layer-and-head tensors on the device: no ``.item()``. A signal that has
    no reading yet is left out.
    A monitor with memory also has ``state_dict`` and ``load_state_dict``.
    """

    signals: Sequence[Signal]
    needs: Needs

    def observe(self, view: StepView) -> Mapping[str, Reading]: ...


def state_of(monitor: Monitor) -> Any:
    """The monitor's memory for a checkpoint, or None."""
    return monitor.state_dict() if hasattr(monitor, "state_dict") else None


def tapped(monitors: Iterable[Monitor]) -> frozenset[str]:
    """The places that these monitors want tapped."""
    return frozenset(place for monitor in monitors for place in monitor.needs.taps)


def described_signals(monitor: Monitor) -> list[Signal]:
    """A monitor's signals, with whether they are read at jittered steps, which its needs say."""
    return [replace(signal, jittered=monitor.needs.jittered) for signal in monitor.signals]


def cadences(monitor: Monitor) -> tuple[Cadence, ...]:
    """The cadences of a monitor's signals, each once, the fastest first."""
    return tuple(Cadence(steps, monitor.needs.jittered) for steps in sorted({s.every_steps for s in monitor.signals}))


def due_readings(monitor: Monitor, step: int, readings: Mapping[str, Reading]) -> dict[str, Reading]:
    """Of a monitor's readings, those of the signals that are due at a step."""
    due = {cadence.every_steps for cadence in cadences(monitor) if cadence.is_due(step)}
    names = (signal.name for signal in monitor.signals if signal.every_steps in due)
    return {name: readings[name] for name in names if name in readings}
