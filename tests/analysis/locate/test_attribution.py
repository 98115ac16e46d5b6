import math

import numpy as np
import pandas as pd
import pytest
from scipy.stats import kstest
from sklearn.model_selection import LeaveOneGroupOut
from sklearn.naive_bayes import BernoulliNB

from foreshock.analysis.locate.attribution import (
    PEAK_POWER,
    _named,
    alarm_probabilities,
    alarm_sets,
    cross_talk,
    diagnose,
    seed_folds,
    selectivity,
)


def table(*runs):
    """(seed, fault, {detector: outcome}) a run -> the tidy table."""
    return pd.DataFrame(
        [
            (f"run{i}", seed, fault, detector, outcome)
            for i, (seed, fault, outcomes) in enumerate(runs)
            for detector, outcome in outcomes.items()
        ],
        columns=["run_id", "seed", "fault", "detector", "outcome"],
    )


def run(seed, fault, alarms):
    """A run whose detectors d0, d1, ... alarm in time where ``alarms`` is true."""
    raised = "false_alarm" if fault == "healthy" else "lead"
    return seed, fault, {f"d{m}": raised if alarm else "quiet" for m, alarm in enumerate(alarms)}


def perfect(seeds=range(4), healthy=range(100, 104)):
    """d0 answers lr alone, d1 sdc alone; nothing answers healthy runs."""
    faulty = [run(seed, fault, alarms) for seed in seeds for fault, alarms in (("lr", (1, 0)), ("sdc", (0, 1)))]
    return table(*faulty, *(run(seed, "healthy", (0, 0)) for seed in healthy))


def random_table(generator, *, seeds=2, repeats=8, detectors=4):
    """Alarms drawn alike for healthy runs and two faults."""
    return table(
        *(
            run(seed + 100 * (fault == "healthy"), fault, generator.random(detectors) < 0.5)
            for seed in range(seeds)
            for fault in ("lr", "sdc", "healthy")
            for _ in range(repeats)
        )
    )


@pytest.mark.parametrize(
    ("fault", "outcome", "counts"),
    [
        ("lr", "lead", 1),
        ("lr", "benign_alarm", 1),
        ("lr", "late", 0),
        ("lr", "missed", 0),
        ("lr", "false_alarm", 0),
        ("lr", "quiet", 0),
        ("healthy", "false_alarm", 1),
        ("healthy", "quiet", 0),
        ("healthy", "missed", 0),
    ],
)
def test_which_outcomes_are_alarms_in_time(fault, outcome, counts):
    assert alarm_probabilities(table((0, fault, {"d": outcome}))).loc["d", fault] == counts


def test_probabilities_are_shares_of_each_faults_runs():
    outcomes = table(
        (0, "sdc", {"z": "lead", "a": "quiet"}),
        (1, "sdc", {"z": "late", "a": "benign_alarm"}),
        (0, "lr", {"z": "missed", "a": "lead"}),
        (100, "healthy", {"z": "false_alarm", "a": "quiet"}),
        (101, "healthy", {"z": "quiet", "a": "quiet"}),
    )
    expected = pd.DataFrame([[0.5, 0.5, 0.0], [0.0, 0.5, 1.0]], ["z", "a"], ["healthy", "sdc", "lr"])
    pd.testing.assert_frame_equal(alarm_probabilities(outcomes), expected, check_names=False)


def test_the_healthy_column_is_nan_without_healthy_runs():
    probabilities = alarm_probabilities(table((0, "lr", {"d": "lead"})))
    assert list(probabilities) == ["healthy", "lr"]
    assert math.isnan(probabilities.loc["d", "healthy"])


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ((0.0, 1.0, 0.0, 0.0), 1.0),
        ((0.0, 0.7, 0.7, 0.7), 0.0),
        ((0.0, 0.8, 0.4, 0.0), 0.75),
        ((1.0, PEAK_POWER, 0.0, 0.0), 1.0),  # the healthy column neither is a peak nor counts as a fault
        ((0.0, 0.19, 0.0, 0.0), np.nan),
        ((0.0, 0.0, 0.0, 0.0), np.nan),
        ((0.0, 0.8, np.nan, 0.0), np.nan),
    ],
)
def test_selectivity_closed_form(row, expected):
    probabilities = pd.DataFrame([row], ["d"], ["healthy", "lr", "sdc", "batch"])
    np.testing.assert_allclose(selectivity(probabilities), [expected])


def test_selectivity_of_one_fault_is_undefined():
    assert selectivity(pd.DataFrame({"healthy": [0.0], "lr": [1.0]}, ["d"])).isna().all()


