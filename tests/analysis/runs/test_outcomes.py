"""Every outcome on constructed curves, at its boundaries, and what holds for every curve."""

import json

import numpy as np
import pyarrow.parquet as pq
import pytest

from foreshock.analysis.runs.labels import DrawupLabel, drawup, drawup_threshold, smoothed
from foreshock.analysis.runs.outcomes import BETTER, OUTCOMES, outcome
from foreshock.experiments.build import ROOT

REFERENCE_SET = ROOT / "results" / "reference_set" / "dense"
N = 60
DELTA = 0.125
LABEL = DrawupLabel(min_drawup_nats=DELTA)
"""A number that floating point has exactly, so that boundaries can be met."""
TIMES = np.arange(N)
BEFORE = TIMES < 20


def flat(level: float) -> np.ndarray:
    return np.full(N, level)


HEALTHY = [2.0 + shift + 0.01 * np.maximum(20 - TIMES, 0) for shift in (-0.02, -0.01, 0.0, 0.01, 0.02)]
"""Without noise, so that an excess is what it is; the largest ends at 2.02."""


def judged(clean: np.ndarray, **given) -> str:
    return outcome(clean, HEALTHY, label=LABEL, **given).outcome


def spiked(base: np.ndarray, height: float, start: int = 30, length: int = 1) -> np.ndarray:
    curve = base.copy()
    curve[start : start + length] += height
    return curve


def evaluations_above(curve: np.ndarray) -> int:
    return int((drawup(curve) >= DELTA).sum())


def test_a_healthy_curve_has_no_effect():
    assert judged(HEALTHY[2]) == "no effect"
    assert outcome(HEALTHY[2], HEALTHY, label=LABEL).note == ""


def test_ending_where_the_worst_healthy_run_ends_is_no_degradation():
    assert judged(HEALTHY[4]) == "no effect"
    assert judged(np.nextafter(HEALTHY[4], np.inf)) == "silent degradation"


def test_a_short_spike_recovers_or_degrades():
    recovers, degrades = spiked(HEALTHY[2], 0.5), spiked(np.where(TIMES < 30, HEALTHY[2], 2.05), 0.5)
    assert 0 < evaluations_above(recovers) < LABEL.consecutive
    assert judged(recovers) == "spike and recover"
    assert judged(degrades) == "spike and degrade"


def test_a_spike_is_one_from_delta_on():
    """One raw spike raises the EMA of span 5 by a third of its height."""
    low, high = spiked(flat(2.0), 3 * DELTA * 0.99), spiked(flat(2.0), 3 * DELTA * 1.01)
    assert (evaluations_above(low), judged(low)) == (0, "no effect")
    assert (evaluations_above(high), judged(high)) == (1, "spike and recover")


@pytest.mark.parametrize(("above", "name"), [(4, "spike and recover"), (5, "divergence")])
def test_an_excursion_of_five_evaluations_is_a_divergence(above, name):
    curve = next(c for h in np.linspace(0.3, 3, 100) if evaluations_above(c := spiked(flat(2.0), h)) == above)
    assert judged(curve) == name


def test_a_run_stopped_as_diverged_or_broken_is_a_divergence():
    rising = HEALTHY[2].copy()
    rising[-1] += 1.0
    assert judged(rising) == "spike and degrade"
    assert judged(rising, stopped=True) == "divergence"
    assert judged(HEALTHY[2], broken=True) == "divergence"
    for lost in (np.nan, np.inf):
        assert judged(np.where(TIMES < 40, HEALTHY[2], lost)) == "divergence"
        assert judged(HEALTHY[2], own=np.where(TIMES < 40, HEALTHY[2], lost)) == "divergence"


def test_a_step_is_a_silent_degradation_and_a_slope_a_drift():
    assert judged(np.where(BEFORE, HEALTHY[2], 2.10)) == "silent degradation"
    assert judged(HEALTHY[2] + 0.0025 * np.maximum(TIMES - 20, 0)) == "gradual drift"
    assert judged(np.where(BEFORE, HEALTHY[2], 2.10 - 0.001 * (TIMES - 20))) == "silent degradation"  # coming back


