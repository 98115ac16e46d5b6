"""A signal that is 0 in every healthy run: its first other reading is an alarm, and no spread is asked for."""

import pytest

from foreshock.analysis.detect.detection import Detection
from foreshock.analysis.detect.rules import make_rule
from foreshock.analysis.detect.tracks.by_name import TRACKS
from foreshock.analysis.runs.load import load
from tests.described import described

COUNT, NORM = "nan_inf_events", "grad_global_norm"
SIGNALS = {COUNT: described(COUNT), NORM: described(NORM)}
COUNTS = {"reference": 4, "calibration": 9, "test": 3, "faulty": 2}
FAULT = {"o": {"shows": {}, "onset": 301}}


@pytest.fixture
def experiment(made):
    """Counts are 0, but -1 for good from step 410 on in every faulty run."""
    folder = made(COUNTS, SIGNALS, {"events": [COUNT], "both": [COUNT, NORM]}, FAULT, baseline="both")
    experiment = load(folder, folder)
    for run in experiment.runs:
        run.trace.signals[COUNT].values[:] = 0
        if run.role == "faulty":
            run.trace.signals[COUNT].values[40:] = -1
    return experiment


@pytest.mark.parametrize("track", ["reference", "self"])
@pytest.mark.parametrize("chart", [{"chart": "ewma", "weight": 0.2}, {"chart": "cusum", "drift": 1.0}])
@pytest.mark.parametrize("signals", [[COUNT], [COUNT, NORM]], ids=["alone", "jointly"])
def test_its_first_reading_that_is_not_zero_is_an_alarm(experiment, track, chart, signals):
    detector = Detection(experiment, TRACKS[track]).detect("events", signals, make_rule(**chart), 0.10)
    assert detector.declined is None
    for run in experiment.of("faulty"):
        assert detector.alarms[run.trace.run_id] == 410
    if signals == [COUNT]:
        assert not any(detector.alarms[run.trace.run_id] for run in experiment.of("test"))


def test_one_that_is_not_zero_in_health_is_declined(experiment):
    experiment.of("calibration")[0].trace.signals[COUNT].values[30:] = 1
    detector = Detection(experiment, TRACKS["reference"]).detect("events", [COUNT], make_rule("ewma", weight=0.2), 0.10)
    assert "is not 0 in every healthy run" in detector.declined
