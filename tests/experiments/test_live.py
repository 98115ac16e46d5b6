import json

import pytest
import torch

from foreshock.experiments import progress
from foreshock.experiments.bench import due_together, qk_core_speedup
from foreshock.experiments.live import LiveAlarms
from foreshock.experiments.progress import (
    Pace,
    RunInSweep,
    RunProgress,
    StackProgress,
    SweepProgress,
    said_alarms,
    said_time,
)
from foreshock.monitors.base import Masked, Signal
from foreshock.monitors.cadence import Cadence

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


def test_each_run_of_a_stack_is_judged_by_itself():
    """The second of three runs jumps in one head; as single runs, the same alarms."""
    generator, live = torch.Generator().manual_seed(0), LiveAlarms([UP, DOWN], stacked=True)
    singles = [LiveAlarms([UP, DOWN]) for _ in range(3)]
    for _ in range(22):
        readings = {"up": noise(generator, 3), "down": noise(generator, 3, 2, 2)}
        if len(live._recent["up"]) == 21:
            readings["down"][1, 1, 0] -= 40.0
        live.add(readings)
        for run, single in enumerate(singles):
            single.add({name: reading[run] for name, reading in readings.items()})
    assert live.raised_by_run().keys() == {1}
    assert [live.raised_by_run().get(run, {}) for run in range(3)] == [single.raised() for single in singles]


def test_missing_samples_raise_nothing():
    live = LiveAlarms([DOWN])
    for _ in range(25):
        live.add({"down": Masked(torch.zeros(2, 2), torch.ones(2, 2, dtype=torch.bool))})
    assert live.raised() == {}


def test_a_run_says_where_it_stands_while_it_trains_and_cleans_up(tmp_path, monkeypatch):
    monkeypatch.setattr(progress, "ALARMS_SHARE", float("inf"))  # asked anew at every step
    with RunProgress(tmp_path, 100, [UP], show=False) as shown:
        for step in range(1, 23):
            shown._last = (-1e9, 0)
            shown(step, torch.tensor(2.5), {"up": torch.tensor(1.0 + step % 3 + 100.0 * (step == 22))}, {})
        status = json.loads((tmp_path / "status.json").read_text())
    assert status["step"] == 22 and status["alarms"] == ["up"]
    assert list(tmp_path.iterdir()) == []


def test_alarms_take_a_small_share_of_the_time(tmp_path, monkeypatch):
    """An answer that takes 0.2 s is kept for 20."""
    now, asked = [0.0], []

    def raised_by_run():
        asked.append(now[0])
        now[0] += 0.2
        return {}

    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    shown = RunProgress(tmp_path, 100, [UP], show=True)
    monkeypatch.setattr(shown._ask.live, "raised_by_run", raised_by_run)
    for step in range(1, 100):
        shown(step, torch.tensor(2.5), {}, {})
        now[0] += 0.5
    assert asked == pytest.approx([0.5, 20.7, 40.9], abs=0.5)


def test_the_bench_knows_which_monitors_share_a_step():
    both, one, none = frozenset("ab"), frozenset("a"), frozenset()
    assert due_together({"a": Cadence(2), "b": Cadence(3)}) == [both, none, one, frozenset("b"), one, none]


def test_a_stack_says_where_each_of_its_runs_stands_while_it_records(tmp_path, monkeypatch):
    now = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(progress, "ALARMS_SHARE", float("inf"))
    one, other = tmp_path / "one", tmp_path / "other"
    for folder in (one, other):
        folder.mkdir()
    rows = {one: 0, other: 1}

    def after_a_second(*step):
        now[0] += 1.0
        shown(*step)

    with StackProgress([UP]) as shown:
        for step in range(1, 23):
            jump = torch.tensor([0.0, 100.0 * (step == 22)])
            after_a_second(step, torch.tensor([3.0, 4.0]), {"up": 1.0 + step % 3 + jump}, rows)
        statuses = [json.loads((folder / "status.json").read_text()) for folder in (one, other)]
        assert [status["loss"] for status in statuses] == [3.0, 4.0]
        assert [status["alarms"] for status in statuses] == [[], ["up"]]
        after_a_second(24, torch.tensor([3.5, 5.0]), {}, {other: 1})
        status = {"step": 24, "loss": 5.0, "steps_per_s": 2.0, "alarms": ["up"]}
        assert json.loads((other / "status.json").read_text()) == status
        assert not list(one.iterdir())
        after_a_second(1, torch.tensor([2.0]), {"up": torch.tensor([1.0])}, {one: 0})  # the next stack of this process
        after_a_second(2, torch.tensor([2.0]), {"up": torch.tensor([1.0])}, {one: 0})
        assert json.loads((one / "status.json").read_text())["steps_per_s"] == 1.0
    assert not list(other.iterdir()) and not list(one.iterdir())


