"""The history that hands every lookback the weights of its step, and a monitor's memory."""

import pytest
import torch

from foreshock.models.anatomy import BLOCK
from foreshock.monitors.base import Lookback, Monitor, Needs, state_of
from foreshock.monitors.optimization import GradientNorm, Loss, UpdateToWeight


class Watcher:
    """A monitor that only looks back."""

    signals = ()

    def __init__(self, *lookbacks):
        self.needs = Needs(history=lookbacks)

    def observe(self, view):
        return {}


BLOCKS, ONLY_Q = (BLOCK,), ("q",)
"""Roles: all of the blocks, and the query projections."""


def names_of(roles, run):
    """The parameters of these roles, told from their names."""
    end = "attention.q.weight" if roles == ONLY_Q else ""
    return {name for name in run.past[0] if name.startswith("blocks.") and name.endswith(end)}


LOOKBACKS = [
    [Lookback(1, 1, BLOCKS)],
    [Lookback(7, 1, BLOCKS)],
    [Lookback(10, 10, BLOCKS)],
    [Lookback(7, 3, BLOCKS)],
    [Lookback(3, 7, BLOCKS)],
    [Lookback(1, 10, BLOCKS)],
    [Lookback(10, 5, BLOCKS), Lookback(3, 5, BLOCKS)],
    [Lookback(2, 2, BLOCKS), Lookback(9, 4, ONLY_Q), Lookback(5, 3, BLOCKS), Lookback(1, 1, ONLY_Q)],
    [Lookback(1, 1, BLOCKS), Lookback(20, 10, ONLY_Q)],
]


@pytest.mark.parametrize("lookbacks", LOOKBACKS)
def test_history_gives_each_lookback_the_weights_of_its_step(tiny_run, lookbacks):
    run = tiny_run(Watcher(*lookbacks))
    for step in range(1, 45):
        view = run.advance(lambda name, weight, now=step: torch.full_like(weight, float(now)))
        for lookback in Needs(history=lookbacks).history:
            if not lookback.cadence.is_due(step):
                continue
            before = view.weights_before(lookback.steps)
            if step < lookback.steps:
                assert before is None
                continue
            for name in names_of(lookback.roles, run):
                assert torch.equal(before[name].double(), run.past[step - lookback.steps][name]), name


@pytest.mark.parametrize("lookbacks", LOOKBACKS)
def test_history_keeps_just_the_steps_that_a_later_reading_needs(tiny_run, lookbacks):
    run = tiny_run(Watcher(*lookbacks))
    for now in range(1, 45):
        run.advance()
        needed = {
            past
            for past in range(now + 1)
            for lookback in Needs(history=lookbacks).history
            if past + lookback.steps >= now and lookback.cadence.is_due(past + lookback.steps)
        }
        assert set(run.history.state_dict()) == needed
        assert len(needed) <= sum(lookback.steps // lookback.every_steps + 1 for lookback in lookbacks)


def test_history_keeps_just_the_weights_that_a_lookback_wants(tiny_run):
    run = tiny_run(Watcher(Lookback(4, 2, ONLY_Q), Lookback(3, 2, BLOCKS)))
    for _ in range(2):
        run.advance()
    kept = {past: set(weights) for past, weights in run.history.state_dict().items()}
    queries = names_of(ONLY_Q, run)
    assert kept == {0: queries, 1: names_of(BLOCKS, run), 2: queries}


def test_history_is_empty_without_lookbacks(tiny_run):
    run = tiny_run(Watcher())
    run.advance()
    assert run.history.state_dict() == {}


def test_history_keeps_copies(tiny_run):
    run = tiny_run(Watcher(Lookback(2, 1, BLOCKS)))
    run.advance()
    run.advance(lambda name, weight: torch.zeros_like(weight))
    before = run.view().weights_before(2)
    assert all(torch.equal(before[name].double(), run.past[0][name]) for name in names_of(BLOCKS, run))
    assert not any(weight.requires_grad for weight in before.values())


def test_history_survives_a_checkpoint(tiny_run):
    lookbacks = [Lookback(3, 2, BLOCKS), Lookback(5, 1, ONLY_Q)]
    run, resumed = tiny_run(Watcher(*lookbacks)), tiny_run(Watcher(*lookbacks))
    for _ in range(6):
        run.advance()
    resumed.history.load_state_dict(run.history.state_dict())
    for now in (7, 8, 9):
        view = run.advance()
        resumed.history.record(now, run.anatomy)
        for lookback in lookbacks:
            if now % lookback.every_steps == 0:
                old, new = view.weights_before(lookback.steps), resumed.history.at(now - lookback.steps)
                assert all(torch.equal(old[name], new[name]) for name in old)


def test_a_step_that_nobody_asked_for_is_not_there(tiny_run):
    run = tiny_run(Watcher(Lookback(10, 10, BLOCKS)))
    run.advance()
    assert run.history.at(-1) is None
    with pytest.raises(KeyError):
        run.history.at(1)


def test_only_a_monitor_with_memory_has_a_state():
    assert state_of(GradientNorm(1)) is None and state_of(UpdateToWeight(1)) is None
    assert state_of(Loss(1, 0.5)) == {"ema": None}
    assert isinstance(GradientNorm(1), Monitor)