def test_cross_talk_is_the_mean_over_a_familys_detectors():
    probabilities = pd.DataFrame(
        [[0.1, 1.0, 0.0], [0.1, 0.5, np.nan], [0.0, 0.0, 0.6], [0.9, 0.9, 0.9]],
        ["r1", "r2", "c1", "null"],
        ["healthy", "lr", "sdc"],
    )
    result = cross_talk(probabilities, {"r1": "router", "r2": "router", "c1": "conservation"}, {"router": ["lr"]})
    expected = pd.DataFrame(
        [
            ("router", "lr", 0.75, True, 2),
            ("router", "sdc", 0.0, False, 1),
            ("conservation", "lr", 0.0, False, 1),
            ("conservation", "sdc", 0.6, False, 1),
        ],
        columns=["family", "fault", "probability", "designed", "detectors"],
    )
    pd.testing.assert_frame_equal(result, expected)


def test_alarm_sets_are_runs_by_detectors():
    outcomes = table(
        (3, "sdc", {"z": "lead", "a": "late"}),
        (3, "lr", {"z": "false_alarm", "a": "benign_alarm"}),
        (100, "healthy", {"z": "quiet", "a": "false_alarm"}),
    )
    alarms, faults, seeds, run_ids = alarm_sets(outcomes)
    assert alarms.dtype == bool
    np.testing.assert_array_equal(alarms, [[1, 0], [0, 1], [0, 1]])
    assert faults.tolist() == ["sdc", "lr", "healthy"]
    assert seeds.tolist() == [3, 3, 100]
    assert run_ids.tolist() == ["run0", "run1", "run2"]


def test_alarm_sets_do_not_depend_on_the_order_of_rows_within_runs():
    outcomes = perfect()
    shuffled = outcomes.sort_values("detector", ascending=False, kind="stable")
    for one, other in zip(alarm_sets(outcomes, ["d1"]), alarm_sets(shuffled, ["d1"]), strict=True):
        np.testing.assert_array_equal(one, other)


def test_folds_keep_a_seed_whole_and_deal_healthy_runs_over_them():
    seeds = np.array([7, 5, 7, 9, 100, 101, 102, 103, 101])
    faults = np.array(["lr", "lr", "sdc", "sdc", *["healthy"] * 5], dtype=object)
    assert seed_folds(seeds, faults).tolist() == [1, 0, 1, 2, 0, 1, 2, 0, 1]


def test_one_detector_a_fault_names_every_run():
    result = diagnose(perfect(), permutations=19)
    classes = ["healthy", "lr", "sdc"]
    assert [list(result.confusion.index), list(result.confusion.columns)] == [classes, classes]
    np.testing.assert_array_equal(result.confusion, 4 * np.eye(3))
    assert (result.accuracy, result.p_value) == (1.0, 1 / 20)
    assert (result.predictions["named"] == result.predictions["fault"]).all()


def test_predictions_and_confusion_have_the_true_fault_first():
    outcomes = table(
        *(run(seed, fault, (fault == "lr",)) for seed in range(5) for fault in ("lr", "sdc")),
        run(5, "sdc", (1,)),
    )
    result = diagnose(outcomes, permutations=1)
    np.testing.assert_array_equal(result.confusion, [[5, 0], [1, 5]])
    assert result.predictions.iloc[-1].tolist() == ["run10", "sdc", "lr"]


def test_accuracy_is_the_mean_recall_whatever_the_class_sizes():
    outcomes = table(
        *(run(seed, "lr", (1,)) for seed in range(3)),
        *(run(seed, "sdc", (0,)) for seed in range(3) for _ in range(8)),
        run(0, "lr", (0,)),
    )
    assert diagnose(outcomes, permutations=1).accuracy == pytest.approx((3 / 4 + 1) / 2)


def test_a_rare_fault_is_as_likely_as_a_common_one():
    outcomes = table(
        *(run(seed, "sdc", (i % 2,)) for seed in range(3) for i in range(8)),
        *(run(seed, "lr", (1,)) for seed in range(3)),
    )
    assert diagnose(outcomes, permutations=1).confusion.loc["lr", "lr"] == 3


def test_only_the_named_detectors_are_used():
    assert diagnose(perfect(), detectors=["d0"], permutations=1).confusion.loc["sdc", "sdc"] == 0


