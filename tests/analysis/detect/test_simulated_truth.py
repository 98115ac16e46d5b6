"""Promises that can only be kept on average: checked on simulated signals whose truth is known."""

from __future__ import annotations

import math

import numpy as np
import pytest

from foreshock.analysis.detect.alarms import (
    anytime_threshold,
    chart_statistics,
    conformal_threshold,
    first_alarm,
    fitted,
    oriented,
)
from foreshock.analysis.detect.bands import ReferenceBand, SelfBand
from foreshock.analysis.detect.charts import CUSUM, EWMA, GLR, Shewhart, ShiryaevRoberts
from foreshock.analysis.detect.river import RiverDetector
from foreshock.analysis.runs.align import Aligned
from foreshock.analysis.scores.outcome import score

ALPHA, N, SAMPLES, TRIALS = 0.10, 9, 50, 2000
CHARTS = {
    "shewhart": Shewhart(),
    "ewma": EWMA(0.2),
    "cusum": CUSUM(0.5),
    "glr": GLR(20),
    "shiryaev_roberts": ShiryaevRoberts((0.5, 1.0, 2.0)),
}
POSITIONS = np.arange(10, 10 * SAMPLES + 1, 10)


def signals(generator: np.random.Generator, runs: int) -> list[Aligned]:
    """Runs with a common trend, a slope of their own and AR(1) noise of 0.9: nothing that a chart assumes."""
    noise = generator.normal(size=(runs, SAMPLES))
    for t in range(1, SAMPLES):
        noise[:, t] += 0.9 * noise[:, t - 1]
    time = np.linspace(0, 1, SAMPLES)
    values = 5 * np.exp(-3 * time) + generator.normal(size=(runs, 1)) * time + noise
    missing = np.zeros((SAMPLES, 1, 1), bool)
    return [Aligned(POSITIONS, one[:, None, None], missing) for one in values]


def alarm_rate(band_of, charts, trials: int, alpha: float = ALPHA, bad: str = "both") -> dict[str, float]:
    generator = np.random.default_rng(0)
    alarms = dict.fromkeys(charts, 0)
    for _ in range(trials):
        runs = signals(generator, 4 + N + 1)
        band = band_of(runs[:4])
        sides = [oriented(band.z(run), bad) for run in runs]
        for name, chart in charts.items():
            rules = fitted(chart, sides[:4])
            maxima = [np.nanmax(statistic) for statistic in chart_statistics(sides[4:], rules)]
            alarms[name] += maxima[-1] > conformal_threshold(maxima[:-1], alpha)
    return {name: count / trials for name, count in alarms.items()}


@pytest.mark.slow
@pytest.mark.parametrize("track", ["reference", "self"])
def test_a_fresh_healthy_run_alarms_at_the_rate_whatever_chart_and_autocorrelation(track):
    """2,000 calibrations; four standard errors of the Monte-Carlo estimate, over ten rates."""
    bands = {"reference": lambda runs: ReferenceBand.fit("s", runs), "self": lambda runs: SelfBand()}
    error = 4 * math.sqrt(ALPHA * (1 - ALPHA) / TRIALS)
    for name, rate in alarm_rate(bands[track], CHARTS, TRIALS).items():
        assert abs(rate - ALPHA) < error, (name, rate)


def test_a_detector_that_counts_keeps_the_rate_from_below():
    """Ties do not alarm, so a count of drifts is conservative."""
    charts = {"adwin": RiverDetector("adwin", {"clock": 1, "grace_period": 5})}
    rate = alarm_rate(lambda runs: ReferenceBand.fit("s", runs), charts, 300, bad="up")["adwin"]
    assert rate < ALPHA + 3 * math.sqrt(ALPHA * (1 - ALPHA) / 300)


def test_the_anytime_threshold_holds_without_any_calibration_run():
    """On whitened AR(1) noise the e-detector passes log(samples / alpha) in at most alpha of runs, and it has power."""
    generator = np.random.default_rng(1)

    def series(shift: float = 0.0) -> np.ndarray:
        x = generator.normal(size=200)
        for t in range(1, 200):
            x[t] += 0.7 * x[t - 1]
        x[100:] += shift
        return x

    chart = ShiryaevRoberts((0.5, 1.0, 2.0)).calibrate([series() for _ in range(200)])
    assert chart.phi == pytest.approx(0.7, abs=0.02) and chart.sigma == pytest.approx(1.0, abs=0.02)
    threshold = anytime_threshold(200, ALPHA)
    assert np.mean([chart.statistic(series()).max() > threshold for _ in range(2000)]) <= ALPHA
    steps = np.arange(200)
    found = [first_alarm(chart.statistic(series(shift=6.0)), steps, threshold) for _ in range(200)]
    delays = [step - 100 for step in found if step is not None and step >= 100]
    assert len(delays) > 180 and np.median(delays) < 20


@pytest.mark.parametrize("name", CHARTS)
def test_a_change_seen_k_samples_earlier_scores_exactly_k_samples_more(name):
    """Shift the same broken signal in time: the lead moves with it, step for step."""
    leads = []
    for onset in (30, 23):
        x = np.zeros(SAMPLES)
        x[onset:] = 8.0
        alarm = first_alarm(CHARTS[name].statistic(x), POSITIONS, 5.0)
        result = score(alarm=alarm, onset=int(POSITIONS[onset]), divergence=480, horizon=500)
        leads.append(result.restricted_lead_steps)
    assert leads[1] - leads[0] == 70


@pytest.mark.parametrize("track", ["reference", "self"])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("bad", ["up", "down", "both"])
def test_a_value_that_is_not_finite_is_never_silent(track, value, bad):
    runs = signals(np.random.default_rng(2), 5)
    values = runs[4].values.copy()
    values[30] = value
    values[31:] = 1e-6  # whatever comes after
    band = ReferenceBand.fit("s", runs[:4]) if track == "reference" else SelfBand()
    z = band.z(Aligned(POSITIONS, values, runs[4].undefined))
    for name, chart in CHARTS.items():
        sides = oriented(z, bad)
        (statistic,) = chart_statistics([sides], [chart] * len(sides))
        assert np.isposinf(statistic[30:]).all(), name
        assert first_alarm(statistic, POSITIONS, 1e300) == POSITIONS[30], name
