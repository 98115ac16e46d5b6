"""Spike scores against numpy over every value's own window."""

import math

import numpy as np
import pytest
import torch

from foreshock.monitors.spikes import SpikeScore
from tests.rounding_bounds import FP32, gamma

pytestmark = pytest.mark.numeric

WINDOW, MINIMUM = 30, 8


def monitor(every_steps=5, beta=0.9) -> SpikeScore:
    return SpikeScore(every_steps, WINDOW, MINIMUM, beta)


def feed(one, run, losses, norms, first=1):
    """Readings by step."""
    read = {}
    for step, (loss, norm) in enumerate(zip(losses, norms, strict=True), first):
        run.past = [None] * (step + 1)  # the step that the view shows
        read[step] = {name: value.item() for name, value in one.observe(run.view(loss, norm)).items()}
    return read


def series(n=120, spikes=(20, 57, 58, 90), seed=0):
    x = np.random.default_rng(seed).normal(3.0, 0.1, n)
    x[list(spikes)] += 5.0
    return x.astype(np.float32)


def naive(x, upto):
    """Share of spikes among the last WINDOW judged values, in %."""
    verdicts = []
    for i in range(MINIMUM, upto):
        past = x[max(0, i - WINDOW) : i].astype(np.float64)
        verdicts.append(abs(x[i] - past.mean()) > 7 * past.std())
    return 100 * np.mean(verdicts[-WINDOW:])


@pytest.mark.parametrize("every_steps", [1, 5, 7])
def test_the_scores_are_those_of_each_value_s_window(tiny_run, every_steps):
    losses, norms = series(), series(seed=1, spikes=(40, 100))
    read = feed(monitor(every_steps), tiny_run(), losses, norms)
    for step, readings in read.items():
        due = step % every_steps == 0 and step > MINIMUM
        assert ("loss_spike_score" in readings) == due
        if due:
            assert readings["loss_spike_score"] == pytest.approx(naive(losses, step), abs=1e-4)
            assert readings["loss_spike_score.grad_norm"] == pytest.approx(naive(norms, step), abs=1e-4)


@pytest.mark.parametrize("value", [0.1, 0.3, 1 / 3, 5.545, 1e-30])
def test_a_constant_has_no_spike_and_leaves_rest_with_one(tiny_run, value):
    losses = np.full(60, value, np.float32)
    losses[50] = 1.001 * losses[50]
    read = feed(monitor(1), tiny_run(), losses, losses)
    assert all(read[step]["loss_spike_score"] == 0 for step in range(MINIMUM + 1, 51))
    assert read[51]["loss_spike_score"] > 0


def test_one_spike_is_seen_and_forgotten_a_window_later(tiny_run):
    losses = series(spikes=(60,))
    read = feed(monitor(1), tiny_run(), losses, losses)
    scores = np.array([read[step]["loss_spike_score"] for step in range(MINIMUM + 1, 121)])
    steps = np.arange(MINIMUM + 1, 121)
    expected = np.where((steps > 60) & (steps <= 60 + WINDOW), 100 / WINDOW, 0.0)
    assert scores == pytest.approx(expected, abs=1e-4)


def test_the_ratio_is_that_to_the_moving_average(tiny_run):
    norms = [2.0, 1.0, 1.0, 8.0]
    read = feed(monitor(beta=0.75), tiny_run(), [1.0] * 4, norms)
    average = norms[0]
    for step, norm in enumerate(norms, 1):
        average = average if step == 1 else 0.75 * average + 0.25 * norm
        assert read[step]["grad_spike_score"] == pytest.approx(norm / average, rel=gamma(12, FP32))
    assert read[1]["grad_spike_score"] == 1.0 and read[4]["grad_spike_score"] > 2.0


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_non_finite_value_is_a_spike(tiny_run, value):
    losses = series(spikes=())
    losses[50] = value
    read = feed(monitor(1), tiny_run(), losses, series(seed=1, spikes=()))
    assert read[50]["loss_spike_score"] == 0.0 and read[51]["loss_spike_score"] > 0
    assert read[120]["loss_spike_score.grad_norm"] == 0.0


@pytest.mark.parametrize("stop", [3, 9, 43, 60])
def test_a_resumed_run_reads_the_same(tiny_run, stop, tmp_path):
    losses, norms = series(), series(seed=1)
    whole = feed(monitor(), tiny_run(), losses, norms)
    one, resumed = monitor(), monitor()
    feed(one, tiny_run(), losses[:stop], norms[:stop])
    torch.save(one.state_dict(), tmp_path / "state.pt")
    resumed.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    rest = feed(resumed, tiny_run(), losses[stop:], norms[stop:], first=stop + 1)
    assert rest == {step: whole[step] for step in rest}


def test_its_memory_does_not_grow(tiny_run):
    one = monitor()
    feed(one, tiny_run(), series(), series())
    state = one.state_dict()
    assert state["values"].shape == state["spikes"].shape == (2, WINDOW)
    assert state["values"].untyped_storage().nbytes() == 2 * WINDOW * 4


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"beta": 1.0}, r"monitor\.spike_score\.beta=1\.0 "),
        ({"minimum": 1}, r"monitor\.spike_score\.minimum=1 "),
        ({"minimum": 31}, r"monitor\.spike_score\.minimum=31 is not allowed: 2 to window=30"),
    ],
)
def test_impossible_settings_are_refused_by_name(changes, message):
    with pytest.raises(ValueError, match=message):
        SpikeScore(**{"every_steps": 5, "window": WINDOW, "minimum": MINIMUM, "beta": 0.9} | changes)