@pytest.mark.parametrize(("start", "name"), [(49, "gradual drift"), (52, "silent degradation")])
def test_a_slope_is_told_from_five_evaluations_in_each_half_on(start, name):
    """It is above the healthy range from ``start`` on, so that 11 or 8 evaluations are left."""
    curve = np.where(start > TIMES, 2.0, 2.2 + 0.01 * (TIMES - start))
    top = np.max([smoothed(h) for h in HEALTHY], axis=0)
    assert np.flatnonzero(smoothed(curve) <= top)[-1] == start - 1
    assert outcome(curve, HEALTHY, label=DrawupLabel(min_drawup_nats=1.0)).outcome == name


def test_a_slope_within_that_of_the_healthy_runs_is_no_drift():
    tilted = [HEALTHY[0], HEALTHY[1], HEALTHY[2], 1.9 + 0.003 * np.maximum(TIMES - 20, 0)]
    curve = 2.06 + 0.001 * np.maximum(TIMES - 20, 0)
    wide = DrawupLabel(min_drawup_nats=1.0)
    assert outcome(curve, tilted, label=wide).outcome == "silent degradation"
    assert outcome(curve, tilted[:3], label=wide).outcome == "gradual drift"


def test_one_healthy_twin_tells_no_drift():
    curve = HEALTHY[2] + 0.0025 * np.maximum(TIMES - 20, 0)
    assert outcome(curve, HEALTHY[2:3], label=LABEL).outcome == "silent degradation"


@pytest.mark.parametrize(
    ("gap", "length", "name"),
    [
        (DELTA, 40, "compromised"),
        (-DELTA, 40, "compromised"),  # own below clean: a mask that leaks
        (np.nextafter(DELTA, 0) - 1e-9, 40, "no effect"),
    ],
)
def test_labels_that_part_by_delta_compromise_a_run(gap, length, name):
    clean = flat(2.0)
    assert judged(clean, own=clean + gap) == name


@pytest.mark.parametrize(("apart", "name"), [(4, "no effect"), (5, "compromised")])
def test_labels_part_for_five_evaluations(apart, name):
    clean = flat(2.0)
    for height in np.linspace(0.3, 3, 100):
        own = spiked(clean, -height)
        if (np.abs(smoothed(own) - smoothed(clean)) >= DELTA).sum() == apart:
            break
    assert judged(clean, own=own) == name


def test_a_leak_that_looks_better_than_healthy_is_compromised_and_not_better():
    """As of a mask off by one: 1.1 through the faulty kernel, 2.48 through a healthy one."""
    own, clean = np.where(BEFORE, 2.6, 1.1), np.where(BEFORE, 2.6, 2.48)
    healthy = [np.where(BEFORE, 2.6, level) for level in (2.47, 2.48, 2.49, 2.50, 2.51)]
    result = outcome(clean, healthy, own=own)
    assert (result.outcome, result.note) == ("compromised", "")
    assert result.final_loss == pytest.approx(2.48, abs=1e-6)
    assert outcome(own, healthy).note == BETTER  # what the own label alone would have said


def test_a_divergence_comes_before_a_compromise():
    assert judged(np.where(BEFORE, 2.0, 3.0), own=flat(2.0)) == "divergence"


def test_below_every_healthy_run_is_a_note():
    result = outcome(HEALTHY[0] - 0.01, HEALTHY, label=LABEL)
    assert (result.outcome, result.note) == ("no effect", BETTER)
    assert outcome(HEALTHY[0], HEALTHY, label=LABEL).note == ""


def test_a_run_that_ends_early_is_compared_where_it_ended():
    falling = [4.0 - 0.02 * TIMES + shift for shift in (-0.01, 0.0, 0.01)]
    result = outcome(falling[1][:30], falling, label=LABEL)
    assert result.outcome == "no effect"
    assert result.healthy_final_losses[1] == result.final_loss


