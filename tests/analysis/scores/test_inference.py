import math
import warnings

import numpy as np
import pytest
from scipy import stats

from foreshock.analysis.scores.inference import (
    bca_interval,
    chance_of_alarms,
    clopper_pearson_interval,
    confidence_set,
    false_alarm_bound,
    false_alarm_law,
    iqm,
    keeps_rate,
    max_t_test,
    performance_profile,
    rank_agreement,
    rank_intervals,
    restricted_mean_time,
    seed_mean,
    wilson_interval,
)

FAULTS = 5


def seeds_leads(generator: np.random.Generator, seeds: int = 30) -> tuple[np.ndarray, np.ndarray]:
    """Totals and counts of near-normal leads with mean 100, a fifth of them missed; the pooled mean is 80."""
    leads = np.maximum(generator.normal(100, 30, (seeds, FAULTS)), 0) * (generator.random((seeds, FAULTS)) > 0.2)
    return leads.sum(axis=1), np.full(seeds, FAULTS)


def test_seed_mean_pools_runs_and_not_seeds():
    assert seed_mean([10, 0, 50], [1, 0, 4]) == 12
    assert math.isnan(seed_mean([0, 0], [0, 0]))
    assert math.isnan(seed_mean([], []))


@pytest.mark.parametrize(
    ("totals", "counts", "message"),
    [
        ([1.0], [1, 2], "shape"),
        ([[1.0]], [[1]], "shape"),
        ([np.nan], [0], "not finite"),
        ([1.0], [np.inf], "not finite"),
        ([1.0], [-1], "counts"),
        ([1.0], [0], "counts"),
    ],
)
def test_impossible_totals_and_counts_are_an_error(totals, counts, message):
    for function in (seed_mean, bca_interval):
        with pytest.raises(ValueError, match=message):
            function(totals, counts)


@pytest.mark.slow
def test_bca_covers_the_pooled_mean_at_30_seeds():
    """Near-normal leads with a fifth missed: 95.2 % in 8,000 sets; without the expansion it would be 93.7 %.

    A strongly skewed lead, gamma of shape 0.5 with one run a seed, gives 92.5 %.
    """
    generator = np.random.default_rng(0)
    sets, covered = 3000, 0
    truth = 0.8 * (100 * stats.norm.cdf(100 / 30) + 30 * stats.norm.pdf(100 / 30))
    for i in range(sets):
        low, high = bca_interval(*seeds_leads(generator), resamples=999, seed=i)
        covered += low <= truth <= high
    assert abs(covered / sets - 0.95) <= 0.02


def test_bca_agrees_with_the_normal_interval_where_there_are_many_seeds():
    totals, counts = seeds_leads(np.random.default_rng(1), seeds=400)
    error = 1.96 * np.std(totals / counts, ddof=1) / math.sqrt(400)
    mean = seed_mean(totals, counts)
    assert bca_interval(totals, counts) == pytest.approx((mean - error, mean + error), abs=0.1 * error)


def test_bca_is_deterministic_by_seed_and_scales_with_the_leads():
    totals, counts = seeds_leads(np.random.default_rng(2))
    first = bca_interval(totals, counts, seed=3)
    assert first == bca_interval(totals, counts, seed=3)
    assert first != bca_interval(totals, counts, seed=4)
    assert bca_interval(8 * totals, counts, seed=3) == pytest.approx((8 * first[0], 8 * first[1]))
    narrow = bca_interval(totals, counts, seed=3, confidence=0.5)
    assert first[0] < narrow[0] < seed_mean(totals, counts) < narrow[1] < first[1]


def test_bca_draws_seeds_without_runs_as_well():
    """They widen nothing that they do not know, and under 10 seeds with runs there is no interval."""
    totals, counts = np.zeros(30), np.zeros(30)
    totals[:10], counts[:10] = np.arange(10.0, 20.0), 1
    low, high = bca_interval(totals, counts)
    alone = bca_interval(totals[:10], counts[:10])
    assert 10 <= low < seed_mean(totals, counts) < high <= 19
    assert high - low == pytest.approx(alone[1] - alone[0], rel=0.35)
    counts[9], totals[9] = 0, 0
    assert np.isnan(bca_interval(totals, counts)).all()


