"""Members of a joint detector share a threshold without the heavy tail of one setting it for all."""

import numpy as np
import pytest

from foreshock.analysis.detect.alarms import conformal_threshold
from foreshock.analysis.detect.charts import EWMA
from foreshock.analysis.detect.detection import Detection
from foreshock.analysis.detect.joint import MIN_RUNS, Scale, member_scales
from foreshock.analysis.runs.load import load
from foreshock.experiments.trace import read
from tests.analysis.made_up_board import COUNTS, with_singles

HEAVY = {
    "quiet": {"unit": "1", "bad": "up", "axes": [], "every_steps": 10},
    "heavy": {"unit": "1", "bad": "up", "axes": [], "every_steps": 10},
}
FAULTS = {"f": {"shows": {"quiet": 400}, "onset": 301}}


def test_a_scale_is_the_mean_and_standard_deviation_of_path_maxima():
    maxima = np.array([np.arange(10.0), 5.0 + 3.0 * np.arange(10.0)])
    one, other = member_scales(maxima)
    assert (one.centre, one.spread) == (4.5, pytest.approx(np.std(np.arange(10), ddof=1)))
    assert (other.centre, other.spread) == (5 + 3 * 4.5, pytest.approx(3 * one.spread))
    assert one.undone(one.of(7.25)) == pytest.approx(7.25)
    assert Scale().of(3.0) == Scale().undone(3.0) == 3.0


def test_few_runs_share_one_spread_and_so_does_a_member_that_does_not_vary():
    maxima = np.array([[0.0, 1.0, 2.0], [0.0, 7.0, 14.0]])
    assert maxima.shape[1] < MIN_RUNS
    assert [scale.spread for scale in member_scales(maxima)] == pytest.approx([5.0, 5.0])  # root mean square of 1 and 7
    still, moving = member_scales(np.array([np.full(10, 3.0), np.arange(10.0)]))
    assert still.spread == pytest.approx(moving.spread / np.sqrt(2))
    assert {scale.spread for scale in member_scales(np.zeros((2, 10)))} == {1.0}


@pytest.mark.parametrize("maxima", [[[1.0], [2.0]], [[1.0, np.inf], [1.0, 2.0]], [1.0, 2.0]])
def test_maxima_that_give_no_scale_are_refused(maxima):
    with pytest.raises(ValueError, match="members, runs"):
        member_scales(maxima)


def test_a_heavy_tail_does_not_set_the_threshold_of_all():
    """Of a light and a heavy member: on one scale the light one's own threshold is what a joint one costs it."""
    generator = np.random.default_rng(0)

    def maxima(runs: int) -> np.ndarray:
        return np.stack([2 + 0.3 * generator.normal(size=runs), 2 + 6 * generator.gamma(1.0, size=runs)])

    reference, calibration = maxima(30), maxima(999)
    scales = member_scales(reference)
    together = [max(s.of(m) for s, m in zip(scales, both, strict=True)) for both in calibration.T]
    scaled = scales[0].undone(conformal_threshold(together, 0.05))
    as_they_are = conformal_threshold(calibration.max(axis=0), 0.05)
    alone = conformal_threshold(calibration[0], 0.05)
    assert alone < scaled < alone + 1.0
    assert as_they_are > alone + 10.0


def test_members_are_scaled_by_reference_runs_that_had_no_part_in_their_band(made):
    folder = made(COUNTS, HEAVY, {"both": ["quiet", "heavy"]}, FAULTS, baseline="both")
    experiment, rule = load(folder, folder), EWMA(0.2)
    detection = Detection(experiment)
    both, quiet = (detection.detect(name, names, rule, 0.1) for name, names in (("b", HEAVY), ("q", ["quiet"])))
    assert quiet.scales == (Scale(),) and quiet.limits() == (quiet.threshold,)
    for signal, scale in zip(HEAVY, both.scales, strict=True):
        own = [np.nanmax(rule.statistic(series[0])) for series in detection.left_out(signal)]
        assert scale.centre == pytest.approx(np.mean(own))
        inside = [np.nanmax(rule.statistic(detection.sides(signal)[f"reference{i}"].series[0])) for i in range(5)]
        assert np.mean(own) > np.mean(inside)  # a run looks tamer to a band that it helped to make
    run = "calibration1003"
    sides = [detection.sides(signal)[run].series[0] for signal in HEAVY]
    largest = max(s.of(np.nanmax(rule.statistic(x))) for s, x in zip(both.scales, sides, strict=True))
    assert both.maxima[run] == pytest.approx(largest)


def test_one_threshold_cuts_each_member_at_its_own_height(made):
    folder = made(COUNTS, HEAVY, {"both": ["quiet", "heavy"]}, FAULTS, baseline="both")
    detector = with_singles(load(folder, folder)).detectors["both"]
    limits = detector.limits()
    for run, charts in detector.charts.items():
        crossed = [w[s > limit][:1] for (w, s), limit in zip(charts, limits, strict=True)]
        assert detector.alarms[run] == min((int(at[0]) for at in crossed if len(at)), default=None)
    assert detector.alarms_at(np.inf) == dict.fromkeys(detector.charts)


def test_members_that_are_read_at_different_steps_each_count_with_their_latest_reading(made):
    """At a step the joint statistic is the largest of what each member last read; an alarm is at a member's reading."""
    signals = {
        "jittered": HEAVY["quiet"] | {"jittered": True},
        "multiples": HEAVY["quiet"] | {"every_steps": 50},
    }
    faults = {
        "f": {"shows": {"jittered": 400}, "onset": 301},
        "g": {"shows": {"multiples": 400}, "onset": 301},
    }
    folder = made(COUNTS, signals, {"both": ["jittered", "multiples"]}, faults, baseline="both")
    detector = with_singles(load(folder, folder)).detectors["both"]
    steps = {name: series.steps for name, series in read(folder / "f3000").signals.items()}
    assert len(set(steps["jittered"]) & set(steps["multiples"])) < 5
    for run, charts in detector.charts.items():
        latest = np.full((len(charts), 1001), -np.inf)
        for row, ((where, statistic), scale) in enumerate(zip(charts, detector.scales, strict=True)):
            for step, value in zip(where, scale.of(statistic), strict=True):
                latest[row, step:] = value
        above = np.flatnonzero(np.nanmax(latest, axis=0) > detector.threshold)
        assert detector.alarms[run] == (int(above[0]) if len(above) else None), run
    for fault, name in (("f", "jittered"), ("g", "multiples")):
        alarms = [alarm for run, alarm in detector.alarms.items() if run.startswith(fault)]
        assert all(alarm in steps[name] and 400 <= alarm <= 500 for alarm in alarms)


@pytest.mark.parametrize("value", [0.3, 1 / 3, 0.1, 5.545])
def test_maxima_that_are_equal_but_for_rounding_have_no_spread(value):
    """The mean of eleven times 0.3 is not 0.3: their standard deviation is 5.8e-17, and no scale."""
    still, moving = member_scales([[value] * 11, list(range(11))])
    assert still.spread == pytest.approx(moving.spread / np.sqrt(2))
