import math

import numpy as np
import pytest

from foreshock.analysis.detect.alarms import (
    anytime_threshold,
    chart_statistics,
    conformal_threshold,
    first_alarm,
    oriented,
)
from foreshock.analysis.detect.bands import DeclinedSignal, ReferenceBand
from foreshock.analysis.detect.charts import CUSUM, EWMA, GLR, Shewhart, ShiryaevRoberts
from foreshock.analysis.detect.river import RIVER
from foreshock.analysis.detect.rules import make_rule
from foreshock.analysis.runs.align import Aligned
from foreshock.analysis.runs.conf import conf

RULES = [Shewhart(), EWMA(0.2), CUSUM(0.5), GLR(50), ShiryaevRoberts((0.5, 1.0, 2.0), phi=0.3)]
PERSISTENT = make_rule("cusum", persistence=3, drift=0.5)
RIVER_RULES = [make_rule(**conf("rule", name)) for name in RIVER]
STEPS = np.arange(50, 50 * 41, 50)


def series(values: np.ndarray, undefined: np.ndarray | None = None) -> Aligned:
    values = values.reshape(len(values), *values.shape[1:], *([1] * (3 - values.ndim)))
    return Aligned(STEPS[: len(values)], values, np.zeros(values.shape, bool) if undefined is None else undefined)


def charted(z, bad: str, rule) -> np.ndarray:
    sides = oriented(z, bad)
    return chart_statistics([sides], [rule] * len(sides))[0]


def reference(layers: int = 1, heads: int = 1, runs: int = 6, level=0.0) -> list[Aligned]:
    generator = np.random.default_rng(7)
    return [series(level + generator.normal(size=(len(STEPS), layers, heads))) for _ in range(runs)]


def test_ewma_by_hand():
    assert EWMA(0.2).statistic(np.array([1.0, 0.0, 5.0])) == pytest.approx([0.2, 0.16, 1.128], rel=1e-12)


def test_cusum_by_hand_and_reflected_at_zero():
    assert CUSUM(0.5).statistic(np.array([-3.0, 1.0, 2.0, -5.0, 1.5])) == pytest.approx([0.0, 0.5, 2.0, 0.0, 1.0])


@pytest.mark.parametrize("rule", [*RULES, PERSISTENT])
def test_charts_are_causal(rule):
    x = np.random.default_rng(0).normal(size=60)
    x[[7, 8, 30]] = np.nan
    x[50] = np.inf
    whole = rule.statistic(x)
    for t in (1, 8, 31, 51, 60):
        assert np.array_equal(rule.statistic(x[:t]), whole[:t], equal_nan=True)


@pytest.mark.parametrize("rule", RULES)
def test_a_missing_sample_holds_the_statistic_and_an_infinite_one_alarms_for_good(rule):
    out = rule.statistic(np.array([np.nan, 2.0, np.nan, 1.0]))
    assert math.isnan(out[0])
    assert out[2] == out[1]
    assert np.array_equal(rule.statistic(np.array([2.0, 1.0])), out[[1, 3]])
    assert rule.statistic(np.empty(0)).shape == (0,)
    after = rule.statistic(np.array([0.0, np.inf, -9.0, np.nan]))
    if not isinstance(rule, Shewhart):
        assert np.all(np.isposinf(after[1:]))
    assert np.isposinf(after[1])


@pytest.mark.parametrize("rule", [*RULES, *RIVER_RULES, PERSISTENT])
def test_runs_charted_together_are_charted_as_each_by_itself(rule):
    """Whatever its length, its gaps and what breaks in it: no run may show in another's statistic."""
    generator = np.random.default_rng(3)
    runs = [tuple(generator.normal(size=(2, length))) for length in (60, 40, 60, 60, 1, 0, 40, 5)]
    runs[2][0][[0, 1, 30]] = np.nan
    runs[3][1][20:] = np.inf
    runs[7][0][:] = np.nan
    together = chart_statistics(runs, [rule, rule])
    for run, found in zip(runs, together, strict=True):
        assert np.array_equal(found, np.fmax(*map(rule.statistic, run)), equal_nan=True)
    gaps = np.stack([side for run in runs if len(run[0]) == 40 for side in run])
    gaps[:, [0, 1, 9]] = np.nan  # the same for all, as where a track needs a past
    alone = np.stack([rule.statistic(side) for side in gaps])
    assert np.array_equal(rule.statistic(gaps), alone, equal_nan=True)
    gaps[1, 20] = np.nan
    with pytest.raises(ValueError, match="lack different samples"):
        rule.statistic(gaps)
    assert chart_statistics([], [rule]) == []