def test_no_bca_interval_under_10_seeds_or_from_one_seed():
    assert np.isnan(bca_interval(np.arange(9.0), np.ones(9))).all()
    assert np.isfinite(bca_interval(np.arange(10.0), np.ones(10))).all()
    assert np.isnan(bca_interval(np.eye(12)[0], np.eye(12)[0])).all()


def test_proportions_against_published_numbers():
    """Wilson 81 / 263: Newcombe (1998), table I; Clopper-Pearson 0 and n of n by the closed form 1 - 0.025^(1/n)."""
    assert wilson_interval(81, 263) == pytest.approx((0.2553, 0.3662), abs=5e-5)
    assert clopper_pearson_interval(81, 263) == pytest.approx((0.2527, 0.3676), abs=5e-5)
    assert clopper_pearson_interval(0, 20) == pytest.approx((0, 1 - 0.025 ** (1 / 20)))
    assert clopper_pearson_interval(20, 20) == pytest.approx((0.025 ** (1 / 20), 1))
    assert wilson_interval(0, 10) == pytest.approx((0, 1.96**2 / (10 + 1.96**2)), abs=1e-4)


@pytest.mark.parametrize("interval", [wilson_interval, clopper_pearson_interval])
def test_proportions_of_nothing_and_impossible_ones(interval):
    assert np.isnan(interval(0, 0)).all()
    for successes, n in ((3, 2), (-1, 2), (0, -1)):
        with pytest.raises(ValueError, match=f"successes={successes}"):
            interval(successes, n)


def test_false_alarm_law_by_hand():
    """19 runs at 5 %: the largest of 19, whose exceedance is Beta(1, 19) = 1 - U^(1/19)."""
    mean, low, high = false_alarm_law(19, 0.05)
    assert mean == pytest.approx(1 / 20)
    assert (low, high) == pytest.approx((1 - 0.975 ** (1 / 19), 1 - 0.025 ** (1 / 19)))
    with pytest.raises(ValueError, match=r"9 calibration runs cannot support alpha=0.05"):
        false_alarm_law(9, 0.05)


def test_false_alarm_law_against_simulated_calibrations():
    maxima = np.sort(np.random.default_rng(0).random((20_000, 59)), axis=1)
    rate = 1 - maxima[:, 57 - 1]  # k = ceil(60 x 0.95) = 57
    simulated = (rate.mean(), *np.quantile(rate, [0.025, 0.975]))
    assert false_alarm_law(59, 0.05) == pytest.approx(simulated, abs=0.002)
    assert simulated[0] == pytest.approx(0.05, abs=0.001)


@pytest.mark.parametrize(("n", "alpha"), [(9, 0.10), (19, 0.05), (59, 1 / 60)])
@pytest.mark.parametrize("runs", [1, 3, 5, 30])
def test_all_runs_above_the_largest_calibration_run(n, alpha, runs):
    """Closed form: the largest m of n + m exchangeable maxima are the m others, 1 / C(n + m, m)."""
    assert chance_of_alarms(runs, runs, n, alpha) == pytest.approx(1 / math.comb(n + runs, runs), rel=1e-9)
    assert chance_of_alarms(1, runs, n, alpha) == pytest.approx(runs / (n + runs), rel=1e-9)  # someone else is largest
    assert chance_of_alarms(0, runs, n, alpha) == 1


def test_alarms_by_chance_against_simulated_calibrations():
    """60,000 sets of 59 calibration and 30 other runs, exchangeable: far heavier a tail than the binomial's."""
    generator = np.random.default_rng(0)
    maxima = generator.standard_t(3, (60_000, 89))
    threshold = np.sort(maxima[:, :59], axis=1)[:, 57 - 1]
    alarms = (maxima[:, 59:] > threshold[:, None]).sum(axis=1)
    for count in range(9):
        share = (alarms >= count).mean()
        assert chance_of_alarms(count, 30, 59, 0.05) == pytest.approx(share, abs=4 * np.sqrt(share / 60_000) + 1e-9)
    assert chance_of_alarms(6, 30, 59, 0.05) > 4 * stats.binom.sf(5, 30, 0.05)