def random_curve(rng: np.random.Generator) -> np.ndarray:
    curve = 2.0 + np.exp(-TIMES / 15) + rng.normal(0, 0.02, N)
    kind = rng.integers(6)
    start = rng.integers(N)
    if kind == 1:
        curve[start:] += rng.normal(0, 0.3)
    elif kind == 2:
        curve += rng.normal(0, 0.01) * np.maximum(TIMES - start, 0)
    elif kind == 3:
        curve[start : start + rng.integers(1, 3)] += 0.4 + rng.exponential(0.3)
    elif kind == 4:
        curve[start] = rng.choice([np.nan, np.inf, -np.inf])
    return curve[: rng.integers(1, N + 1)]


def random_case(seed: int) -> tuple[np.ndarray, np.ndarray, list[np.ndarray]]:
    rng = np.random.default_rng(seed)
    clean = random_curve(rng)
    own = clean + (rng.integers(2) * rng.normal(0, 0.3)) * (np.arange(len(clean)) > rng.integers(N))
    healthy = [2.0 + np.exp(-TIMES / 15) + rng.normal(0, 0.02, N) for _ in range(rng.integers(1, 7))]
    return own, clean, healthy


def test_every_curve_has_one_outcome_which_no_shift_changes():
    seen = set()
    for seed in range(150):
        own, clean, healthy = random_case(seed)
        result = outcome(clean, healthy, own=own)
        seen.add(result.outcome)
        moved = outcome(clean + 1.5, [losses + 1.5 for losses in healthy], own=own + 1.5)
        assert (moved.outcome, moved.note) == (result.outcome, result.note)
    assert seen == set(OUTCOMES)


@pytest.mark.parametrize("twins", [2, 5, 9])
def test_of_healthy_runs_at_most_two_are_not_without_effect(twins):
    """One has the largest end, one the largest drawup."""
    for seed in range(10):
        rng = np.random.default_rng(seed)
        noise = rng.choice([0.02, 0.2])  # with the larger one it is the healthy runs that set Delta
        runs = [2.0 + np.exp(-TIMES / 15) + rng.normal(0, noise, N) for _ in range(twins + 1)]
        results = [outcome(run, [*runs[:i], *runs[i + 1 :]]) for i, run in enumerate(runs)]
        assert sum(result.outcome != "no effect" for result in results) <= 2
        assert sum(result.note == BETTER for result in results) == 1


@pytest.mark.parametrize("half", ["dense", "moe"])
def test_the_committed_healthy_runs_keep_the_bound(half):
    folder = ROOT / "results" / "reference_set" / half
    cells = json.loads((folder / "experiment.json").read_text())["runs"]
    table = pq.read_table(folder / "signals.parquet", filters=[("signal", "=", "held_out_loss")]).to_pandas()
    of_run = {run: rows.sort_values("step")["value"].to_numpy(float) for run, rows in table.groupby("run")}
    losses = [of_run[cell["run_id"]] for cell in cells if cell["fault"] is None][:30]
    wrong = [outcome(run, [*losses[:i], *losses[i + 1 :]]).outcome for i, run in enumerate(losses)]
    assert len(losses) == 30
    assert len(losses) - wrong.count("no effect") <= 2


@pytest.mark.parametrize("given", [{"clean": []}, {"healthy": []}, {"own": [2.0]}])
def test_what_cannot_be_judged_is_named(given):
    with pytest.raises(ValueError, match="an outcome needs one of each"):
        outcome(**({"clean": [2.0, 2.0], "healthy": [[2.0, 2.0]]} | given))


def test_a_healthy_run_with_a_broken_loss_judges_nothing():
    with pytest.raises(ValueError, match="non-finite loss"):
        outcome(flat(2.0), [flat(np.nan)])
    assert drawup_threshold(HEALTHY, LABEL) == DELTA
