"""Ranks and intervals over faults and seeds: weights, coverage, who is possibly best, and when there is none of it."""

import numpy as np
import pytest

from foreshock.analysis.scores.overall import MIN_FAULTS, Shares, fault_weights, overall, possibly_best


def drawn(generator, *, faults=12, seeds=30, detectors=1, better=0.0, of_fault=0.15, of_seed=0.05, weights=None):
    """Shares with effects of faults and of seeds that detectors have in common, and noise; the last one is better."""
    mean = 0.5 + of_fault * generator.normal(size=(faults, 1, 1)) + of_seed * generator.normal(size=(1, seeds, 1))
    noise = 0.1 * generator.normal(size=(faults, seeds, detectors)) + 0.05 * generator.normal(
        size=(faults, 1, detectors)
    )
    lead = better * (np.arange(detectors) == detectors - 1)
    weights = np.full(faults, 1 / faults) if weights is None else weights
    return Shares(mean + noise + lead, np.ones((faults, seeds, detectors)), weights)


def test_faults_weigh_alike_within_a_family_and_families_alike():
    assert fault_weights(["a", "a", "b", "b", "b", "b"]) == pytest.approx([1 / 4] * 2 + [1 / 8] * 4)
    pooled = fault_weights(["a", "a", "b", "c", "d"])  # three families of one fault are one
    assert pooled == pytest.approx([1 / 4] * 2 + [1 / 6] * 3)
    assert fault_weights(["a", "b"]) == pytest.approx([1 / 2] * 2)
    assert fault_weights(["a", "a", "a"]) == pytest.approx([1 / 3] * 3)


def test_a_share_is_the_weighted_mean_over_faults_whatever_their_numbers_of_runs():
    totals = np.array([[[1.0], [1.0]], [[0.2], [0.0]]])  # fault 0: 1, 1; fault 1: 0.2 and a seed that does not diverge
    counts = np.array([[[1.0], [1.0]], [[1.0], [0.0]]])
    shares = Shares(totals, counts, np.array([0.25, 0.75]))
    assert shares.mean_D() == pytest.approx([0.25 + 0.75 * 0.2])
    assert shares.by_seed_SD().ravel() == pytest.approx([0.4, 1.0])  # the second seed has one diverging fault
    missing = Shares(totals, np.array([[[1.0], [1.0]], [[0.0], [0.0]]]) * 1.0, shares.weights_F)
    assert np.isnan(missing.mean_D()).all()


def test_intervals_over_faults_and_seeds_cover():
    """Of 200 constructed sets with family weights, nominal 95 %: 4 standard errors are 6 %; too wide is allowed."""
    generator, hits = np.random.default_rng(0), 0
    weights = fault_weights(["a"] * 4 + ["b"] * 4 + ["c", "d", "e", "f"])
    for _ in range(200):
        low, high = overall(drawn(generator, weights=weights), resamples=400).share_D3[0, 1:]
        hits += low <= 0.5 <= high
    assert 0.89 <= hits / 200 <= 1.0


def test_seeds_alone_would_be_far_too_narrow():
    """The same intervals must be as wide as the faults differ: a bootstrap of seeds would have a fifth of it."""
    shares = drawn(np.random.default_rng(3), of_fault=0.3, of_seed=0.0)
    _, low, high = overall(shares, resamples=2000).share_D3[0]
    faults = shares.totals_FSD.mean(axis=(1, 2))
    expected = 2 * 2.2 * faults.std(ddof=1) / np.sqrt(len(faults))  # t of 11 degrees of freedom
    assert 0.8 * expected < high - low < 1.2 * expected


def test_a_clear_winner_is_first_and_alone_and_twins_are_not_told_apart():
    shares = drawn(np.random.default_rng(1), detectors=5, better=0.3)
    found = overall(shares, resamples=1000)
    assert found.rank_D3[4].tolist() == [1, 1, 1] and found.best == [4]
    assert (found.rank_D3[:4, 2] >= found.rank_D3[:4, 1]).all()
    twins = Shares(
        *(np.concatenate((part, part), axis=2) for part in (shares.totals_FSD, shares.counts_FSD)), shares.weights_F
    )
    assert overall(twins, resamples=1000).best == [4, 9]
    assert overall(twins, resamples=1000).rank_D3[[4, 9], 0].tolist() == [1.5, 1.5]


def test_equal_detectors_mostly_stay_possibly_best():
    generator, kept = np.random.default_rng(2), 0
    for _ in range(40):
        shares = drawn(generator, detectors=4)
        kept += len(overall(shares, resamples=400).best) == 4
    assert kept >= 34  # 5 % go by chance: 2 of 40, and 34 is 3 standard errors from it


def test_a_gap_that_no_replicate_changes_is_sure():
    assert possibly_best([0.5, 0.4], np.array([[0.5, 0.4]] * 50) + np.linspace(-0.1, 0.1, 50)[:, None]) == [0]


def test_under_eight_faults_there_is_no_ranking():
    assert MIN_FAULTS == 8
    with pytest.raises(ValueError, match="7 diverging faults: an overall ranking needs at least 8"):
        overall(drawn(np.random.default_rng(0), faults=7))
    assert np.isfinite(overall(drawn(np.random.default_rng(0), faults=8), resamples=200).share_D3).all()


def test_under_ten_seeds_there_are_ranks_and_no_intervals():
    found = overall(drawn(np.random.default_rng(0), seeds=9, detectors=3))
    assert np.isfinite(found.rank_D3[:, 0]).all() and np.isnan(found.rank_D3[:, 1:]).all()
    assert np.isnan(found.share_D3[:, 1:]).all() and found.best == [0, 1, 2]


def test_who_lacks_a_fault_is_refused():
    shares = drawn(np.random.default_rng(0), detectors=2)
    shares.counts_FSD[3, :, 1] = shares.totals_FSD[3, :, 1] = 0
    with pytest.raises(ValueError, match="no run of some fault"):
        overall(shares)
