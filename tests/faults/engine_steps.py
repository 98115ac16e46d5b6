"""Runs stepped by their engine, for tests of what a fault changes."""

from __future__ import annotations

import torch

from foreshock.experiments.build import Run
from foreshock.experiments.training.single_engine import SingleEngine


def stepped(run: Run, steps: int) -> tuple[SingleEngine, list[dict[str, torch.Tensor]], list[dict[str, torch.Tensor]]]:
    """The engine after some updates; weights and clipped gradients after each."""
    engine, healthy, weights, gradients = run.new_engine(), run.healthy_sites(), [], []
    for step in range(steps):
        engine.step(step, [run.fault.sites(step, healthy)])
        named = dict(engine.model.named_parameters())
        weights.append({name: weight.detach().clone() for name, weight in named.items()})
        gradients.append({name: weight.grad.clone() for name, weight in named.items() if weight.grad is not None})
    return engine, weights, gradients


def whole_and_resumed(run: Run, stop: int, steps: int, needs: str = "past") -> tuple[SingleEngine, SingleEngine]:
    """Two engines after some updates; the second went on at ``stop`` from the state of another.

    needs: the part of that state that the fault reads.
    """
    healthy = run.healthy_sites()
    whole, first, resumed = (run.new_engine() for _ in range(3))
    for step in range(steps):
        whole.step(step, [run.fault.sites(step, healthy)])
        if step < stop:
            first.step(step, [run.fault.sites(step, healthy)])
    assert first.state_of(0)[needs]
    resumed.load([first.state_of(0)])
    for step in range(stop, steps):
        resumed.step(step, [run.fault.sites(step, healthy)])
    return whole, resumed


def differing(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> set[str]:
    return {name for name in one if not torch.equal(one[name], other[name])}


def points_logged(engine: SingleEngine) -> dict[str, int]:
    """By point, the elements that the injection log counted."""
    counts: dict[str, int] = {}
    for entry in engine.logs[0].entries():
        counts[entry["point"]] = counts.get(entry["point"], 0) + entry["elements"]
    return counts


def assert_control_is_healthy(make_run, *overrides: str) -> None:
    """The run's card calls it a control, its weights are a healthy run's bit for bit, and its log is empty."""
    run = make_run(*overrides)
    assert run.fault.describe().control
    engine, control, _ = stepped(run, 3)
    _, healthy, _ = stepped(make_run(), 3)
    assert not any(differing(*pair) for pair in zip(control, healthy, strict=True))
    assert engine.logs[0].entries() == []