def test_alarms_that_cannot_be():
    for alarms, runs in ((3, 2), (-1, 2)):
        with pytest.raises(ValueError, match=f"alarms={alarms} is not allowed"):
            chance_of_alarms(alarms, runs, 19, 0.05)
    with pytest.raises(ValueError, match=r"9 calibration runs cannot support alpha=0\.05"):
        chance_of_alarms(1, 2, 9, 0.05)


def test_a_detector_is_ranked_while_its_false_alarms_may_be_luck():
    """Five of 30 happen to one calibrated threshold in 24 and to a promise of 5 % in 64."""
    assert keeps_rate(5, 30, 59, 0.05) and not keeps_rate(6, 30, 59, 0.05)
    assert keeps_rate(4, 30, 0, 0.05) and not keeps_rate(5, 30, 0, 0.05)
    assert keeps_rate(0, 0, 59, 0.05) and keeps_rate(0, 0, 0, 0.05)


def test_ranks_by_hand_with_ties_and_a_detector_without_runs():
    totals = np.tile([3.0, 9.0, 3.0, 0.0], (4, 1))
    counts = np.tile([1, 1, 1, 0], (4, 1))
    out = rank_intervals(totals, counts)
    assert np.array_equal(out[:, 0], [2.5, 1, 2.5, np.nan], equal_nan=True)
    assert np.isnan(out[:, 1:]).all()  # four seeds
    assert np.isnan(rank_intervals(np.zeros((12, 2)), np.zeros((12, 2)))).all()


def test_a_clearly_best_detector_is_first_and_exchangeable_ones_are_rarely_told_apart():
    """Of five exchangeable detectors nine pairs in ten overlap, over 40 sets, with intervals 2 ranks wide or more."""
    generator = np.random.default_rng(0)
    overlap, width = [], []
    for _ in range(40):
        totals = generator.normal(10, 3, size=(30, 6))
        totals[:, 4] += 50
        out = rank_intervals(totals, np.ones_like(totals), resamples=1000)
        assert np.array_equal(out[4], [1, 1, 1])
        rank, low, high = np.delete(out, 4, axis=0).T
        assert np.all((low <= rank) & (rank <= high))
        overlap.append((low[:, None] <= high).mean())
        width.append(high - low)
    assert np.mean(overlap) > 0.9
    assert np.mean(width) >= 2


def test_one_draw_of_seeds_serves_all_detectors():
    """Equal columns tie in every draw; a lead of 1 in every seed is certain under noise of 100 that is shared."""
    generator = np.random.default_rng(0)
    shared = generator.normal(0, 100, size=30)
    totals = np.column_stack([shared, shared, shared + 1, 2 * shared, generator.normal(size=(30, 13))])
    counts = np.ones_like(totals)
    counts[:, 3] = 2  # the same mean from twice the runs
    out = rank_intervals(totals[:, :4], counts[:, :4])
    assert np.array_equal(out, [[3, 3, 3], [3, 3, 3], [1, 1, 1], [3, 3, 3]])
    wide = rank_intervals(totals, counts)
    assert np.array_equal(wide[0], wide[1])
    assert np.array_equal(wide[0], wide[3])


def test_rank_intervals_are_those_of_resampled_seeds():
    generator = np.random.default_rng(5)
    totals = generator.normal(size=(12, 4)) + np.array([0, 0.3, 0.6, 0.9])
    draws = totals[generator.integers(12, size=(4000, 12))].mean(axis=1)
    expected = np.quantile(stats.rankdata(-draws, axis=1), [0.025, 0.975], axis=0, method="inverted_cdf").T
    out = rank_intervals(totals, np.ones_like(totals), seed=1)
    assert np.abs(out[:, 1:] - expected).max() <= 1
    assert np.array_equal(out, rank_intervals(totals, np.ones_like(totals), seed=1))


