"""The watch of a stack. Most monitors watch all its runs in one call: ``torch.vmap`` writes their run axis."""

from __future__ import annotations

import copy
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from operator import itemgetter
from typing import Any, NamedTuple

import torch
import torch.nn as nn
from torch import Tensor
from torch.overrides import TorchFunctionMode

from foreshock.experiments.training.stacked_history import SliceHistory, load_history
from foreshock.experiments.training.stacked_optimizer import StackedAdamW
from foreshock.models.anatomy import Anatomy
from foreshock.models.objective import objective_at
from foreshock.models.stacked import StackedNumerics, StackedTransformer
from foreshock.models.stacked_taps import GivenTaps, SliceTaps
from foreshock.models.taps import Tap
from foreshock.models.transformer import Transformer
from foreshock.models.trees import map_tensors, stack_trees, tensors_of, with_tensors
from foreshock.monitors.base import Masked, Monitor, Reading, StepView, WeightHistory, due_readings, state_of, tapped
from foreshock.monitors.watch import Watch, load_memory


class StackedWatch(Watch):
    """The monitors of stacked runs: those that are ``stackable`` watch all runs in one call, the others run by run.

    monitors: of each run, by name, alike but for what they remember. A stackable monitor's memory is stacked here.
    Readings lead with an axis of runs.
    """

    def __init__(self, anatomy: Anatomy, optimizer: StackedAdamW, monitors: Sequence[Mapping[str, Monitor]]) -> None:
        super().__init__(anatomy, optimizer, monitors[0])  # type: ignore[arg-type]  # see ``_Stack``
        self._of_runs = monitors
        self._histories = [SliceHistory(self.history, run) for run in range(len(monitors))]
        self._workers = copy.deepcopy({name: one for name, one in monitors[0].items() if one.needs.stackable})
        self._stack_memory()

    @property
    def together(self) -> frozenset[str]:
        """The monitors that watch all runs in one call."""
        return frozenset(self._workers)

    def _stack_memory(self) -> None:
        self._memory = {name: stack_trees([state_of(own[name]) for own in self._of_runs]) for name in self._workers}

    def observe(self, view: StepView, names: Iterable[str], runs: Collection[int] = (0,)) -> dict[str, Reading]:
        """Of a stack's view; what one of the other ``runs`` would read by itself is undefined."""
        names, stack = list(names), self.seen(view)
        readings = self._observe_together([name for name in names if name in self._workers], stack)
        by_themselves = [name for name in names if name not in self._workers]
        if by_themselves:
            of_run = {run: self._observe_slice(by_themselves, stack, run) for run in runs}
            readings |= _stacked_readings(of_run, len(self._of_runs))
        return readings

    def _observe_slice(self, names: Iterable[str], stack: StepView, run: int) -> dict[str, Reading]:
        slice_ = slice_view(stack, run, self._histories[run])
        readings: dict[str, Reading] = {}
        for name in names:
            readings |= due_readings(self._of_runs[run][name], stack.step, self._of_runs[run][name].observe(slice_))
        return readings

    def _observe_together(self, names: Collection[str], stack: StepView) -> dict[str, Reading]:
        readings: dict[str, Reading] = {}
        for told, watch in ((False, _watch), (True, _by_numerics)):
            workers = {name: self._workers[name] for name in names if self._workers[name].needs.oracle == told}
            if workers:
                given = _Seen.of(stack, workers.values()), {name: self._memory[name] for name in workers}
                of_all, memory = watch(workers, stack, given)
                readings |= of_all
                self._memory |= memory
        return readings

    def state_of(self, run: int = 0) -> dict[str, Any]:
        watched_together = {name: self._of_runs[run][name] for name in self._memory}
        load_memory(watched_together, map_tensors(itemgetter(run), self._memory))
        memory = {name: state_of(monitor) for name, monitor in self._of_runs[run].items()}
        return {"history": self._histories[run].state_dict(), "monitors": memory}

    def load(self, states: Sequence[Mapping[str, Any]]) -> None:
        load_history(self.history, [state["history"] for state in states])
        for monitors, state in zip(self._of_runs, states, strict=True):
            load_memory(monitors, state["monitors"])
        self._stack_memory()


class _Stack(NamedTuple):
    """What the view of a stack has in place of a run's."""

    model: StackedTransformer
    optimizer: StackedAdamW
    numerics: StackedNumerics
    batch: Tensor

    @classmethod
    def of(cls, view: StepView) -> _Stack:
        return cls(view.model, view.optimizer, view.numerics, view.batch)  # type: ignore[arg-type]  # as in a run


def slice_view(stack: StepView, run: int, history: SliceHistory) -> StepView:
    """What a monitor sees of one run, from the view of the stack, for those that watch run by run."""
    of_all = _Stack.of(stack)
    model, batch = of_all.model.slices[run], of_all.batch[run]
    return replace(
        stack,
        loss=stack.loss[run],
        grad_norm=stack.grad_norm[run],
        anatomy=replace(stack.anatomy, model=model),
        history=history,
        taps=SliceTaps(stack.taps, of_all.model, run),
        optimizer=of_all.optimizer.slices[run],
        numerics=of_all.numerics.slices[run],
        batch=batch,
        objective_at=partial(objective_at, model, batch, 1.0),
    )


