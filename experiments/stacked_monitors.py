"""Monitors that watch all runs of a stack in one call: ``torch.vmap`` writes their run axis."""

from __future__ import annotations

import copy
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Any

import torch
import torch.nn as nn
from torch import Tensor
from torch.overrides import TorchFunctionMode

from experiments.stacked_history import SliceHistory
from models.numerics import AttentionNumerics
from models.objective import objective_at
from models.stacked_taps import GivenTaps, SliceTaps
from models.taps import Tap
from models.transformer import Transformer
from models.trees import map_tensors, stack_trees, tensors_of, with_tensors
from monitors.base import Monitor, Reading, StepView, WeightHistory, due_readings, state_of, tapped


def stackable(monitor: Monitor) -> bool:
    """Whether the monitor may watch stacked runs in one call."""
    return monitor.needs.stackable


def _is_oracle(monitor: Monitor) -> bool:
    return monitor.needs.oracle


def slice_view(
    stack: StepView, index: int, history: SliceHistory, numerics: AttentionNumerics, tokens_BT1: Tensor
) -> StepView:
    """What a monitor sees of run ``index``, from the view of the stack, for those that watch run by run."""
    model = stack.model.slices[index]
    return replace(
        stack,
        loss=stack.loss[index],
        grad_norm=stack.grad_norm[index],
        model=model,
        history=history,
        taps=SliceTaps(stack.taps, stack.model, index),
        optimizer=stack.optimizer.slices[index],
        numerics=numerics,
        objective_at=partial(objective_at, model, tokens_BT1, 1.0),
    )


class StackedMonitors:
    """The monitors of stacked runs that are ``stackable``, each for all of its runs at once.

    Its memory is stacked here between calls; ``hand_back`` gives a run's monitors theirs again, before a checkpoint.
    monitors: of each run, by name, alike but for what they remember.
    """

    def __init__(self, monitors: Sequence[Mapping[str, Monitor]]) -> None:
        self._monitors = [{name: one for name, one in own.items() if stackable(one)} for own in monitors]
        self._workers = copy.deepcopy(self._monitors[0])
        self._memory = {name: stack_trees([state_of(own[name]) for own in self._monitors]) for name in self._workers}

    @property
    def names(self) -> Collection[str]:
        """The monitors that are watched with here; the others watch run by run."""
        return self._workers.keys()

    def hand_back(self, index: int) -> None:
        """Give the monitors of run ``index`` their part of the memory."""
        for name, memory in self._memory.items():
            if memory is not None:
                self._monitors[index][name].load_state_dict(map_tensors(lambda value: value[index], memory))

    def observe(self, names: Collection[str], view: StepView) -> dict[str, Reading]:
        """What the named monitors read, each reading with a run axis in front.

        view: of the stack: loss and gradient norm (N,), its model, taps, history, ``StackedAdamW``, ``StackedNumerics``
        and objective (N,).
        """
        readings: dict[str, Reading] = {}
        for told, watch in ((False, _watch), (True, _by_numerics)):
            workers = {name: one for name, one in self._workers.items() if name in names and _is_oracle(one) == told}
            if workers:
                given = _Seen.of(view, workers.values()), {name: self._memory[name] for name in workers}
                found, memory = watch(workers, view, given)
                readings |= found
                self._memory |= memory
        return readings


Given = tuple["_Seen", dict[str, Any]]
"""What some runs show, and what their monitors remember, by name."""
Found = tuple[dict[str, Reading], dict[str, Any]]
"""What monitors read, and what they remember now."""


def _watch(workers: Mapping[str, Monitor], view: StepView, given: Given) -> Found:
    """Let these monitors observe runs, as if one, whose tensors have a run axis in front."""
    found: Any = None

    def of_one_run(*tensors: Tensor) -> list[Tensor]:
        nonlocal found
        seen, memory = with_tensors(given, tensors)
        for name, state in memory.items():
            if state is not None:
                workers[name].load_state_dict(state)
        readings: dict[str, Reading] = {}

        def observe(model: Transformer) -> None:
            one = seen.view_of(model, view)
            for worker in workers.values():
                readings.update(due_readings(worker, view.step, worker.observe(one)))

        with _WithRules():
            torch.func.functional_call(_Watched(view.model.slices[0]), seen.weights, (observe,))
        found = readings, {name: state_of(worker) for name, worker in workers.items()}
        return tensors_of(found)

    # "same": what a monitor draws from a generator of its own is so for every run
    stacked = torch.vmap(of_one_run, randomness="same")(*tensors_of(given))
    return with_tensors(found, stacked)


def _by_numerics(workers: Mapping[str, Monitor], view: StepView, given: Given) -> Found:
    """The same with the numerics, which are no tensors: neighbours that have the same are watched together."""
    parts, first = [], 0
    for numerics, size in view.numerics.neighbours:
        rows = slice(first, first + size)
        part = map_tensors(lambda value, rows=rows: value[rows], given)
        parts.append(_watch(workers, replace(view, numerics=numerics), part))
        first += size
    return with_tensors(parts[0], [torch.cat(alike) for alike in zip(*map(tensors_of, parts), strict=True)])


