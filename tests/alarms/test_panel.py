"""What an alarm does: lines, callbacks, actions, and events that no monitor reads."""

import json
import random
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import foreshock
from foreshock.alarms.evidence import Evidence
from foreshock.alarms.overflow import Overflows
from foreshock.alarms.settings import AlarmRules, actions_of
from foreshock.monitors.signal import EXACT, Signal
from tests.alarms.readings import panel, reading

COUNT = Signal("nan_inf_events", "count", "up", family="observability", kind=EXACT)
LIMITED = Signal("grad_spike_score", "1", "up", family="optimization", above=2.0)


def lines(folder):
    return [json.loads(line) for line in (folder / "alarms.jsonl").read_text().splitlines()]


def test_an_alarm_is_a_line_of_json_a_line_on_the_terminal_and_a_call(tmp_path, capsys):
    import sys

    seen = []
    watched = panel(LIMITED, folder=tmp_path, on_alarm=[seen.append], terminal=sys.stderr)
    watched.read(7, [reading(LIMITED, 7, 3.5)])
    (line,) = lines(tmp_path)
    assert (line["run"], line["step"], line["rule"], line["signal"]) == ("my-run", 7, "published", "grad_spike_score")
    assert (line["value"], line["threshold"], line["severity"]) == (3.5, 2.0, "SEV2")
    assert line["expected_false_alarms_per_million_steps"] == "unknown"
    assert line["runbook"] == "docs/runbooks/optimization.md"
    assert [event.step for event in seen] == [7]
    assert "SEV2 step 7: grad_spike_score = 3.5, published above 2" in capsys.readouterr().err


def test_raise_comes_last_and_for_its_severity_alone(tmp_path):
    seen = []
    actions = actions_of({"SEV0": ("raise", seen.append), "SEV2": "log_only"})
    watched = panel(COUNT, LIMITED, folder=tmp_path, actions=actions)
    watched.read(1, [reading(LIMITED, 1, 3.0)])
    with pytest.raises(foreshock.TrainingAlarm, match="grad_spike_score = nan, non_finite not finite;") as raised:
        watched.read(2, [reading(COUNT, 2, 1.0), reading(LIMITED, 2, float("nan"))])
    assert raised.value.event.step == 2 and len(seen) == 2
    assert [line["step"] for line in lines(tmp_path)] == [1, 2, 2]


def test_an_action_that_fails_is_an_alarm_and_breaks_nothing(tmp_path):
    def save(event):
        raise OSError("no space left on device")

    watched = panel(LIMITED, folder=tmp_path, actions=actions_of(save))
    watched.read(1, [reading(LIMITED, 1, 3.0)])
    first, second = lines(tmp_path)
    assert second["signal"] == "action_failed" and second["severity"] == "SEV1"
    assert "save: OSError: no space left" in second["message"] and first["signal"] == "grad_spike_score"


def test_a_line_that_cannot_be_written_breaks_nothing(tmp_path):
    watched = panel(LIMITED, folder=tmp_path / "gone")
    assert watched.read(1, [reading(LIMITED, 1, 3.0)]) and len(watched.events) == 1


def test_a_snapshot_replays_the_moment(tmp_path):
    watched = panel(LIMITED, folder=tmp_path, actions=actions_of("snapshot"))
    tokens = torch.arange(6).reshape(2, 3)
    watched.read(1, [reading(LIMITED, 1, 1.0)], SimpleNamespace(arguments=(tokens,), named={"labels": tokens}))
    torch.manual_seed(5), np.random.seed(5), random.seed(5)
    watched.read(2, [reading(LIMITED, 2, 9.0)], SimpleNamespace(arguments=(tokens + 1,), named={}))
    drawn = torch.rand(3), np.random.rand(3), random.random()
    folder = tmp_path / "evidence" / "step-000000002-grad_spike_score"
    before, now = torch.load(folder / "batches.pt", weights_only=False)
    assert before["named"]["labels"].equal(tokens) and now["arguments"][0].equal(tokens + 1)
    state = torch.load(folder / "random_state.pt", weights_only=False)
    torch.set_rng_state(state["torch"]), np.random.set_state(state["numpy"]), random.setstate(state["python"])
    assert torch.rand(3).equal(drawn[0]) and (np.random.rand(3) == drawn[1]).all() and random.random() == drawn[2]
    read = [json.loads(line) for line in (folder / "readings.jsonl").read_text().splitlines()]
    assert read == [{"step": 1, "grad_spike_score": [[1.0]]}, {"step": 2, "grad_spike_score": [[9.0]]}]
    assert json.loads((folder / "event.json").read_text())["step"] == 2


def test_evidence_forgets(tmp_path):
    kept = Evidence(tmp_path)
    for step in range(200):
        kept.keep(step, [], SimpleNamespace(arguments=(step,), named={}))
    assert len(kept._batches) <= 3 and len(kept._readings) <= 50


def test_a_report_of_the_training_loop(tmp_path):
    watched = panel(COUNT, folder=tmp_path)
    watched.report(12, "checkpoint_failure", "sha256 differs\nafter loading")
    (line,) = lines(tmp_path)
    assert (line["severity"], line["step"], line["message"]) == ("SEV0", 12, "sha256 differs after loading")
    with pytest.raises(ValueError, match="checkpoint_failure"):
        watched.report(12, "checkpoint_fail")


class Scaler:
    def __init__(self, *scales: float) -> None:
        self._scales = list(scales)

    def get_scale(self) -> float:
        return self._scales[0] if len(self._scales) == 1 else self._scales.pop(0)

    def get_growth_interval(self) -> int:
        return 100


def test_an_overflow_storm_is_three_halvings_after_the_first_clean_update():
    search = Overflows(Scaler(64, 32, 16, 8, 4, 4, 4))
    assert not any(search.update(step) for step in range(1, 7))
    storm = Overflows(Scaler(64, 64, 32, 16, 8, 8))
    said = [storm.update(step) for step in range(1, 6)]
    assert said[:3] == [None] * 3 and "3 overflows from step 2 to 4" in said[3] and said[4] is None


def test_a_search_ends_below_scale_1():
    overflows = Overflows(Scaler(4, 2, 1, 0.5, 0.25, 0.125))
    said = [overflows.update(step) for step in range(1, 6)]
    assert said[:4] == [None] * 4 and "3 overflows from step 3 to 5" in said[4]


def test_halvings_a_growth_interval_apart_are_no_storm():
    overflows = Overflows(Scaler(64, 64, *(scale for _ in range(5) for scale in (32, 64))))
    assert not any(overflows.update(1 + 60 * i) for i in range(10))


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: actions_of("pause"), "actions='pause' is not allowed: one of log_only, snapshot, raise"),
        (lambda: actions_of({"SEV9": "raise"}), "actions='SEV9' is not allowed: one of SEV0, SEV1, SEV2"),
        (lambda: AlarmRules(("exakt",)), "alarms.rules='exakt' is not allowed"),
        (lambda: AlarmRules.of(3), "alarms=3 is not allowed"),
        (lambda: panel(COUNT, actions=actions_of("snapshot")), "it needs a folder"),
        (lambda: panel(COUNT, settings=AlarmRules(thresholds="no.json")), "alarms='no.json' cannot be read"),
    ],
)
def test_what_is_not_allowed_is_said_in_one_line(make, said):
    with pytest.raises(ValueError) as raised:
        make()
    assert said in str(raised.value) and "\n" not in str(raised.value)
