"""What the monitors of an attached watch see of a step."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial

from torch import Tensor

from foreshock.attaching.due import untouched
from foreshock.attaching.loss_scale import loss_scale
from foreshock.attaching.own_pass import run_again
from foreshock.attaching.sight import Sight
from foreshock.models.anatomies.watched_rows import NoObjective, smooth_objective
from foreshock.models.objective import objective_at
from foreshock.models.transformer import Transformer
from foreshock.monitors.base import LossScaling, StepView
from foreshock.monitors.unreadable import Unreadable


def view_of(
    step: int, loss: Tensor, sight: Sight, places: frozenset[str], routed: bool, scaling: LossScaling | None
) -> StepView:
    """The step in progress; places: to be tapped; routed: whether routings are asked for.

    Where taps or routings are missing that the watched rows can give, these run once more (``attaching.own_pass``).
    """
    anatomy, model, rows = sight.anatomy, sight.anatomy.model, sight.watched if sight.forwards else None
    taps, routings = sight.taps, sight.routings
    missing = not places <= taps.places or bool(untouched(taps, places))
    if rows is not None and (missing or (routed and not routings)):
        taps, routings = run_again(sight, rows, places, routed)
    objective: Callable[[Mapping[str, Tensor]], Tensor] | None = None
    if rows is not None and isinstance(model, Transformer):
        objective = partial(objective_at, model, rows.arguments[0], 1.0)
    elif rows is not None:
        objective = _readable(smooth_objective(model, rows, anatomy.head_shape))
    assert sight.grad_norm is not None
    return StepView(
        step=step,
        tokens=sight.tokens,
        loss=loss,
        grad_norm=sight.grad_norm,
        anatomy=anatomy,
        routings=routings,
        taps=taps,
        objective_at=objective,
        batch=None if rows is None else rows.tokens,
        loss_scale=loss_scale(anatomy, taps) if "linear" in places else None,
        scaling=scaling,
        update_tokens=sight.update_tokens,
    )


def _readable(objective: Callable[[Mapping[str, Tensor]], Tensor]) -> Callable[[Mapping[str, Tensor]], Tensor]:
    """The objective, but where the model returns none its monitors leave the step out."""

    def at(weights: Mapping[str, Tensor]) -> Tensor:
        try:
            return objective(weights)
        except NoObjective as error:
            raise Unreadable(str(error)) from error

    return at
