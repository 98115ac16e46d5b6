"""Thresholds of few twins: by hand, and as often above them as promised where runs are exchangeable."""

import numpy as np
import pytest

from foreshock.analysis.detect.twins import centres, hierarchical_threshold, leave_one_out, pooled_thresholds

CELL = {"a": 1.0, "b": 2.0, "c": 3.0, "d": 4.0, "e": 9.0}


def test_in_a_cell_of_five_the_other_four_set_a_threshold_at_one_in_five():
    limits = leave_one_out(CELL, [*CELL, "failed"], 0.2)
    assert limits == {**dict.fromkeys("abcd", 9.0), "e": 4.0, "failed": 9.0}  # of 5 others ceil(6 x 0.8) = the 5th


def test_a_larger_cell_gives_a_lower_rank_by_hand():
    healthy = {str(i): float(i) for i in range(1, 11)}
    # 9 others: ceil(10 x 0.8) = the 8th smallest
    assert leave_one_out(healthy, ["10", "1"], 0.2) == {"10": 8.0, "1": 9.0}


def test_runs_whose_twins_cannot_support_alpha_get_no_threshold():
    assert leave_one_out(CELL, ["a"], 0.19) == {}
    assert leave_one_out(CELL, ["a", "failed"], 1 / 6) == {"failed": 9.0}


def test_a_run_has_no_part_in_its_own_threshold():
    before = leave_one_out(CELL, ["e"], 0.2)
    assert leave_one_out(CELL | {"e": 1e6}, ["e"], 0.2) == before
    assert centres(CELL | {"e": 1e6}, ["e"]) == {"e": 2.5}


def test_centres_are_medians_of_the_other_twins_by_hand():
    assert centres(CELL, ["a", "c", "failed"]) == {"a": 3.5, "c": 3.0, "failed": 3.0}
    assert centres({"a": 1.0, "b": 2.0}, ["a", "failed"]) == {"failed": 1.5}
    assert centres({"a": 1.0, "b": np.inf, "c": np.inf}, ["a", "b"]) == {}


def test_the_hierarchical_threshold_weighs_cells_alike_by_hand():
    # K = 3 cells weigh 1/4 each, the runs of the first 1/8 each: 1 -> .125, 2 -> .375, 3 -> .625, 8 -> .75
    groups = [[1.0, 8.0], [2.0], [3.0]]
    assert hierarchical_threshold(groups, 0.3) == 8.0
    assert hierarchical_threshold(groups, 0.4) == 3.0
    assert hierarchical_threshold(groups, 0.25) == 8.0
    with pytest.raises(ValueError, match=r"3 other cells cannot support alpha=0.2: the smallest is 0.25"):
        hierarchical_threshold(groups, 0.2)
    with pytest.raises(ValueError, match="alpha=1 is not allowed"):
        hierarchical_threshold(groups, 1)
    with pytest.raises(ValueError, match="no healthy run"):
        hierarchical_threshold([[1.0], []], 0.5)


def test_one_run_a_cell_is_split_conformal():
    scores = np.random.default_rng(0).normal(size=19)
    assert hierarchical_threshold([[score] for score in scores], 0.05) == scores.max()
    assert hierarchical_threshold([[score] for score in scores], 0.10) == np.sort(scores)[17]


def test_pooled_thresholds_by_hand():
    # x gives 1 - 2.5, 2 - 2, 3 - 1.5 and y 11 - 14, 13 - 13, 15 - 12. Each weighs 1/9: 0.6 is reached at the sixth, 3,
    # 0.5 at the fifth, 1.5. The twins of v have median 8, those of the failed run 7.
    x, y, z = ({"p": 1.0, "q": 2.0, "r": 3.0}, {"s": 11.0, "t": 13.0, "u": 15.0}, {"v": 5.0, "w": 7.0, "h": 9.0})
    cells, judged = {"x": x, "y": y, "z": z}, {"z": ["v", "failed"]}
    assert pooled_thresholds(cells, judged, 0.4) == {"v": 8.0 + 3.0, "failed": 7.0 + 3.0}
    assert pooled_thresholds(cells, judged, 0.5) == {"v": 8.0 + 1.5, "failed": 7.0 + 1.5}