def test_max_t_by_hand():
    """3 seeds, 8 patterns: (1, 2, 3) is the largest sum of its column, (3, 2, -1) the second and its tie."""
    result = max_t_test(np.array([[1.0], [2.0], [3.0]]))
    assert result.p_adjusted_D == pytest.approx([1 / 8])
    assert result.statistic_D == pytest.approx([2 * math.sqrt(3)])
    assert result.smallest_p == 1 / 8
    assert max_t_test([[3.0], [2.0], [-1.0]]).p_adjusted_D == pytest.approx([2 / 8])
    assert max_t_test([[-1.0], [-2.0], [-3.0]]).p_adjusted_D == pytest.approx([1])


def test_max_t_statistic_is_student_and_adjustment_is_the_maximum_over_columns():
    differences = np.random.default_rng(0).normal(0.4, 1, size=(8, 3))
    signs = 1 - 2 * ((np.arange(2**8)[:, None] >> np.arange(8)) & 1)
    flipped = signs[:, :, None] * differences
    t = flipped.mean(axis=1) / flipped.std(axis=1, ddof=1) * math.sqrt(8)
    result = max_t_test(differences)
    assert result.statistic_D == pytest.approx(stats.ttest_1samp(differences, 0).statistic)
    assert result.p_adjusted_D == pytest.approx([np.mean(t.max(axis=1) >= one - 1e-9) for one in t[0]])
    alone = [max_t_test(differences[:, [d]]).p_adjusted_D[0] for d in range(3)]
    scipy = stats.permutation_test(
        (differences[:, 0],), lambda x, axis: x.mean(axis=axis), permutation_type="samples", alternative="greater"
    )
    assert alone[0] == pytest.approx(scipy.pvalue)
    assert np.all(result.p_adjusted_D >= alone)


@pytest.mark.parametrize("seeds", [12, 14, 40])
def test_max_t_of_constant_columns(seeds):
    """Zero everywhere: t = 0, p = 1; the same lead in every seed: the smallest p, exact or drawn."""
    result = max_t_test(np.tile([0.0, 0.1], (seeds, 1)))
    assert result.smallest_p == (2.0**-seeds if seeds == 12 else 1 / 10_001)
    assert result.p_adjusted_D == pytest.approx([1, result.smallest_p])
    assert np.array_equal(result.statistic_D, [0, np.inf])
    behind = max_t_test(np.full((seeds, 1), -0.1))
    assert (behind.p_adjusted_D[0], behind.statistic_D[0]) == (1, -np.inf)


def test_max_t_drawn_patterns_agree_with_all_of_them_and_are_deterministic():
    differences = np.random.default_rng(3).normal(0.3, 1, size=(14, 5))
    drawn, every = max_t_test(differences, resamples=4000, seed=1), max_t_test(differences, resamples=2**14)
    assert every.smallest_p == 2.0**-14
    assert drawn.smallest_p == 1 / 4001
    assert drawn.p_adjusted_D == pytest.approx(every.p_adjusted_D, abs=0.03)
    assert np.array_equal(drawn.p_adjusted_D, max_t_test(differences, resamples=4000, seed=1).p_adjusted_D)


def test_max_t_p_is_uniform_under_the_null():
    """10 seeds, all 1,024 patterns, heavy-tailed symmetric differences: P(p <= a) = a at every attainable a."""
    generator = np.random.default_rng(0)
    p = [max_t_test(generator.standard_t(3, size=(10, 1))).p_adjusted_D[0] for _ in range(2000)]
    assert stats.kstest(p, "uniform").pvalue > 0.01
    for level in (8 / 1024, 52 / 1024, 102 / 1024, 512 / 1024):
        assert abs(np.mean(np.array(p) <= level) - level) < 3 * math.sqrt(level * (1 - level) / len(p))


def test_max_t_keeps_the_familywise_error_over_correlated_columns():
    generator = np.random.default_rng(0)
    trials, alpha = 1000, 0.05
    least = [
        max_t_test(generator.normal(size=(10, 8)) + generator.normal(size=(10, 1))).p_adjusted_D.min()
        for _ in range(trials)
    ]
    assert np.mean(np.array(least) <= alpha) <= alpha + 3 * math.sqrt(alpha * (1 - alpha) / trials)