@pytest.mark.parametrize("rule", [*RULES, *RIVER_RULES])
def test_empty_and_constant_input_are_defined(rule):
    for shape in ((0,), (3, 0), (0, 0), (0, 4)):
        assert rule.statistic(np.empty(shape)).shape == shape
    assert np.all(np.isfinite(rule.statistic(np.zeros(5))))
    assert np.isnan(rule.statistic(np.full(5, np.nan))).all()


def test_z_scores_are_taken_per_layer_before_the_worst_is_chosen():
    """A quiet layer that collapses inside the level of a loud one must still be seen."""
    level = np.array([[[1.0], [100.0]]])
    band = ReferenceBand.fit("s", reference(layers=2, level=level))
    broken = series(np.broadcast_to(level, (len(STEPS), 2, 1)).copy())
    broken.values[20:, 0] = 90.0  # below the other layer's raw values, so a raw maximum would miss it
    statistic = charted(band.z(broken), "up", Shewhart())
    assert statistic[19] < 5
    assert statistic[20] > 30


def test_heads_of_a_layer_share_one_band():
    runs = reference(heads=2)
    swapped = [Aligned(s.positions, s.values[:, :, ::-1], s.undefined) for s in runs]
    one, other = ReferenceBand.fit("s", runs), ReferenceBand.fit("s", swapped)
    assert np.array_equal(one.centre, other.centre)
    assert np.array_equal(one.scale, other.scale)


def test_scale_is_the_mad_of_residuals_in_units_of_sigma():
    generator = np.random.default_rng(0)
    runs = [series(3.0 * generator.normal(size=(40, 1, 1))) for _ in range(400)]
    assert np.median(ReferenceBand.fit("s", runs).scale) == pytest.approx(3.0, rel=0.03)


@pytest.mark.parametrize(("bad", "side"), [("up", 1), ("down", -1), ("both", 1), ("both", -1)])
def test_direction_of_harm(bad, side):
    band = ReferenceBand.fit("s", reference())
    shifted = series(np.full(len(STEPS), 20.0 * side))
    assert charted(band.z(shifted), bad, Shewhart()).min() > 5
    if bad != "both":
        good = series(np.full(len(STEPS), -20.0 * side))
        assert charted(band.z(good), bad, Shewhart()).max() < 0


@pytest.mark.parametrize("bad", ["up", "down", "both"])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_a_defined_non_finite_value_alarms_from_then_on_in_every_direction(bad, value):
    values = np.zeros((len(STEPS), 1, 2))
    values[9, 0, 1] = value
    statistic = charted(ReferenceBand.fit("s", reference()).z(series(values)), bad, EWMA(0.2))
    assert np.all(np.isfinite(statistic[:9]))
    assert np.all(np.isposinf(statistic[9:]))


def test_an_undefined_value_is_a_missing_sample_and_never_an_alarm():
    values, undefined = np.zeros((len(STEPS), 1, 2)), np.zeros((len(STEPS), 1, 2), bool)
    values[9], undefined[9] = np.nan, True
    statistic = charted(ReferenceBand.fit("s", reference()).z(series(values, undefined)), "down", EWMA(0.2))
    assert np.all(np.isfinite(statistic))
    assert statistic[9] == statistic[8]


@pytest.mark.parametrize(
    ("runs", "message"),
    [
        (reference(runs=3), "at least 4"),
        ([series(np.ones(40))] * 4, "zero spread"),
        ([*reference(runs=3), series(np.ones(30))], "different positions"),
        ([*reference(runs=4), series(np.full(40, np.inf))], "not finite"),
    ],
)
def test_a_signal_that_cannot_be_judged_is_declined_by_name(runs, message):
    with pytest.raises(DeclinedSignal, match=f"signal_x.*{message}"):
        ReferenceBand.fit("signal_x", runs)


def test_samples_that_the_reference_does_not_have_are_an_error():
    band = ReferenceBand.fit("s", reference())
    with pytest.raises(ValueError, match="positions that the reference"):
        band.z(Aligned(np.array([50, 75]), np.zeros((2, 1, 1)), np.zeros((2, 1, 1), bool)))


@pytest.mark.parametrize(
    ("n", "alpha", "rank"), [(9, 0.10, 9), (19, 0.05, 19), (19, 0.10, 18), (59, 0.05, 57), (99, 0.2, 80)]
)
def test_conformal_threshold_is_the_ranked_maximum(n, alpha, rank):
    maxima = np.random.default_rng(0).permutation(np.arange(1.0, n + 1))
    assert conformal_threshold(maxima, alpha) == rank


def test_too_few_runs_name_the_smallest_alpha():
    with pytest.raises(ValueError, match=r"9 calibration runs cannot support alpha=0.05: the smallest is 0.1"):
        conformal_threshold(np.arange(9.0), 0.05)


