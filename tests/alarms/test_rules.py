"""Each rule by itself, the charts that go on from sample to sample, and the re-arm rule."""

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from foreshock.alarms.episodes import REARM_READINGS
from foreshock.alarms.event import UNKNOWN
from foreshock.alarms.online_charts import chart_of
from foreshock.alarms.proven import is_proven
from foreshock.alarms.rules import Universal
from foreshock.alarms.settings import AlarmRules
from foreshock.analysis.detect.calibration import ONLINE_CHARTS
from foreshock.analysis.detect.rules import make_rule
from foreshock.analysis.runs.conf import conf
from foreshock.models.anatomies.attention_call import AttentionCall
from foreshock.monitors.law import Law
from foreshock.monitors.signal import EXACT, RATIO, Signal
from tests.alarms.readings import events_of, panel, reading

LEVEL = Signal("loss", "nats", "up", family="optimization")
COUNT = Signal("nan_inf_events", "count", "up", family="observability", kind=EXACT)
LAW = Signal(
    "key_shift_residual.over_noise",
    "1",
    "up",
    ("layer", "head"),
    10,
    family="conservation",
    kind=RATIO,
    universal=True,
    law=Law("attention", "key shift"),
)
LIMITED = Signal("max_attn_logit", "1", "up", ("layer", "head"), family="model_behavior", above=100.0)
BOTH = Signal("update_to_weight", "1", "both", ("layer",), family="optimization", above=1e-2, below=1e-4)


@pytest.mark.parametrize("persistence", [1, 3])
@pytest.mark.parametrize("chart", ONLINE_CHARTS)
def test_an_online_chart_is_the_offline_one(chart, persistence):
    node = conf("rule", chart) | {"persistence": persistence}
    z = np.random.default_rng(0).normal(size=200) + np.linspace(0, 3, 200)
    online = chart_of(node)
    live = [online.update(value) for value in z]
    offline = np.nan_to_num(make_rule(**node).statistic(z), nan=-np.inf)
    np.testing.assert_allclose(live, offline, rtol=1e-9, atol=1e-9)


def test_a_chart_that_is_not_followed_live_is_refused():
    with pytest.raises(ValueError, match="one of shewhart, ewma, cusum, glr"):
        chart_of(conf("rule", "adwin"))


def test_a_count_alarms_at_each_rise_and_not_while_it_stays():
    counts = [0, 0, 1, 1, 1, *[1] * REARM_READINGS, 2, 2]
    events = events_of(panel(COUNT), COUNT, counts)
    assert [event.step for event in events] == [3, 6 + REARM_READINGS]
    assert {event.severity for event in events} == {"SEV0"} and events[0].expected_false_alarms_per_million_steps == 0


def test_a_broken_law_names_layer_head_and_rate():
    (event,) = panel(LAW).read(10, [reading(LAW, 10, 1.0, 1.1, 40.0)])
    assert (event.rule, event.layer, event.head, event.value) == ("universal", 0, 2, 40.0)
    assert (event.severity, event.law, event.monitor) == ("SEV1", "key shift", "some_monitor")
    assert 0 < event.expected_false_alarms_per_million_steps <= 5 and 3 < event.threshold < 7
    assert not panel(LAW).read(10, [reading(LAW, 10, 1.0, 1.1, 2.0)])


@pytest.mark.parametrize(("value", "side"), [(0.02, "above"), (1e-5, "below")])
def test_a_published_limit_has_two_sides_and_no_rate(value, side):
    (event,) = panel(BOTH).read(1, [reading(BOTH, 1, value)])
    assert (event.rule, event.side) == ("published", side)
    assert event.expected_false_alarms_per_million_steps == UNKNOWN


def test_an_undefined_sample_is_no_alarm_and_a_nan_is_one():
    watched = panel(LIMITED)
    assert not watched.read(1, [reading(LIMITED, 1, math.nan, undefined=True)])
    (event,) = watched.read(2, [reading(LIMITED, 2, 1.0, math.nan)])
    assert (event.rule, event.severity, event.head) == ("non_finite", "SEV0", 1)
    assert '"value": "nan"' in event.json()