def test_max_t_takes_more_seeds_than_an_integer_has_bits():
    differences = np.random.default_rng(0).normal([0.0, 0.5, 2.0], size=(127, 3))
    found = max_t_test(differences, resamples=2000)
    assert found.p_adjusted_D[0] > 0.05 and found.p_adjusted_D[2] == found.smallest_p == 1 / 2001


def test_max_t_drops_seeds_without_any_value_and_refuses_other_gaps():
    differences = np.random.default_rng(0).normal(size=(10, 2))
    gapped = np.insert(differences, 4, np.nan, axis=0)
    assert np.array_equal(max_t_test(gapped).p_adjusted_D, max_t_test(differences).p_adjusted_D)
    gapped[4, 0] = 1
    for bad, message in ((gapped, "not finite"), (np.ones((1, 2)), "1 seeds")):
        with pytest.raises(ValueError, match=f"differences.*{message}"):
            max_t_test(bad)
    with pytest.raises(ValueError, match="differences has shape"):
        max_t_test(np.ones(5))


def test_confidence_set_keeps_the_best_and_drops_the_clearly_bad():
    generator = np.random.default_rng(0)
    for i in range(40):
        losses = generator.normal(size=(30, 5)) + generator.normal(size=(30, 1)) + [0, 2, 2, 2, 6]
        assert confidence_set(losses, resamples=300, seed=i) == [0]
    tied = generator.normal(size=(30, 3)) + np.array([0, 0, 3])
    assert confidence_set(tied, resamples=300) == [0, 1]


@pytest.mark.slow
def test_confidence_set_keeps_a_best_column_as_often_as_it_says():
    """Four equal columns at 30 seeds: each is in the set in at least 95 % of 300 simulations, less their error."""
    generator = np.random.default_rng(1)
    kept = [0 in confidence_set(generator.normal(size=(30, 4)), resamples=200, seed=i) for i in range(300)]
    assert np.mean(kept) >= 0.95 - 3 * math.sqrt(0.95 * 0.05 / 300)


def test_confidence_set_keeps_identical_columns_together():
    losses = np.random.default_rng(0).normal(size=(20, 3)) + np.array([0, 4, 0.1])
    doubled = losses[:, [1, 0, 2, 0, 1]]
    doubled[:, 3] *= 1 + 1e-15
    assert confidence_set(doubled) == [1, 2, 3]
    assert confidence_set(doubled) == confidence_set(doubled, seed=0)


def test_confidence_set_without_variance_or_without_seeds():
    assert confidence_set(np.tile([-5.0, -5.0, 0.0], (12, 1))) == [0, 1]
    assert confidence_set(np.zeros((12, 3))) == [0, 1, 2]
    assert confidence_set(np.random.default_rng(0).normal(size=(12, 1))) == [0]
    assert confidence_set(np.tile([0.0, 100.0], (9, 1))) == [0, 1]  # nine seeds cannot tell
    x = np.random.default_rng(0).normal(size=12)
    assert confidence_set(np.column_stack([x, x + 1])) == [0]
    assert set(confidence_set(np.column_stack([x, -x, 0 * x]))) >= {2}  # 0 is exactly the mean of the three
    with pytest.raises(ValueError, match="losses is not finite"):
        confidence_set(np.column_stack([x, np.where(x > 0, np.nan, x)]))


def test_iqm_by_hand():
    assert iqm([100, 1, 2, 3, 4, 5, 6, -50]) == 3.5  # -50, 1 and 6, 100 are cut off
    assert iqm([1, 2, 9]) == 4  # a quarter of three is none
    assert math.isnan(iqm([]))
    with pytest.raises(ValueError, match="values has NaN"):
        iqm([1.0, np.nan])


def test_performance_profile_by_hand():
    assert np.array_equal(performance_profile([0, 10, 10, 30], [0, 5, 10, 11, 31]), [1, 0.75, 0.75, 0.25, 0])
    assert np.isnan(performance_profile([], [0, 1])).all()
    with pytest.raises(ValueError, match="NaN"):
        performance_profile([np.nan], [0])