@pytest.mark.parametrize("alpha", [0.0, 1.0, -1.0])
def test_alpha_outside_zero_and_one_is_an_error(alpha):
    with pytest.raises(ValueError, match="alpha"):
        conformal_threshold(np.arange(9.0), alpha)


def test_conformal_threshold_keeps_its_false_alarm_rate_under_autocorrelation():
    """Over 2,000 simulated calibrations a fresh healthy run alarms in alpha of them, within Monte-Carlo error."""
    generator = np.random.default_rng(1)
    alpha, n, trials = 0.10, 9, 2000
    noise = generator.normal(size=(trials, n + 1, 60))
    walk = np.empty_like(noise)
    walk[..., 0] = noise[..., 0]
    for t in range(1, noise.shape[-1]):
        walk[..., t] = 0.95 * walk[..., t - 1] + noise[..., t]
    maxima = walk.max(axis=-1)
    alarms = [maxima[i, -1] > conformal_threshold(maxima[i, :-1], alpha) for i in range(trials)]
    assert abs(np.mean(alarms) - alpha) < 3 * math.sqrt(alpha * (1 - alpha) / trials)


def test_an_alarm_needs_to_be_strictly_above():
    steps = np.array([10, 20, 30])
    assert first_alarm(np.array([1.0, 2.0, 3.0]), steps, 2.0) == 30
    assert first_alarm(np.array([1.0, np.nan, 2.0]), steps, 2.0) is None


def test_rules_by_name():
    assert make_rule("ewma", weight=0.2) == EWMA(0.2)
    with pytest.raises(ValueError, match="chart='ewm'"):
        make_rule("ewm")
    with pytest.raises(ValueError, match="weight=0"):
        make_rule("ewma", weight=0)


def test_glr_by_hand():
    assert GLR(2).statistic(np.array([1.0, 3.0, -9.0, 2.0])) == pytest.approx([0.5, 4.5, 0.0, 2.0])
    assert GLR(1).statistic(np.array([-1.0, 2.0])) == pytest.approx([0.0, 2.0])


def test_shiryaev_roberts_by_hand():
    """R_t = (1 + R_(t-1)) exp(d z - d^2 / 2), its logarithm."""
    found = ShiryaevRoberts((1.0,)).statistic(np.array([0.5, 2.0, -1.0]))
    r, expected = 0.0, []
    for z in (0.5, 2.0, -1.0):
        r = (1 + r) * math.exp(z - 0.5)
        expected.append(math.log(r))
    assert found == pytest.approx(expected, rel=1e-12)


def test_persistence_is_part_of_the_alarms_time():
    steps, statistic = np.arange(10, 80, 10), np.array([0.0, 5.0, 0.0, 5.0, 5.0, 5.0, 0.0])
    rules = [make_rule("shewhart", persistence=p) for p in (1, 2, 3, 4)]
    assert [first_alarm(rule.statistic(statistic), steps, 1.0) for rule in rules] == [20, 50, 60, None]
    assert np.isnan(rules[2].statistic(statistic)[:2]).all()
    assert PERSISTENT.statistic(np.empty(0)).shape == (0,)
    assert PERSISTENT.statistic(np.array([5.0, np.inf]))[1] == np.inf
    with pytest.raises(ValueError, match="persistence=0"):
        make_rule("shewhart", persistence=0)


def test_the_anytime_threshold_is_a_logarithm():
    assert anytime_threshold(50, 0.05) == pytest.approx(math.log(1000))
    with pytest.raises(ValueError, match="alpha=2"):
        anytime_threshold(50, 2)


@pytest.mark.parametrize(
    ("chart", "parameters", "message"),
    [
        ("glr", {"window": 0}, "window=0"),
        ("shiryaev_roberts", {"shifts": []}, "shifts"),
        ("adwin", {"delt": 1}, r"rule.delt is not a key .*did you mean 'delta'"),
    ],
)
def test_wrong_parameters_are_named(chart, parameters, message):
    with pytest.raises(ValueError, match=message):
        make_rule(chart, **parameters)


def test_whitening_needs_something_that_varies():
    for value in (0.0, 0.1, 0.3, 1 / 3, 5.545):
        with pytest.raises(ValueError, match="vary"):
            ShiryaevRoberts((1.0,)).calibrate([np.full(10, value), np.full(21, value)])
    assert ShiryaevRoberts((1.0,)).calibrate([1 + 1e-9 * np.random.default_rng(0).normal(size=50)]).sigma < 2e-9
    with pytest.raises(ValueError, match="at least 3"):
        ShiryaevRoberts((1.0,)).calibrate([np.zeros(2)])