class _WithRules(TorchFunctionMode):
    """What vmap has no rules for: lists of tensors are worked on one by one, other dtypes seen by ``_SeenAs``."""

    def __torch_function__(self, function: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        name = getattr(function, "__name__", "")
        if name == "view" and isinstance(args[-1], torch.dtype):
            return _SeenAs.apply(*args)
        if not name.startswith("_foreach_"):
            return function(*args, **(kwargs or {}))
        operation, (tensors, *others) = getattr(Tensor, name.removeprefix("_foreach_")), args
        beside = [other if isinstance(other, (list, tuple)) else [other] * len(tensors) for other in others]
        return [operation(*operands, **(kwargs or {})) for operands in zip(tensors, *beside, strict=True)]


class _SeenAs(torch.autograd.Function):
    """``x.view(dtype)`` of a dtype as wide, for which vmap has no rule of its own in PyTorch 2.11."""

    @staticmethod
    def forward(x: Tensor, dtype: torch.dtype) -> Tensor:
        return x.view(dtype)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
        pass

    @staticmethod
    def vmap(info: Any, in_dims: tuple, x: Tensor, dtype: torch.dtype) -> tuple[Tensor, int | None]:
        return x.view(dtype), in_dims[0]


class _Watched(nn.Module):
    """``functional_call`` calls a module; this one's ``forward`` hands the model on."""

    def __init__(self, model: Transformer) -> None:
        super().__init__()
        self.model = model

    def forward(self, observe: Any) -> None:
        observe(self.model)


@dataclass(frozen=True)
class _Seen:
    """All tensors that a view of the stack shows, each with the run axis in front, or, inside vmap, without.

    weights: parameters and counters, by the names that ``_Watched`` gives them; history: weights by step; taps: by
    place and module; gradients, exp_avg, exp_avg_sq: by segment of the model; steps, learning_rates: of each segment.
    """

    loss: Tensor
    grad_norm: Tensor
    weights: dict[str, Tensor]
    history: dict[int, Mapping[str, Tensor]]
    taps: dict[str, Mapping[str, Tap]]
    gradients: Sequence[Tensor]
    exp_avg: Sequence[Tensor]
    exp_avg_sq: Sequence[Tensor]
    steps: Tensor
    learning_rates: Tensor

    @classmethod
    def of(cls, view: StepView, monitors: Collection[Monitor]) -> _Seen:
        """Of a stack's view, what these monitors may ask for at this step."""
        model, lookbacks = view.model, [lookback for monitor in monitors for lookback in monitor.needs.history]
        past = {view.step - lookback.steps for lookback in lookbacks if view.step % lookback.every_steps == 0}
        return cls(
            view.loss,
            view.grad_norm,
            {f"model.{name}": tensor.detach() for name, tensor in model.stacked_tensors().items()},
            {step: view.history.at(step) for step in past if step >= 0},
            {place: view.taps.at(place) for place in tapped(monitors)},
            model.gradients,
            *view.optimizer.moments.values(),
            view.optimizer.steps,
            view.optimizer.learning_rates,
        )

    def view_of(self, model: Transformer, stack: StepView) -> StepView:
        """The view of one run, whose weights ``model`` has; stack: the view of all."""
        history = WeightHistory(())
        history.load_state_dict(self.history)
        return replace(
            stack,
            loss=self.loss,
            grad_norm=self.grad_norm,
            model=model,
            history=history,
            taps=GivenTaps(model, self.taps),
            optimizer=_Optimizer(self, model, stack),
        )


class _Optimizer:
    """What a run's ``AdamW`` shows, made when it is asked for; learning rates are 0-dim tensors."""

    def __init__(self, seen: _Seen, model: Transformer, stack: StepView) -> None:
        self._seen, self._model, self._stack = seen, model, stack

    @cached_property
    def _parameters(self) -> dict[str, Tensor]:
        return dict(self._model.named_parameters())

    @cached_property
    def param_groups(self) -> list[dict[str, Any]]:
        for name, gradient in self._stack.model.views(self._seen.gradients).items():
            self._parameters[name].grad = gradient
        groups = self._stack.optimizer.slices[0].param_groups
        return [  # what runs may have of their own is not here
            {"params": [self._parameters[name] for name in names], "lr": rate}
            | {key: group[key] for key in ("name", "betas", "eps")}
            for group, names, rate in zip(groups, self._stack.model.segments, self._seen.learning_rates, strict=True)
        ]

    @cached_property
    def state(self) -> dict[Tensor, dict[str, Tensor]]:
        exp_avg, exp_avg_sq = (self._stack.model.views(x) for x in (self._seen.exp_avg, self._seen.exp_avg_sq))
        return {
            self._parameters[name]: {"step": step, "exp_avg": exp_avg[name], "exp_avg_sq": exp_avg_sq[name]}
            for step, names in zip(self._seen.steps, self._stack.model.segments, strict=True)
            for name in names
        }