def test_restricted_mean_time_by_hand():
    """Events at 2 and 6, censored at 4: S = 1 to 2, 2/3 to 6, 0 after; 2 + 4 x 2/3."""
    assert restricted_mean_time([2, 4, 6], [True, False, True], 10) == pytest.approx(2 + 4 * 2 / 3)
    assert restricted_mean_time([2, 4, 6], [True, False, True], 5) == pytest.approx(2 + 3 * 2 / 3)
    # the last time is censored: 2/3 carried from 2 to 10
    assert restricted_mean_time([2, 4, 6], [True, False, False], 10) == pytest.approx(2 + 8 * 2 / 3)
    assert restricted_mean_time([3, 4], [False, False], 10) == pytest.approx(10)


def test_restricted_mean_time_without_censoring_is_the_mean_of_the_restricted_times():
    times = np.random.default_rng(0).exponential(50, size=40).round()
    observed = times < 80  # nothing ends before the horizon unseen
    for horizon in (30, 80):
        assert restricted_mean_time(times, observed, horizon) == pytest.approx(np.minimum(times, horizon).mean())


@pytest.mark.parametrize(
    ("times", "observed", "horizon", "message"),
    [
        ([], [], 5, "times has shape"),
        ([1, 2], [True], 5, "times has shape"),
        ([-1], [True], 5, "times has NaN or a value below 0"),
        ([np.nan], [True], 5, "times has NaN"),
        ([1], [True], 0, "horizon=0"),
        ([1], [True], np.nan, "horizon=nan"),
    ],
)
def test_impossible_times_are_an_error(times, observed, horizon, message):
    with pytest.raises(ValueError, match=message):
        restricted_mean_time(times, observed, horizon)


def test_rank_agreement_by_hand():
    assert rank_agreement([1, 2, 3], [1, 2, 3]) == 1
    assert rank_agreement([1, 2, 3], [3, 2, 1]) == -1
    assert rank_agreement([1, 2, 3, 4], [1, 2, 4, 3]) == pytest.approx(4 / 6)
    assert rank_agreement([1, 2.5, 2.5], [1, 2, 3]) == pytest.approx(2 / math.sqrt(2 * 3))  # tau-b
    assert rank_agreement([1, 2, np.nan], [1, 2, 3]) == 1
    assert math.isnan(rank_agreement([1], [1]))
    assert math.isnan(rank_agreement([1, np.nan], [1, 2]))
    with pytest.raises(ValueError, match="shape"):
        rank_agreement([1, 2], [1])


def test_degenerate_input_emits_no_warning():
    twelve = np.ones(12)
    rare = np.eye(12)[0]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert bca_interval(0.1 * twelve, twelve) == (seed_mean(0.1 * twelve, twelve),) * 2
        assert bca_interval(0 * twelve, twelve) == (0, 0)
        assert bca_interval(0.1 * np.arange(12), np.arange(12)) == pytest.approx((0.1, 0.1))
        assert np.isnan(bca_interval(0 * twelve, 0 * twelve)).all()
        assert bca_interval(rare, twelve)[0] == 0  # one hit among misses
        rank_intervals(np.zeros((12, 3)), np.column_stack([twelve, rare, 0 * twelve]))
        max_t_test(np.column_stack([0 * twelve, twelve, -twelve, rare, 1e-200 * twelve]))
        confidence_set(np.column_stack([0 * twelve, twelve, -twelve, rare, rare]))
        wilson_interval(0, 0), clopper_pearson_interval(0, 0)
        iqm([]), performance_profile([], [1.0]), seed_mean([], [])
        restricted_mean_time([0.0], [True], 1.0), restricted_mean_time([5.0], [False], 1.0)
        rank_agreement([1, 1], [1, 2]), rank_agreement([], [])


def test_the_largest_of_59_keeps_five_percent_with_confidence():
    assert false_alarm_bound(59, 1 / 60) == pytest.approx(1 - 0.05 ** (1 / 59)) == pytest.approx(0.05, abs=5e-4)
    assert false_alarm_bound(59, 0.05) > 0.05
