import numpy as np
import pytest

from foreshock.analysis.runs.labels import (
    DrawupLabel,
    divergence_step,
    drawup,
    drawup_threshold,
    is_degraded,
    rolling_sigma_step,
    running_mean_step,
    sensitivity_labels,
    smoothed,
)

STEPS = np.arange(0, 1000, 10)
HEALTHY = [5.0 * np.exp(-STEPS / 200.0) + 1.5] * 4


def ramp_from(step: int, slope_nats_per_step: float = 0.01) -> np.ndarray:
    return HEALTHY[0] + slope_nats_per_step * np.maximum(0, STEPS - step)


def test_smoothing_is_the_ema_of_weight_one_third():
    assert smoothed(np.array([3.0, 0.0, 0.0])) == pytest.approx([3.0, 2.0, 4.0 / 3.0], rel=1e-12)


def test_drawup_of_a_falling_loss_is_zero_and_of_a_rise_is_its_height():
    assert np.all(drawup(HEALTHY[0]) == 0)
    assert drawup(np.r_[np.ones(50), np.full(200, 3.0)])[-1] == pytest.approx(2.0)


def test_a_healthy_run_never_diverges():
    assert divergence_step(HEALTHY[0], healthy_losses=HEALTHY, steps=STEPS) is None


def test_divergence_is_the_start_of_the_excursion_not_its_confirmation():
    loss = np.r_[np.full(50, 2.0), np.full(50, 4.0)]
    assert divergence_step(loss, healthy_losses=HEALTHY, steps=STEPS) == 500


def test_an_excursion_shorter_than_five_evaluations_is_no_divergence():
    loss = np.full(100, 2.0)
    loss[50] = 2.5
    assert 0 < (drawup(loss) >= 0.10).sum() < 5
    assert divergence_step(loss, healthy_losses=HEALTHY, steps=STEPS) is None


def test_a_later_divergence_gives_a_later_step():
    first, second = (divergence_step(ramp_from(s), healthy_losses=HEALTHY, steps=STEPS) for s in (600, 700))
    assert first is not None
    assert second - first == pytest.approx(100, abs=20)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_the_first_non_finite_loss_is_a_divergence(bad):
    loss = HEALTHY[0].copy()
    loss[42] = bad
    assert divergence_step(loss, healthy_losses=HEALTHY, steps=STEPS) == 420


def test_an_excursion_before_the_non_finite_loss_comes_first():
    loss = ramp_from(500)
    loss[-1] = np.nan
    assert divergence_step(loss, healthy_losses=HEALTHY, steps=STEPS) < 700


def test_noisy_healthy_runs_raise_the_threshold():
    noisy = [np.r_[np.full(50, 2.0), np.full(50, 2.4)]]
    assert drawup_threshold(noisy) == pytest.approx(1.5 * 0.4)
    assert drawup_threshold(HEALTHY) == 0.10
    assert divergence_step(np.r_[np.full(50, 2.0), np.full(50, 2.5)], healthy_losses=noisy, steps=STEPS) is None


def test_degraded_means_ending_above_every_calibration_run():
    worse = HEALTHY[0] + 0.05
    assert is_degraded(worse, HEALTHY)
    assert not is_degraded(HEALTHY[0], [HEALTHY[0], worse])


@pytest.mark.parametrize(
    ("loss", "steps", "healthy", "message"),
    [
        (np.ones(3), np.array([0, 10]), HEALTHY, "shape"),
        (np.ones(2), np.array([10, 0]), HEALTHY, "increase"),
        (np.ones(2), np.array([0, 10]), [], "at least one healthy"),
        (np.ones(2), np.array([0, 10]), [np.array([1.0, np.nan])], "non-finite"),
    ],
)
def test_impossible_input_is_an_error_that_says_why(loss, steps, healthy, message):
    with pytest.raises(ValueError, match=message):
        divergence_step(loss, healthy_losses=healthy, steps=steps)


def test_a_run_stopped_as_diverged_counts_with_its_short_last_excursion():
    loss = np.r_[np.full(50, 2.0), 4.0, 5.0]
    steps = 10 * np.arange(len(loss))
    assert divergence_step(loss, healthy_losses=HEALTHY, steps=steps) is None
    assert divergence_step(loss, healthy_losses=HEALTHY, steps=steps, stopped=True) == 500
    broken = np.r_[loss, np.nan]
    assert divergence_step(broken, healthy_losses=HEALTHY, steps=10 * np.arange(len(broken))) == 520


def test_half_of_delta_sees_half_the_rise():
    loss = np.r_[np.full(50, 2.0), np.full(50, 2.08)]
    args = dict(healthy_losses=HEALTHY, steps=STEPS)
    assert [divergence_step(loss, **args, delta_scale=s) for s in (0.5, 1.0)] == [520, None]


TRAINING_STEPS = np.arange(1, 2001)


def noisy_loss(seed: int = 0) -> np.ndarray:
    return 2.0 + 0.1 * np.random.default_rng(seed).normal(size=len(TRAINING_STEPS))


@pytest.mark.parametrize("value", [0.1, 0.3, 1 / 3, 5.545])
def test_olmos_rule_sees_nothing_in_a_constant(value):
    assert rolling_sigma_step(np.full(len(TRAINING_STEPS), value), steps=TRAINING_STEPS) is None


def test_olmos_rule_needs_seven_sigma_above_the_steps_before():
    loss = noisy_loss()
    assert rolling_sigma_step(loss, steps=TRAINING_STEPS) is None
    loss[1500] = 2.0 + 0.1 * 7.5
    assert rolling_sigma_step(loss, steps=TRAINING_STEPS) == 1501
    loss[1500] = 2.0 + 0.1 * 6.0
    assert rolling_sigma_step(loss, steps=TRAINING_STEPS) is None
    loss[50] = 90.0  # before there is any history
    assert rolling_sigma_step(loss, steps=TRAINING_STEPS) is None


def test_llm_foundrys_rule_needs_twice_the_mean_for_five_steps():
    loss = noisy_loss()
    loss[1500:1504] = 4.5
    assert running_mean_step(loss, steps=TRAINING_STEPS) is None
    loss[1500:1505] = 4.5
    assert running_mean_step(loss, steps=TRAINING_STEPS) == 1501
    loss[700] = np.nan
    assert running_mean_step(loss, steps=TRAINING_STEPS) == 701


def test_every_other_label_agrees_on_a_gross_divergence_and_on_health():
    training = [noisy_loss(s) for s in range(1, 5)]
    common = dict(healthy_held_out=HEALTHY, healthy_training=training, label=DrawupLabel())
    healthy = sensitivity_labels((STEPS, HEALTHY[0]), (TRAINING_STEPS, noisy_loss()), **common)
    assert healthy == dict.fromkeys(("delta x0.5", "delta x2", "training loss", "OLMo", "LLM-Foundry"))
    held_out, training = HEALTHY[0].copy(), noisy_loss()
    held_out[60:] += 6.0
    training[600:] += 6.0
    gross = sensitivity_labels((STEPS, held_out), (TRAINING_STEPS, training), **common)
    assert gross == dict.fromkeys(("delta x0.5", "delta x2"), 600) | dict.fromkeys(
        ("training loss", "OLMo", "LLM-Foundry"), 601
    )
