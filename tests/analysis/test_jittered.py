"""Runs that are read at jittered steps: scored by themselves, and never together with others of the same signal."""

import shutil

import pytest

from foreshock.analysis.detect.detection import Detection
from foreshock.analysis.runs.load import load
from foreshock.analysis.runs.readings import curve
from foreshock.analysis.runs.simulated import simulate_run
from foreshock.experiments import trace
from foreshock.experiments.trace import TraceError
from foreshock.monitors.cadence import Cadence

COUNTS = {"reference": 5, "calibration": 9, "faulty": 2}
LEVEL = {"unit": "1", "bad": "up", "axes": [], "every_steps": 10}
SIGNALS = {
    "law": LEVEL | {"jittered": True},
    "increment": LEVEL | {"every_steps": 50},
    "norm": LEVEL | {"every_steps": 1, "jittered": True},
}
FAULTS = {"f": {"shows": dict.fromkeys(SIGNALS, 400), "onset": 301}}


@pytest.fixture
def folder(made):
    return made(COUNTS, SIGNALS, {name: [name] for name in SIGNALS}, FAULTS, baseline="law")


def due(cadence: Cadence) -> list[int]:
    return [step for step in range(1, 1001) if cadence.is_due(step)]


def replaced(folder, run_id: str, **changes) -> None:
    """Make a run again with some signals described, and read, in another way."""
    manifest = trace.manifest_of(folder / run_id)
    shutil.rmtree(folder / run_id)
    simulate_run(folder / run_id, manifest["seed"], SIGNALS | changes, steps=1000)


def test_a_detector_sees_the_readings_of_its_cadence_jittered_or_not(folder):
    detection = Detection(load(folder, folder))
    for name, cadence in (("law", Cadence(10, True)), ("norm", Cadence(10, True)), ("increment", Cadence(50))):
        for run, aligned in detection.aligned(name).items():
            assert aligned.positions.tolist() == due(cadence), (name, run)


@pytest.mark.parametrize("run_id", ["reference0", "reference1", "calibration1003"])
def test_runs_read_at_jittered_steps_and_at_multiples_are_not_scored_together(folder, run_id):
    replaced(folder, run_id, law=LEVEL)
    detection = Detection(load(folder, folder))
    with pytest.raises(
        TraceError, match=r"^run \w+ has law at (jittered steps|multiples) of 10, other runs at"
    ) as error:
        detection.aligned("law")
    assert "\n" not in str(error.value)


def test_what_every_run_has_at_every_step_is_scored_whichever_way_a_manifest_says_it_is_read(folder):
    replaced(folder, "calibration1003", norm=SIGNALS["norm"] | {"jittered": False})
    aligned = Detection(load(folder, folder)).aligned("norm")
    assert aligned["calibration1003"].positions.tolist() == due(Cadence(10, True))


def test_a_run_that_lost_a_jittered_reading_is_named(folder):
    replaced(folder, "calibration1003", law=SIGNALS["law"] | {"every_steps": 20})
    with pytest.raises(TraceError, match=r"run calibration1003 has no sample of law at step 11"):
        Detection(load(folder, folder)).aligned("law")


@pytest.mark.parametrize("done", [504, 505])
def test_a_reference_run_that_ended_between_two_readings_lacks_none(folder, done):
    """Readings 49 and 50 are at steps 493 and 505 and not 490 and 500."""
    manifest = trace.manifest_of(folder / "reference1")
    shutil.rmtree(folder / "reference1")
    simulate_run(folder / "reference1", 1, SIGNALS, steps=done, end_reason="non_finite")
    trace.write_manifest(
        folder / "reference1", trace.manifest_of(folder / "reference1") | {"config": manifest["config"]}
    )
    aligned = Detection(load(folder, folder)).aligned("law")["reference1"]
    assert aligned.positions.tolist() == [step for step in due(Cadence(10, True)) if step <= done]


def test_a_panel_of_signals_that_are_read_at_different_steps_shows_the_latest_of_each(folder):
    experiment = load(folder, folder)
    run = experiment.runs[0]
    law, increment = (run.trace.signals[name] for name in ("law", "increment"))
    shown = curve(experiment, run, {"signals": ["law", "increment"]})
    assert shown.index.tolist() == sorted({*law.steps.tolist(), *increment.steps.tolist()})
    for step, value in shown.items():
        known = [series.values[series.steps <= step] for series in (law, increment)]
        assert value == max(values[-1].max() for values in known if len(values))
