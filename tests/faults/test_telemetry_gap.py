"""Readings that are late or lost: the trace says so, and monitors and weights know nothing of it."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from foreshock.experiments import trace
from foreshock.experiments.training.loop import train
from foreshock.experiments.training.missing_readings import is_complete
from foreshock.experiments.training.stacking import why_single
from foreshock.experiments.training.telemetry import Telemetry
from foreshock.faults.base import Sites
from foreshock.faults.log import InjectionLog
from foreshock.faults.operation import Moment
from foreshock.faults.telemetry_gap import Gap, TelemetryGap
from foreshock.monitors.base import Masked
from tests.experiments.same_result import WEIGHTS, assert_same_result
from tests.experiments.test_resume import Killed, stop_at

ONSET, STEPS, DELAY = 9, 30, 3
SHORT = (f"train.steps={STEPS}", "train.held_out_every_steps=10", "train.warmup_steps=0")
EVERY_STEP, EVERY_5 = "train_loss_raw", "delta_w_norm.q.w2"
HEALTHY = Sites(batch_size=8)


@pytest.fixture
def watched(make_run):
    def make(*overrides: str, monitors=("loss", "delta_w")):
        run = make_run(*SHORT, "monitor.delta_w.windows=[2]", "monitor.delta_w.every_steps=5", *overrides)
        return replace(run, monitors={name: run.monitors[name] for name in monitors})

    return make


@pytest.fixture
def gap(watched):
    def make(*overrides: str, **options):
        return watched("fault=telemetry_gap", f"fault.onset={ONSET}", *overrides, **options)

    return make


@pytest.fixture
def healthy(watched, tmp_path):
    return trace.read(tmp_path / "healthy" / train(watched(), tmp_path / "healthy")["run_id"])


def read(run, folder) -> trace.Trace:
    return trace.read(folder / train(run, folder)["run_id"])


def assert_same_training(one: trace.Trace, other: trace.Trace) -> None:
    """The same weights and label, and readings of the same steps."""
    assert (one.folder / WEIGHTS).read_bytes() == (other.folder / WEIGHTS).read_bytes()
    np.testing.assert_array_equal(one.signals["held_out_loss"].values, other.signals["held_out_loss"].values)
    assert one.signals.keys() == other.signals.keys()
    for name, series in one.signals.items():
        np.testing.assert_array_equal(series.steps, other.signals[name].steps)


def test_late_readings_stand_where_they_arrive(gap, healthy, tmp_path):
    late = read(gap(f"fault.delay={DELAY}", "fault.share=0"), tmp_path)
    assert_same_training(late, healthy)
    series, in_time = late.signals[EVERY_STEP], healthy.signals[EVERY_STEP].values
    assert list(series.steps) == list(range(1, STEPS + 1))
    expected = np.concatenate([in_time[:ONSET], np.full_like(in_time[:DELAY], np.nan), in_time[ONSET:-DELAY]])
    np.testing.assert_array_equal(series.values, expected)
    assert list(np.flatnonzero(series.undefined)) == list(range(ONSET, ONSET + DELAY))


def test_a_late_reading_of_a_rarer_signal_is_there_when_it_is_due_again(gap, healthy, tmp_path):
    late, in_time = (one.signals[EVERY_5] for one in (read(gap("fault.delay=3", "fault.share=0"), tmp_path), healthy))
    first = int(np.flatnonzero(in_time.steps > ONSET)[0])
    assert late.undefined[first].all() and np.isnan(late.values[first]).all()
    np.testing.assert_array_equal(late.values[:first], in_time.values[:first])
    np.testing.assert_array_equal(late.values[first + 1 :], in_time.values[first:-1])


def test_after_the_window_readings_are_in_time_and_those_on_their_way_are_overtaken(gap, healthy, tmp_path):
    late = read(gap(f"fault.delay={DELAY}", "fault.share=0", "fault.duration=8"), tmp_path)
    series, in_time = late.signals[EVERY_STEP], healthy.signals[EVERY_STEP].values
    end = ONSET + 8
    np.testing.assert_array_equal(series.values[ONSET + DELAY : end], in_time[ONSET : end - DELAY])
    np.testing.assert_array_equal(series.values[end:], in_time[end:])


def test_a_lost_reading_is_a_missing_sample_and_its_draw_is_of_seed_step_and_signal(gap, healthy, tmp_path):
    run = gap("fault.delay=0", "fault.share=0.3")
    lossy = read(run, tmp_path)
    assert_same_training(lossy, healthy)
    names = [name for name in lossy.signals if name != "held_out_loss"]
    counts = 0
    for name in names:
        series, in_time = lossy.signals[name], healthy.signals[name]
        draws = [
            np.random.Generator(np.random.PCG64((0, step - 1, *f"telemetry_gap {name}".encode()))).random() < 0.3
            for step in series.steps
        ]
        lost = np.array(draws) & (series.steps > ONSET)
        assert (series.undefined == lost[:, None, None]).all() and np.isnan(series.values[lost]).all()
        np.testing.assert_array_equal(series.values[~lost], in_time.values[~lost])
        counts += int(lost.sum())
    (entry,) = [entry for entry in lossy.manifest["injected"] if entry["tensor"] == "missing"]
    assert counts > 0 and entry["elements"] == counts


def test_all_readings_can_be_lost(gap, healthy, tmp_path):
    lost = read(gap("fault.delay=0", "fault.share=1"), tmp_path)
    assert_same_training(lost, healthy)
    assert all(
        series.undefined[series.steps > ONSET].all() for name, series in lost.signals.items() if name != "held_out_loss"
    )


def test_a_control_is_the_healthy_trace(gap, healthy, tmp_path):
    control = read(gap("fault.delay=0", "fault.share=0"), tmp_path)
    assert control.card.control and control.manifest["injected"] == []
    assert_same_result(control.folder, healthy.folder)


def test_a_gap_that_met_no_reading_is_an_error(gap, tmp_path):
    with pytest.raises(ValueError, match=r"fault: Gap\(delay=0, share=1e-09\) at 'system' changed no element"):
        train(gap("fault.delay=0", "fault.share=1e-9"), tmp_path)


@pytest.mark.parametrize("stops", [[5], [ONSET + 1], [12, 21], [29]])
def test_readings_on_their_way_survive_a_kill(gap, tmp_path, stops):
    both = (f"fault.delay={DELAY}", "fault.share=0.2", "train.checkpoint_every_steps=1")
    whole = train(gap(*both), tmp_path / "whole")
    for step in stops:
        with pytest.raises(Killed):
            train(gap(*both), tmp_path / "killed", stop_at(step))
    killed = train(gap(*both), tmp_path / "killed")
    assert killed["injected"] == whole["injected"]
    assert_same_result(tmp_path / "killed" / killed["run_id"], tmp_path / "whole" / whole["run_id"])


def test_a_run_that_lost_readings_is_not_trained_again_for_them(gap, tmp_path, monkeypatch):
    run = gap("fault.delay=0", "fault.share=1")
    first = train(run, tmp_path)
    assert is_complete(tmp_path / run.run_id, run)
    monkeypatch.setattr("experiments.training.loop.trained_again", lambda *_: pytest.fail("it is trained again"))
    assert train(gap("fault.delay=0", "fault.share=1"), tmp_path)["wall_s"] == first["wall_s"]


def test_a_monitor_that_is_added_later_meets_the_same_gap(gap, tmp_path, monkeypatch):
    monkeypatch.setattr("experiments.training.loop.CHECKSUM_EVERY_STEPS", 5)
    both = (f"fault.delay={DELAY}", "fault.share=0.3")
    train(gap(*both, monitors=("loss",)), tmp_path / "later")
    later, whole = (read(gap(*both), tmp_path / folder) for folder in ("later", "whole"))
    assert later.run_id == whole.run_id
    assert_same_result(later.folder, whole.folder)


def test_a_masked_reading_and_one_of_integers_pass_whole_and_go_missing():
    telemetry, log, site = Telemetry(0), InjectionLog(), replace(HEALTHY, system=(Gap(1, 0.0),))
    masked = Masked(torch.tensor([1.0, 2.0]), torch.tensor([False, True]))
    first = telemetry.arrived(0, {"a": masked, "b": torch.tensor(7)}, site, log)
    assert all(reading.undefined.all() for reading in first.values())
    assert first["a"].value.isnan().all() and first["b"].value.item() == 0
    resumed = Telemetry(0)
    resumed.load_state_dict(telemetry.state_dict())
    second = resumed.arrived(1, {"a": masked, "b": torch.tensor(8)}, site, log)
    assert torch.equal(second["a"].undefined, masked.undefined) and torch.equal(second["a"].value, masked.value)
    assert second["b"].item() == 7


def test_an_empty_telemetry_hands_readings_on_as_they_are():
    readings = {"a": torch.tensor(1.0)}
    assert Telemetry(0).arrived(0, readings, HEALTHY, InjectionLog()) is readings


def test_a_share_loses_so_many(share=0.25, draws=4000):
    """Within 5 standard deviations of a binomial count."""
    gap = Gap(0, share)
    lost = sum(gap.loses("a", Moment(1, step, 0)) for step in range(draws))
    assert abs(lost - share * draws) < 5 * (draws * share * (1 - share)) ** 0.5


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["fault.delay=-1"], r"fault\.delay=-1 is not allowed: 0 to"),
        ([f"fault.delay={STEPS}"], rf"fault\.delay={STEPS} is not allowed: below train\.steps={STEPS}"),
        (["fault.share=1.5"], r"fault\.share=1\.5 is not allowed"),
    ],
)
def test_bad_values_are_refused_by_name(gap, overrides, message):
    with pytest.raises(ValueError, match=message):
        gap(*overrides)


def test_two_gaps_at_one_step_meet(make_run):
    healthy = replace(HEALTHY, system=(Gap(1, 0.0), Gap(2, 0.0)))
    run = make_run()
    with pytest.raises(ValueError, match=r"Gap\(.*\) and Gap\(.*\) meet"):
        healthy.check_fits(run.model_config, run.train)


def test_such_a_run_trains_by_itself(gap):
    assert "is applied in single runs alone" in why_single(gap())
    assert TelemetryGap(1).sites(3, HEALTHY).system == (Gap(1, 0.0),)