def test_an_episode_is_told_once_and_again_where_it_is_worse():
    values = [50, 200, 300, 2000, 3000, *[50] * REARM_READINGS, 150]
    events = events_of(panel(LIMITED, settings=AlarmRules(("published",))), LIMITED, values)
    steps = {event.step: event.severity for event in events}
    assert steps == {2: "SEV2", 4: "SEV1", 6 + REARM_READINGS: "SEV2"}


def test_an_episode_goes_on_through_a_short_calm():
    values = [200, *[50] * (REARM_READINGS - 1), 200]
    assert len(events_of(panel(LIMITED, settings=AlarmRules(("published",))), LIMITED, values)) == 1


def test_repeated_loss_spikes_are_more_severe():
    score = Signal("loss_spike_score", "%", "up", every_steps=10, family="optimization", kind=EXACT)
    events = events_of(panel(score), score, [0, 0.1, 0.1, 0.2], every=10)
    assert [(event.step, event.severity) for event in events] == [(20, "SEV2"), (40, "SEV1")]


def test_the_self_rule_is_silent_on_noise_and_sees_a_jump_after_the_warm_up():
    noise = np.random.default_rng(0).normal(size=400)
    only_self = AlarmRules(("self",), warmup_steps=100)
    assert not events_of(panel(LEVEL, settings=only_self), LEVEL, noise)
    jump = noise.copy()
    jump[300:] += 60
    (event,) = events_of(panel(LEVEL, settings=only_self), LEVEL, jump)
    assert event.step == 301 and event.statistic > event.threshold and event.value == jump[300]
    jump[50:] += 60
    assert not [event for event in events_of(panel(LEVEL, settings=only_self), LEVEL, jump) if event.step < 122]


def test_a_clock_is_not_judged_by_its_own_past():
    clock = Signal("step_time", "s", "up", family="efficiency", kind="clock")
    assert not events_of(panel(clock, settings=AlarmRules(warmup_steps=0)), clock, [1.0] * 40 + [100.0])


def test_a_prediction_that_is_not_proven_has_no_rate():
    (event,) = panel(LAW).read(10, [reading(LAW, 10, 40.0)], proven=False)
    assert event.rule == "universal" and event.expected_false_alarms_per_million_steps == UNKNOWN


@pytest.mark.parametrize(
    ("kernel", "dtype", "proven"),
    [
        ("PyTorch's flash", torch.bfloat16, True),
        ("PyTorch's flash", torch.float32, False),
        ("PyTorch's other", torch.bfloat16, False),
        ("reference", None, True),
    ],
)
def test_which_arithmetic_is_proven(kernel, dtype, proven):
    taps = SimpleNamespace(
        places=frozenset({"dot_product"}),
        at=lambda _: {
            "h.0": SimpleNamespace(call=AttentionCall(kernel, dtype=dtype)),
            "h.1": SimpleNamespace(call=None),
        },
    )
    assert is_proven(taps) is proven


def test_a_rule_that_raises_is_switched_off_and_the_others_go_on(monkeypatch):
    monkeypatch.setattr(Universal, "judge", lambda *_: 1 / 0)
    watched = panel(LAW, COUNT)
    events = watched.read(10, [reading(LAW, 10, 40.0), reading(COUNT, 10, 1.0)])
    count, event = sorted(events, key=lambda event: event.rule)
    assert (event.signal, event.severity) == ("rule_failed", "SEV1") and "universal is switched off" in event.message
    assert count.rule == "exact"
    assert not watched.read(20, [reading(LAW, 20, 40.0)])


@pytest.mark.parametrize("name", ["loss_scale", "overflow_rate", "skipped_updates"])
def test_what_a_scaler_does_in_health_is_no_alarm_of_its_own_past(name):
    signal = Signal(name, "1", "both")
    only_self = AlarmRules(("self",), warmup_steps=0)
    assert not events_of(panel(signal, settings=only_self), signal, [1024.0] * 40 + [512.0])
    other = Signal("another", "1", "both")
    assert events_of(panel(other, settings=only_self), other, [1024.0] * 40 + [512.0])