def test_a_run_without_an_alarm_is_named_healthy():
    """sdc raises no alarm either, and healthy runs do half the time: the likelihood alone would name it sdc."""
    outcomes = table(
        *(run(seed, fault, (fault == "lr",)) for seed in range(4) for fault in ("lr", "sdc")),
        *(run(100 + seed, "healthy", (seed % 2,)) for seed in range(4)),
    )
    assert diagnose(outcomes, permutations=1).confusion.loc["sdc", "healthy"] == 4


def test_without_healthy_runs_a_silent_run_is_named_by_likelihood():
    outcomes = table(*(run(seed, fault, (fault == "lr",)) for seed in range(4) for fault in ("lr", "sdc")))
    assert diagnose(outcomes, permutations=1).accuracy == 1.0


def test_alarms_that_encode_only_the_seed_name_no_fault():
    """Each seed has each fault once, so a classifier that saw the seed's other runs would do worse than chance."""
    bits = [[seed >> bit & 1 for bit in range(3)] for seed in range(8)]
    outcomes = table(*(run(seed, fault, bits[seed]) for seed in range(8) for fault in ("lr", "sdc", "batch")))
    result = diagnose(outcomes, permutations=9)
    assert (result.accuracy, result.p_value) == (pytest.approx(1 / 3), 1.0)


def test_a_fault_confined_to_its_own_seeds_has_no_evidence():
    """Permuting within a fold that holds one fault changes nothing: the null equals the observed accuracy."""
    outcomes = table(*(run(seed, "lr" if seed < 3 else "sdc", (seed < 3,)) for seed in range(6)))
    assert diagnose(outcomes, permutations=9).p_value == 1.0


@pytest.mark.slow
def test_alarms_that_ignore_the_fault_give_uniform_p_values_and_chance_accuracy():
    generator = np.random.default_rng(3)
    results = [diagnose(random_table(generator), permutations=39, seed=i) for i in range(60)]
    assert kstest([result.p_value for result in results], "uniform").pvalue > 0.05
    assert np.mean([result.accuracy for result in results]) == pytest.approx(1 / 3, abs=0.03)
    assert np.mean([result.null_accuracy for result in results]) == pytest.approx(1 / 3, abs=0.01)


def test_the_same_seed_draws_the_same_null():
    outcomes = random_table(np.random.default_rng(0))
    one, other = (diagnose(outcomes, permutations=5, seed=1) for _ in range(2))
    assert (one.null_accuracy, one.p_value) == (other.null_accuracy, other.p_value)


@pytest.mark.parametrize(
    ("outcomes", "options", "message"),
    [
        (table(*(run(seed, "lr", (1,)) for seed in range(3))), {}, "needs at least 2"),
        (perfect(seeds=[0]), {}, "needs 2 faulty seeds"),
        (perfect(), {"permutations": 0}, "permutations=0 must be at least 1"),
        (perfect(), {"detectors": ["d0", "d7"]}, "detectors="),
        (perfect(), {"detectors": []}, "at least one detector"),
        (perfect().iloc[:-1], {}, "run_id='run11' has no outcome for detector 'd1'"),
        (perfect().assign(seed=range(24)), {}, "run_id='run0' has more than one seed or fault"),
    ],
)
def test_what_cannot_be_diagnosed_is_an_error(outcomes, options, message):
    with pytest.raises(ValueError, match=message):
        diagnose(outcomes, **options)


@pytest.mark.parametrize(
    ("outcomes", "message"),
    [
        (perfect().drop(columns="seed"), r"lacks the columns \['seed'\]"),
        (perfect().replace("quiet", "silent"), "outcome='silent' must be one of"),
        (pd.concat([perfect(), perfect().head(1)]), "run_id='run0' has two outcomes for detector 'd0'"),
    ],
)
def test_a_malformed_table_is_an_error(outcomes, message):
    with pytest.raises(ValueError, match=message):
        alarm_probabilities(outcomes)


def test_the_counts_name_what_scikit_learns_classifier_names():
    generator = np.random.default_rng(3)
    folds, labels = np.repeat(np.arange(6), 9), generator.integers(0, 4, 54)
    alarms = generator.random((54, 7)) < 0.2 + 0.15 * labels[:, None]
    splits = list(LeaveOneGroupOut().split(alarms, labels, folds))
    expected = np.empty_like(labels)
    for train, test in splits:
        model = BernoulliNB(alpha=1.0, fit_prior=False, binarize=None).fit(alarms[train], labels[train])
        expected[test] = model.predict(alarms[test])
    assert np.array_equal(_named(alarms, labels, splits, np.zeros(54, bool)), expected)
