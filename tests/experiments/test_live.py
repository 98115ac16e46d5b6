import itertools
import json

import pytest
import torch

from experiments import progress
from experiments.bench import due_together, qk_core_speedup
from experiments.live import LiveAlarms
from experiments.progress import RunProgress, StackProgress
from monitors.base import Masked, Signal

UP, DOWN = Signal("up", "1", "up"), Signal("down", "nats", "down", ("layer", "head"))


def noise(generator, *shape):
    return torch.randn(shape, generator=generator)


@pytest.mark.parametrize(("signal", "jump", "raised"), [(UP, 40.0, True), (UP, -40.0, False), (DOWN, -40.0, True)])
def test_a_jump_in_the_bad_direction_of_one_head_is_named(signal, jump, raised):
    generator, live = torch.Generator().manual_seed(0), LiveAlarms([signal])
    shape = (2, 2) if signal.axes else ()
    for _ in range(21):
        live.add({signal.name: noise(generator, *shape)})
        assert not live.raised()
    value = noise(generator, *shape)
    if signal.axes:
        value[1, 0] += jump
    else:
        value = value + jump
    live.add({signal.name: value})
    assert (signal.name in live.raised()) == raised


@pytest.mark.parametrize("signal", [UP, DOWN])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_a_reading_that_is_not_finite_is_named_in_any_direction(signal, value):
    generator, live = torch.Generator().manual_seed(0), LiveAlarms([signal])
    for _ in range(22):
        live.add({signal.name: noise(generator, 2, 2)})
    broken = noise(generator, 2, 2)
    broken[1, 0] = value
    live.add({signal.name: broken})
    assert signal.name in live.raised()


def test_missing_samples_raise_nothing():
    live = LiveAlarms([DOWN])
    for _ in range(25):
        live.add({"down": Masked(torch.zeros(2, 2), torch.ones(2, 2, dtype=torch.bool))})
    assert live.raised() == {}


def test_a_run_says_where_it_stands_while_it_trains_and_cleans_up(tmp_path):
    with RunProgress(tmp_path, 10, [UP], show=False) as shown:
        shown._last = (-1e9, 0)
        shown(5, torch.tensor(2.5), {"up": torch.tensor(1.0)})
        assert '"step": 5' in (tmp_path / "status.json").read_text()
    assert list(tmp_path.iterdir()) == []


def test_alarms_take_a_small_share_of_the_time(tmp_path, monkeypatch):
    """An answer that takes 0.2 s is kept for 20."""
    now, asked = [0.0], []

    def raised():
        asked.append(now[0])
        now[0] += 0.2
        return {}

    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    shown = RunProgress(tmp_path, 100, [UP], show=True)
    monkeypatch.setattr(shown._live, "raised", raised)
    for step in range(1, 100):
        shown(step, torch.tensor(2.5), {})
        now[0] += 0.5
    assert asked == pytest.approx([0.5, 20.7, 40.9], abs=0.5)


def test_the_bench_knows_which_monitors_share_a_step():
    both, one, none = frozenset("ab"), frozenset("a"), frozenset()
    assert due_together({"a": 2, "b": 3}) == [both, none, one, frozenset("b"), one, none]


def test_a_stack_says_where_each_of_its_runs_stands_while_it_records(tmp_path, monkeypatch):
    clock = itertools.count()
    monkeypatch.setattr(progress.time, "monotonic", lambda: float(next(clock)))
    one, other = tmp_path / "one", tmp_path / "other"
    for folder in (one, other):
        folder.mkdir()
    with StackProgress() as shown:
        shown(1, {one: torch.tensor(2.0), other: torch.tensor(2.0)})
        shown(2, {one: torch.tensor(3.0), other: torch.tensor(4.0)})
        assert [json.loads((folder / "status.json").read_text())["loss"] for folder in (one, other)] == [3.0, 4.0]
        shown(4, {other: torch.tensor(5.0)})
        assert json.loads((other / "status.json").read_text()) == {"step": 4, "loss": 5.0, "steps_per_s": 2.0}
        assert not list(one.iterdir())
    assert not list(other.iterdir())


def test_the_bench_measures_the_qk_core():
    result = qk_core_speedup(64, 2, 8, repeats=1)
    assert result["dense_over_core"] == pytest.approx(result["dense_ms"] / result["core_ms"])