def _stacked_readings(of_run: Mapping[int, Mapping[str, Reading]], runs: int) -> dict[str, Reading]:
    """Readings by run and signal as readings of all ``runs``; what a run has not read is a missing sample."""
    stacked: dict[str, Reading] = {}
    for name in dict.fromkeys(name for readings in of_run.values() for name in readings):
        known = {run: _masked(readings[name]) for run, readings in of_run.items() if name in readings}
        like = next(iter(known.values()))
        absent = Masked(torch.full_like(like.value, torch.nan), torch.ones_like(like.undefined))
        rows = [known.get(run, absent) for run in range(runs)]
        stacked[name] = Masked(torch.stack([row.value for row in rows]), torch.stack([row.undefined for row in rows]))
    return stacked


def _masked(reading: Reading) -> Masked:
    return reading if isinstance(reading, Masked) else Masked(reading, torch.zeros_like(reading, dtype=torch.bool))


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
        load_memory(workers, memory)
        readings: dict[str, Reading] = {}

        def observe(model: Transformer) -> None:
            one = seen.view_of(model, view)
            for worker in workers.values():
                readings.update(due_readings(worker, view.step, worker.observe(one)))

        with _WithRules():
            torch.func.functional_call(_Watched(_Stack.of(view).model.slices[0]), seen.weights, (observe,))
        found = readings, {name: state_of(worker) for name, worker in workers.items()}
        return tensors_of(found)

    # "same": what a monitor draws from a generator of its own is so for every run
    stacked = torch.vmap(of_one_run, randomness="same")(*tensors_of(given))
    readings_and_memory: Found = with_tensors(found, stacked)
    return readings_and_memory


def _by_numerics(workers: Mapping[str, Monitor], view: StepView, given: Given) -> Found:
    """The same with the numerics, which are no tensors: neighbours that have the same are watched together."""
    parts, first = [], 0
    for numerics, size in _Stack.of(view).numerics.neighbours:
        part: Given = map_tensors(itemgetter(slice(first, first + size)), given)
        parts.append(_watch(workers, replace(view, numerics=numerics), part))
        first += size
    together: Found = with_tensors(parts[0], [torch.cat(alike) for alike in zip(*map(tensors_of, parts), strict=True)])
    return together


class _WithRules(TorchFunctionMode):
    """What vmap has no rules for: lists of tensors are worked on one by one, other dtypes seen by ``_SeenAs``."""

    def __torch_function__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        name = getattr(function, "__name__", "")
        if name == "view" and isinstance(args[-1], torch.dtype):
            return _SeenAs.apply(*args)  # type: ignore[no-untyped-call]  # PyTorch's own has no types
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
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        pass

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], x: Tensor, dtype: torch.dtype) -> tuple[Tensor, int | None]:
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
    history: dict[int, dict[str, Tensor]]
    taps: dict[str, Mapping[str, Tap[nn.Module]]]
    gradients: Sequence[Tensor]
    exp_avg: Sequence[Tensor]
    exp_avg_sq: Sequence[Tensor]
    steps: Tensor
    learning_rates: Tensor

    @classmethod
    def of(cls, view: StepView, monitors: Collection[Monitor]) -> _Seen:
        """Of a stack's view, what these monitors may ask for at this step."""
        stack, lookbacks = _Stack.of(view), [lookback for monitor in monitors for lookback in monitor.needs.history]
        past = {view.step - lookback.steps for lookback in lookbacks if lookback.cadence.is_due(view.step)}
        return cls(
            view.loss,
            view.grad_norm,
            {f"model.{name}": tensor.detach() for name, tensor in stack.model.stacked_tensors().items()},
            {step: dict(weights) for step in past if (weights := view.history.at(step)) is not None},
            {place: view.taps.at(place) for place in tapped(monitors)},
            stack.model.gradients,
            stack.optimizer.moments["exp_avg"],
            stack.optimizer.moments["exp_avg_sq"],
            stack.optimizer.steps,
            stack.optimizer.learning_rates,
        )

    def view_of(self, model: Transformer, stack: StepView) -> StepView:
        """The view of one run, whose weights ``model`` has; stack: the view of all."""
        history = WeightHistory(())
        history.load_state_dict(self.history)
        return replace(
            stack,
            loss=self.loss,
            grad_norm=self.grad_norm,
            anatomy=replace(stack.anatomy, model=model),
            history=history,
            taps=GivenTaps(model, self.taps),
            optimizer=_Optimizer(self, model, _Stack.of(stack)),  # type: ignore[arg-type]  # what a monitor reads of one
        )


class _Optimizer:
    """What a run's ``AdamW`` shows, made when it is asked for; learning rates are 0-dim tensors."""

    def __init__(self, seen: _Seen, model: Transformer, stack: _Stack) -> None:
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
