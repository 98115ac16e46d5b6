"""What the bench counts: readings, copies of weights and taps, each as often as they are made."""

import pytest
import torch
import torch.nn as nn

from foreshock.experiments import bench
from foreshock.monitors.base import Lookback, Needs, Signal, StepView


class Watcher:
    def __init__(self, every_steps, taps=(), lookbacks=()):
        self.signals = (Signal("a", "1", "up", (), every_steps),)
        self.needs = Needs(taps=taps, history=lookbacks)

    def observe(self, view):
        return {"a": view.weights_before(50) if self.needs.history else torch.zeros(())}


def test_a_monitor_is_paid_at_the_steps_at_which_it_reads(monkeypatch):
    def a_second(call):
        call()
        return 1.0

    monkeypatch.setattr(bench, "_cpu_seconds", a_second)
    model = nn.Linear(2, 2)
    view = StepView(step=1, tokens=1, loss=torch.zeros(()), grad_norm=torch.zeros(()), model=model)
    copies = (Lookback(50, 50, lambda name: True),)
    groups = {
        "tenth": {"one": Watcher(10)},
        "both": {"one": Watcher(10), "other": Watcher(50, lookbacks=copies)},
    }
    found = bench._monitor_seconds(view, groups)
    # one second a step for looking after the copies, and one a reading
    assert found == {"tenth": pytest.approx(1 + 1 / 10), "both": pytest.approx(1 + 1 / 10 + 1 / 50)}


def test_taps_are_paid_once_where_monitors_read_together():
    places = {"dot_product": 0.08, "linear": 0.12, "norm": 0.02}
    monitors = {"laws": Watcher(10, ("dot_product",)), "linear": Watcher(30, ("dot_product", "linear"))}
    assert bench.taps_of(monitors["linear"], places) == {"dot_product": 0.08, "linear": 0.12}
    assert bench._taps(monitors, places) == pytest.approx(0.08 / 10 + 0.12 / 30)


def test_a_part_that_is_none_is_named(capsys):
    with pytest.raises(SystemExit, match="2"):
        bench.main(["parts=monitor"])
    assert "error: parts=monitor is not allowed: of steps, conservation, monitors" in capsys.readouterr().err
