"""The threshold of a prediction alone: it keeps its rate where the prediction holds, and calibrates nothing."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.stats import norm

from foreshock.analysis.detect.bands import DeclinedSignal
from foreshock.analysis.detect.detection import Detection
from foreshock.analysis.detect.tracks.by_name import TRACKS
from foreshock.analysis.detect.tracks.universal import universal_threshold
from foreshock.analysis.reports.boards import Request, score_runs
from foreshock.analysis.runs.load import load
from foreshock.analysis.scores.contest import contest, run_scores
from foreshock.analysis.scores.leaderboard import board
from foreshock.monitors.attention_laws import AttentionLaws
from foreshock.monitors.attention_recomputed import AttentionRecomputed
from foreshock.monitors.linear_laws import LinearLaws
from foreshock.monitors.norm_laws import NormLaws
from foreshock.monitors.signal import OVER_NOISE
from foreshock.monitors.softmax_laws import LogitLaws, RouterLaws
from tests.described import described

RATIO, OTHER = "key_shift_residual.over_noise", "qk_gauge_residual.matrix.over_noise"
SIGNALS = {
    RATIO: described(RATIO),
    OTHER: described(OTHER, axes=()),
    "key_shift_residual": described("key_shift_residual"),
    "grad_global_norm": described("grad_global_norm", axes=("layer", "head")),
}
DETECTORS = {"laws": [RATIO, OTHER], "residual": ["key_shift_residual"], "loss": ["grad_global_norm"]}
COUNTS = {"reference": 4, "calibration": 9, "test": 3, "faulty": 2}
FAULT = {"o": {"shows": {RATIO: 301}, "onset": 301}, "none": {"onset": 301}}


@pytest.mark.parametrize("rows", [1, 2, 16])
def test_rounding_alone_passes_it_no_more_often_than_alpha(rows):
    """Over few rows a ratio is the root mean square of as many independent normal numbers."""
    generator, runs, looks, alpha = np.random.default_rng(0), 2000, 240, 0.05
    ratio = np.sqrt((generator.normal(size=(runs, looks, rows)) ** 2).mean(-1))
    alarms = (ratio > universal_threshold(looks, alpha)).any(1).mean()
    assert alarms <= alpha + 3 * np.sqrt(alpha * (1 - alpha) / runs)
    if rows == 1:  # and no less often than that by much: Bonferroni costs little for independent looks
        assert alarms >= 0.7 * alpha


def test_a_shift_passes_it():
    generator, looks = np.random.default_rng(1), 240
    shifted = np.abs(8.0 * generator.normal(size=(500, 10)))  # a fault of eight times the rounding, ten readings
    assert (shifted > universal_threshold(looks, 0.05)).any(1).mean() > 0.99


def test_it_is_the_two_sided_quantile_of_bonferroni():
    assert universal_threshold(1, 0.05) == pytest.approx(1.959964)
    assert 1000 * 2 * norm.sf(universal_threshold(1000, 0.05)) == pytest.approx(0.05)


@pytest.mark.parametrize(
    ("looks", "alpha", "named"),
    [(0, 0.05, "looks=0"), (5, 0.0, "alpha=0"), (5, 0.7, "alpha=0.7"), (1000, 1.0, "alpha=1")],
)
def test_impossible_rates_are_errors_by_name(looks, alpha, named):
    with pytest.raises(ValueError, match=named):
        universal_threshold(looks, alpha)


@pytest.fixture
def folder(made):
    return made(COUNTS, SIGNALS, DETECTORS, FAULT, baseline="loss")


def test_the_track_counts_its_looks_and_uses_no_calibration(folder):
    experiment = load(folder, folder)
    one = contest(experiment, "universal")
    laws = one.detectors["laws"]
    assert laws.threshold == universal_threshold(100 * 2 * 2 + 100, 0.10)  # readings x layers x heads, and readings
    assert "no ratio to predicted noise" in one.detectors["residual"].declined
    assert laws.maxima == {}
    rows = board(one, run_scores(one)).set_index(["fault", "detector"])
    row = rows.loc[("o", "laws")]
    assert row["detected"] == 1 and row["delay_steps"] == 9  # onset 301, next reading 310
    assert rows.loc[("none", "laws"), "detected"] == 0
    # healthy are the test runs and the calibration runs, which set nothing here; raw ratios of about 2 are quiet
    assert (row["healthy_alarms"], row["healthy_runs"], row["calibration_runs"]) == (0, 12, 0)
    assert row["alpha"] == 0.10


def test_the_universal_track_judges_attention_alone():
    """Every ratio to predicted noise has a say on the floor track; outside attention the prediction is a scale."""
    of_others = [LinearLaws(1, 1), LogitLaws(1, 1), NormLaws(1, 1), RouterLaws(1)]
    monitors = [AttentionLaws(1, 1), AttentionRecomputed(1, 1), *of_others]
    ratios = [signal for monitor in monitors for signal in monitor.signals if signal.name.endswith(f".{OVER_NOISE}")]
    judged = set()
    for signal in ratios:
        TRACKS["floor"].check_applies(signal)
        try:
            TRACKS["universal"].check_applies(signal)
            judged.add(signal)
        except DeclinedSignal as error:
            assert str(error) == f"{signal.name}: its predicted noise is a scale, and gives no threshold by itself"
    of_attention = {signal for monitor in monitors[:2] for signal in monitor.signals}
    assert judged == of_attention & set(ratios) and len(judged) < len(ratios)


def test_a_reading_that_is_not_finite_is_an_alarm(folder):
    experiment = load(folder, folder)
    run = experiment.of("test")[0]
    run.trace.signals[OTHER].values[40] = np.nan
    detector = Detection(experiment, TRACKS["universal"]).detect("laws", [OTHER], None, 0.10)
    assert detector.alarms[run.trace.run_id] == 410


def test_a_board_on_which_nothing_has_a_prediction_gets_no_rows(made, tmp_path):
    signals = {name: SIGNALS[name] for name in ("key_shift_residual", "grad_global_norm")}
    detectors = {"residual": ["key_shift_residual"], "loss": ["grad_global_norm"]}
    folder = made(COUNTS, signals, detectors, FAULT, baseline="loss", name="bare")
    tracks = ("reference", "universal")
    board = score_runs(Request(runs=folder, out=tmp_path / "out", tracks=tracks)).get("leaderboard")
    assert set(board["track"]) == {"reference"}


def test_all_tracks_stand_on_one_board(folder, tmp_path):
    board = score_runs(Request(runs=folder, out=tmp_path / "out")).get("leaderboard")
    assert {"reference", "floor", "universal"} <= set(board["track"])