def ended(folder, steps):
    (folder / "weights.safetensors").touch()
    (folder / "manifest.json").write_text(json.dumps({"steps_done": steps}))


def test_a_sweep_ends_at_all_of_all_where_a_run_ended_early_and_its_estimate_is_steady(tmp_path, monkeypatch):
    """Four runs of 100 steps, two at a time, a step a second each; the first diverges at 60."""
    now = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    runs = {tmp_path / name: RunInSweep(name, 100) for name in "abcd"}
    for folder in runs:
        folder.mkdir()
    a, b, c, d = runs
    sweep = SweepProgress(runs, at_once=2)
    (task,) = sweep._bar.tasks

    def at(second, steps, alarms=()):
        now[0] = float(second)
        for folder, step in steps.items():
            said = {"step": step, "loss": 2.0, "steps_per_s": 1.0, "alarms": list(alarms)}
            (folder / "status.json").write_text(json.dumps(said))
        sweep.refresh()
        return task.completed, task.fields["left"]

    def finish(folder, steps):
        ended(folder, steps)
        (folder / "status.json").unlink()

    assert at(10, {a: 1, b: 1}) == (2, "")
    assert at(30, {a: 21, b: 21}) == (42, "3 min left")
    assert at(68, {a: 59, b: 59}, ["x", "y"]) == (118, "2 min left")
    assert task.fields["alarms"] == "a: x and 1 more, b: x and 1 more"
    finish(a, 60)
    assert at(69, {b: 60}) == (160, "2 min left")
    assert at(109, {b: 99, c: 40}) == (239, "2 min left")
    finish(b, 100)
    assert at(110, {c: 41}) == (241, "2 min left")
    finish(c, 100)
    assert at(209, {d: 40}) == (340, "1 min left")  # alone: its 60 steps, at the pace of two for each of them
    finish(d, 100)
    sweep._thread.start()
    sweep.__exit__()
    assert (task.completed, task.total) == (400, 400)
    assert "4/4 runs" in task.fields["info"] and task.fields["left"] == ""


def test_a_sweep_counts_what_earlier_commands_have_trained_but_not_into_its_pace(tmp_path, monkeypatch):
    now = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    done, begun = tmp_path / "done", tmp_path / "begun"
    for folder in (done, begun):
        folder.mkdir()
    ended(done, 100)
    (begun / "manifest.json").write_text(json.dumps({"steps_done": 50}))
    sweep = SweepProgress({done: RunInSweep("done", 100), begun: RunInSweep("begun", 100)}, at_once=1)
    (task,) = sweep._bar.tasks
    sweep.refresh()
    assert (task.completed, task.fields["left"]) == (150, "")
    now[0] = 10.0
    (begun / "status.json").write_text(json.dumps({"step": 60, "loss": 2.0, "steps_per_s": 1.0, "alarms": []}))
    sweep.refresh()
    assert (task.completed, task.fields["left"]) == (160, "40 s left")


def test_a_run_s_bar_ends_at_its_last_step(tmp_path):
    shown = RunProgress(tmp_path, 30, [UP], show=True)
    with shown:
        for step in range(1, 31):
            shown(step, torch.tensor(2.5), {}, {})
    assert shown._bar.tasks[0].completed == 30


def test_the_estimate_does_not_follow_every_stutter():
    pace = Pace()
    assert pace.left_s(0.0, 0, 100) is None
    assert pace.left_s(10.0, 10, 90) == pytest.approx(90)
    assert pace.left_s(12.0, 10, 90) == pytest.approx(108)  # two seconds without a step


@pytest.mark.parametrize(
    ("seconds", "said"),
    [(None, ""), (39.6, "40 s left"), (60, "1 min left"), (430, "7 min left"), (7800, "2 h 10 min left")],
)
def test_the_time_left_for_people(seconds, said):
    assert said_time(seconds) == said


def test_one_alarm_is_named_and_the_others_counted():
    assert [said_alarms(names) for names in ([], ["a"], ["a", "b", "c"])] == ["", "a", "a and 2 more"]


def test_the_bench_measures_the_qk_core():
    result = qk_core_speedup(64, 2, 8, repeats=1)
    assert result["dense_over_core"] == pytest.approx(result["dense_ms"] / result["core_ms"])
