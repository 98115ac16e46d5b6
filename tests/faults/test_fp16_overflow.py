"""A loss scale that jumps: updates are skipped until it has backed off, and nothing else happens."""

from dataclasses import replace

import pytest
import torch

from foreshock.experiments.training.loop import train
from foreshock.experiments.training.stacking import why_single
from foreshock.faults.base import Sites
from foreshock.faults.fp16_overflow import Fp16Overflow
from foreshock.faults.loss_scale import LARGEST, ScaleOperation
from tests.experiments.same_result import assert_same_result
from tests.faults.engine_steps import differing, points_logged, stepped, whole_and_resumed

FP16 = ("train.precision=fp16", "fault=fp16_overflow")
ONSET, STEPS = 3, 16


@pytest.fixture
def overflowing(make_run):
    """A run whose loss scale is multiplied before update ``ONSET``."""

    def make(factor: float, *overrides: str):
        return make_run(*FP16, f"fault.factor={factor}", f"fault.onset={ONSET}", *overrides)

    return make


def scales_of(run, steps: int) -> list[tuple[float, int, bool]]:
    """By step: the scale of its loss, updates skipped by its end, whether it was."""
    engine, healthy, rows = run.new_engine(), run.healthy_sites(), []
    for step in range(steps):
        view = engine.step(step, [run.fault.sites(step, healthy)])
        rows.append((view.loss_scale, view.scaling.skipped, view.skipped))
    return rows


@pytest.mark.parametrize("pieces", [(), ("train.micro_batch=4",)], ids=["whole", "pieces"])
def test_updates_are_skipped_one_after_the_other_until_the_scale_has_backed_off(overflowing, pieces):
    run = overflowing(2.0**12, *pieces)
    rows = scales_of(run, STEPS)
    skipped = [step for step, row in enumerate(rows) if row[2]]
    last = skipped[-1]
    assert 3 <= len(skipped) < STEPS - ONSET - 2 and skipped[0] == ONSET
    assert [row[0] for row in rows[:ONSET]] == [2.0**16] * ONSET
    halvings = [sum(step < now for step in skipped) for now in range(ONSET, STEPS)]
    assert [row[0] for row in rows[ONSET:]] == [2.0 ** (28 - count) for count in halvings]
    assert rows[-1][1] == len(skipped) and not any(row[2] for row in rows[last + 1 :])

    _, faulty, _ = stepped(run, STEPS)
    _, healthy, _ = stepped(replace(run, fault=Fp16Overflow(1.0)), ONSET)
    assert not differing(faulty[ONSET - 1], healthy[ONSET - 1])
    for step in range(1, STEPS):
        assert bool(differing(faulty[step - 1], faulty[step])) == (step not in skipped), step


def test_a_scale_that_does_not_overflow_skips_nothing_and_changes_no_more_than_rounding(overflowing):
    """Twice as large: gradients in FP16's normal numbers keep every bit, and subnormal ones get one."""
    run = overflowing(2.0)
    assert not any(row[2] for row in scales_of(run, STEPS))
    _, _, faulty = stepped(run, ONSET + 1)
    _, _, healthy = stepped(replace(run, fault=Fp16Overflow(1.0)), ONSET + 1)
    assert not differing(faulty[ONSET - 1], healthy[ONSET - 1])
    for name, gradient in healthy[ONSET].items():
        torch.testing.assert_close(faulty[ONSET][name], gradient, rtol=2.0**-10, atol=2.0**-24 / 2.0**16 * 2**8)


def test_a_scale_far_too_small_loses_gradients(overflowing):
    run = overflowing(2.0**-48)
    assert not any(row[2] for row in scales_of(run, ONSET + 1))
    _, _, gradients = stepped(run, ONSET + 1)
    of_products = [x for name, x in gradients[ONSET].items() if "norm" not in name and "positions" not in name]
    assert all(not x.any() for x in of_products)
    assert all(x.any() for x in gradients[ONSET - 1].values())


def test_the_log_has_the_old_and_the_new_scale(overflowing):
    engine, _, _ = stepped(overflowing(2.0**16), ONSET + 2)
    (entry,) = engine.logs[0].entries()
    assert (entry["point"], entry["tensor"], entry["steps"], entry["elements"]) == ("scaling", "scale", 1, 1)
    assert entry["norm"] == 2.0**32 - 2.0**16
    assert points_logged(engine) == {"scaling": 1}


def test_factor_1_is_a_control_bit_for_bit(make_run, overflowing, tmp_path):
    runs = [overflowing(1.0, "train.steps=12"), make_run("train.precision=fp16", "train.steps=12")]
    runs = [replace(run, monitors={"loss": run.monitors["loss"]}) for run in runs]
    manifests = [train(run, tmp_path) for run in runs]
    assert manifests[0]["run_id"] != manifests[1]["run_id"] and manifests[0]["injected"] == []
    assert manifests[0]["injection"]["injections"][0]["control"]
    assert_same_result(*(tmp_path / manifest["run_id"] for manifest in manifests))


@pytest.mark.parametrize("stop", [ONSET, ONSET + 2])
def test_a_run_resumed_among_skipped_updates_is_the_whole_one(overflowing, stop):
    whole, resumed = whole_and_resumed(overflowing(2.0**16), stop, STEPS, needs="scaler")
    assert not differing(whole.model.state_dict(), resumed.model.state_dict())
    assert whole.scaler.state_dict() == resumed.scaler.state_dict() and whole.scaler.skipped > 2


def test_two_jumps_multiply_and_none_leaves_fp32():
    assert ScaleOperation(4.0).apply(ScaleOperation(8.0).apply(2.0)) == 64.0
    assert ScaleOperation(2.0).apply(LARGEST) == LARGEST
    assert ScaleOperation(0.5).apply(2.0**-126) == 2.0**-126


@pytest.mark.parametrize("factor", [0.0, -2.0, 2.0**65, 2.0**-65, float("nan"), float("inf")])
def test_impossible_factors_are_refused_by_name(factor):
    with pytest.raises(ValueError, match=r"^fault\.factor=.* is not allowed: 2\^-64 to 2\^64; 1 is the healthy"):
        Fp16Overflow(factor)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_other_precisions_are_refused_by_name(make_run, precision):
    with pytest.raises(ValueError, match=f"needs train.precision=fp16, and the run has train.precision={precision}$"):
        make_run("fault=fp16_overflow", f"train.precision={precision}")


def test_it_is_healthy_outside_of_its_window_and_trains_by_itself(overflowing):
    healthy = Sites(batch_size=8)
    assert Fp16Overflow(2.0, onset=3, duration=1).sites(4, healthy) is healthy
    assert "train.precision=fp16" in why_single(overflowing(2.0))
