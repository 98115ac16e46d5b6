"""The history that hands every lookback the weights of its step, and a monitor's memory."""

import pytest
import torch

from foreshock.monitors.base import Lookback, Monitor, Needs, state_of
from foreshock.monitors.optimization import GradientNorm, Loss, UpdateToWeight


class Watcher:
    """A monitor that only looks back."""

    signals = ()

    def __init__(self, *lookbacks):
        self.needs = Needs(history=lookbacks)

    def observe(self, view):
        return {}


def every_name(name):
    return True


def only_q(name):
    return name.endswith("attention.q.weight")


LOOKBACKS = [
    [Lookback(1, 1, every_name)],
    [Lookback(7, 1, every_name)],
    [Lookback(10, 10, every_name)],
    [Lookback(7, 3, every_name)],
    [Lookback(3, 7, every_name)],
    [Lookback(1, 10, every_name)],
    [Lookback(10, 5, every_name), Lookback(3, 5, every_name)],
    [Lookback(2, 2, every_name), Lookback(9, 4, only_q), Lookback(5, 3, every_name), Lookback(1, 1, only_q)],
    [Lookback(1, 1, every_name), Lookback(20, 10, only_q)],
]


@pytest.mark.parametrize("lookbacks", LOOKBACKS)
def test_history_gives_each_lookback_the_weights_of_its_step(tiny_run, lookbacks):
    run = tiny_run(Watcher(*lookbacks))
    for step in range(1, 45):
        view = run.advance(lambda name, weight, now=step: torch.full_like(weight, float(now)))
        for lookback in lookbacks:
            if step % lookback.every_steps:
                continue
            before = view.weights_before(lookback.steps)
            if step < lookback.steps:
                assert before is None
                continue
            for name in filter(lookback.wants, run.past[0]):
                assert torch.equal(before[name].double(), run.past[step - lookback.steps][name]), name


@pytest.mark.parametrize("lookbacks", LOOKBACKS)
def test_history_keeps_just_the_steps_that_a_later_reading_needs(tiny_run, lookbacks):
    run = tiny_run(Watcher(*lookbacks))
    for now in range(1, 45):
        run.advance()
        needed = {
            past
            for past in range(now + 1)
            for lookback in lookbacks
            if past + lookback.steps >= now and (past + lookback.steps) % lookback.every_steps == 0
        }
        assert set(run.history.state_dict()) == needed
        assert len(needed) <= sum(lookback.steps // lookback.every_steps + 1 for lookback in lookbacks)


def test_history_keeps_just_the_weights_that_a_lookback_wants(tiny_run):
    run = tiny_run(Watcher(Lookback(4, 2, only_q), Lookback(3, 2, every_name)))
    for _ in range(2):
        run.advance()
    kept = {past: set(weights) for past, weights in run.history.state_dict().items()}
    assert kept == {0: set(filter(only_q, run.past[0])), 1: set(run.past[0]), 2: set(filter(only_q, run.past[0]))}


def test_history_is_empty_without_lookbacks(tiny_run):
    run = tiny_run(Watcher())
    run.advance()
    assert run.history.state_dict() == {}


def test_history_keeps_copies(tiny_run):
    run = tiny_run(Watcher(Lookback(2, 1, every_name)))
    run.advance()
    run.advance(lambda name, weight: torch.zeros_like(weight))
    before = run.view().weights_before(2)
    assert all(torch.equal(before[name].double(), weight) for name, weight in run.past[0].items())
    assert not any(weight.requires_grad for weight in before.values())


def test_history_survives_a_checkpoint(tiny_run):
    lookbacks = [Lookback(3, 2, every_name), Lookback(5, 1, only_q)]
    run, resumed = tiny_run(Watcher(*lookbacks)), tiny_run(Watcher(*lookbacks))
    for _ in range(6):
        run.advance()
    resumed.history.load_state_dict(run.history.state_dict())
    for now in (7, 8, 9):
        view = run.advance()
        resumed.history.record(now, run.model)
        for lookback in lookbacks:
            if now % lookback.every_steps == 0:
                old, new = view.weights_before(lookback.steps), resumed.history.at(now - lookback.steps)
                assert all(torch.equal(old[name], new[name]) for name in old)


def test_a_step_that_nobody_asked_for_is_not_there(tiny_run):
    run = tiny_run(Watcher(Lookback(10, 10, every_name)))
    run.advance()
    assert run.history.at(-1) is None
    with pytest.raises(KeyError):
        run.history.at(1)


def test_only_a_monitor_with_memory_has_a_state():
    assert state_of(GradientNorm(1)) is None and state_of(UpdateToWeight(1)) is None
    assert state_of(Loss(1, 0.5)) == {"ema": None}
    assert isinstance(GradientNorm(1), Monitor)