def test_the_own_cell_has_no_part_in_what_is_added():
    generator = np.random.default_rng(1)
    cells = {str(c): {f"{c}-{i}": float(x) for i, x in enumerate(generator.normal(size=4))} for c in range(25)}
    before = pooled_thresholds(cells, {"0": ["failed"]}, 0.05)["failed"]
    moved = {**cells, "0": {run: x + 100 for run, x in cells["0"].items()}}
    assert pooled_thresholds(moved, {"0": ["failed"]}, 0.05)["failed"] == pytest.approx(before + 100)


def exchangeable_cells(generator, count, twins):
    """Path maxima of healthy runs; cells differ in level and in spread, and runs have heavy tails."""
    levels, spreads = generator.normal(0, 10, count), generator.lognormal(0, 0.7, count)
    maxima = levels[:, None] + spreads[:, None] * generator.standard_t(3, (count, twins))
    return {str(c): {f"{c}-{i}": float(x) for i, x in enumerate(row)} for c, row in enumerate(maxima)}


def mean_and_error(shares):
    return np.mean(shares), np.std(shares, ddof=1) / np.sqrt(len(shares))


@pytest.mark.parametrize(("twins", "alpha"), [(5, 0.2), (10, 0.1), (12, 0.25)])
def test_leave_one_out_keeps_its_rate_over_exchangeable_runs(twins, alpha):
    generator, shares = np.random.default_rng(twins), []
    for _ in range(2000):
        maxima = {str(i): float(x) for i, x in enumerate(generator.standard_t(3, twins))}
        limits = leave_one_out(maxima, list(maxima), alpha)
        above = [maxima[run] > limits[run] for run in maxima]
        assert sum(above) <= alpha * twins  # in one cell it is so by construction
        shares.append(above[0])  # and of one run it is true over cells
    mean, error = mean_and_error(shares)
    assert mean <= alpha + 3 * error
    assert mean > alpha / 2  # and it is no empty promise


def test_pooled_thresholds_keep_their_rate_over_exchangeable_cells():
    generator, shares, alpha = np.random.default_rng(2), [], 0.05
    for _ in range(100):
        cells = exchangeable_cells(generator, 25, 5)
        limits = pooled_thresholds(cells, {cell: list(runs) for cell, runs in cells.items()}, alpha)
        shares.append(np.mean([runs[run] > limits[run] for runs in cells.values() for run in runs]))
    mean, error = mean_and_error(shares)
    assert mean <= alpha + 3 * error
    assert mean > alpha / 5  # of 24 other cells the weight at infinity is 4 % of the 5


def test_permuted_failures_are_detected_no_more_often_than_alpha():
    """Healthy runs that are called failures at random: nobody can detect them beyond chance."""
    generator, in_cell, pooled = np.random.default_rng(3), [], []
    for _ in range(100):
        cells = exchangeable_cells(generator, 25, 6)
        healthy, called = {}, {}
        for cell, runs in cells.items():
            failed = generator.choice(list(runs))
            called[cell] = (failed, runs[failed])
            healthy[cell] = {run: x for run, x in runs.items() if run != failed}
        own = {c: leave_one_out(healthy[c], [run], 0.2)[run] for c, (run, _) in called.items()}
        others = pooled_thresholds(healthy, {c: [run] for c, (run, _) in called.items()}, 0.05)
        in_cell.append(np.mean([x > own[c] for c, (_, x) in called.items()]))
        pooled.append(np.mean([x > others[run] for run, x in called.values()]))
        assert all(limit < 1e6 for limit in (*own.values(), *others.values()))  # a real failure would be detected
    for shares, alpha in ((in_cell, 0.2), (pooled, 0.05)):
        mean, error = mean_and_error(shares)
        assert mean <= alpha + 3 * error
