"""Which fault an alarm speaks for: alarm probabilities, selectivity, cross-talk, and the fault named from alarms alone.

Every function takes, or derives from, one tidy table ``outcomes``: one row a run and detector, columns run_id, seed
(int), fault (``healthy`` for healthy test runs), detector, outcome (``scores.outcome``). An alarm counts if it is in
time: from onset and before divergence, or the run's end (``lead``, ``benign_alarm``); in a healthy run, any alarm.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from sklearn.metrics import balanced_accuracy_score, confusion_matrix
from sklearn.model_selection import LeaveOneGroupOut

from foreshock.analysis.runs.experiment import HEALTHY
from foreshock.analysis.scores.outcome import IN_TIME, OUTCOMES

PEAK_POWER = 0.20
COLUMNS = ("run_id", "seed", "fault", "detector", "outcome")
Splits = Sequence[tuple[NDArray[np.intp], NDArray[np.intp]]]


@dataclass(frozen=True)
class Diagnosis:
    """Faults named from the sets of alarms alone, each run by a classifier that saw no run of its seed.

    confusion: counts [classes, classes], rows the true fault, columns the named one, healthy first. accuracy: mean of
    the per-fault recalls, in [0, 1]. null_accuracy: its mean over label permutations, about 1/classes. p_value:
    (1 + #(null >= accuracy)) / (1 + permutations). predictions: columns run_id, fault, named; one row a run.
    """

    confusion: pd.DataFrame
    accuracy: float
    null_accuracy: float
    p_value: float
    predictions: pd.DataFrame


def alarm_probabilities(outcomes: pd.DataFrame) -> pd.DataFrame:
    """P[detector, fault]: share of the fault's runs with an alarm in time, each in [0, 1].

    Rows and columns in order of first appearance, but the first column is ``healthy``: the share of healthy runs with
    any alarm, NaN without healthy runs. NaN where a detector has no run of a fault. Raises ValueError for a missing
    column, an unknown outcome, or a second row of one run and detector.
    """
    _check(outcomes)
    shares = _in_time(outcomes).groupby([outcomes["detector"], outcomes["fault"]]).mean().unstack()
    return shares.reindex(index=outcomes["detector"].unique(), columns=[HEALTHY, *_faults(outcomes["fault"])])


def selectivity(probabilities: pd.DataFrame) -> pd.Series:
    """sum_f (1 - P_mf / max_f P_mf) / (F - 1) of each detector m over the F faults, ``healthy`` left out.

    In [0, 1]: 1 alarms for one fault only, 0 for all alike. NaN where the peak max_f P_mf is under ``PEAK_POWER``, for
    fewer than two faults, and where a probability is NaN.
    """
    faults = probabilities.drop(columns=HEALTHY, errors="ignore")
    count = faults.shape[1]
    peak = faults.max(axis=1, skipna=False)
    falls = (1 - faults.div(peak, axis=0)).sum(axis=1, skipna=False)
    return (falls / max(count - 1, 1)).where((peak >= PEAK_POWER) & (count > 1)).rename("selectivity")


def cross_talk(
    probabilities: pd.DataFrame, family_of: Mapping[str, str], designed_for: Mapping[str, Collection[str]]
) -> pd.DataFrame:
    """X[g, f] = mean of P[m, f] over the detectors m of family g, as a tidy table with one row a family and fault.

    Columns family, fault, probability, designed (``designed_for`` gives the fault to the family: on the diagonal), and
    detectors, how many entered the mean. A detector that ``family_of`` lacks (a control row) enters no family; NaN
    probabilities are skipped, and the mean of none is NaN. The ``healthy`` column is left out.
    """
    faults = probabilities.drop(columns=HEALTHY, errors="ignore")
    rows = [
        (family, fault, column.mean(), fault in designed_for.get(family, ()), column.count())
        for family, members in faults.groupby(dict(family_of), sort=False)
        for fault, column in members.items()
    ]
    return pd.DataFrame(rows, columns=["family", "fault", "probability", "designed", "detectors"])


def alarm_sets(
    outcomes: pd.DataFrame, detectors: Sequence[str] | None = None
) -> tuple[NDArray[np.bool_], NDArray[np.object_], NDArray[np.int_], NDArray[np.object_]]:
    """The set of alarms of each run: X [runs, detectors] of alarms in time, and y [runs] faults, seeds, run_ids.

    Runs in order of first appearance; columns as in ``detectors``, by default all in order of first appearance. Raises
    ValueError as ``alarm_probabilities`` does, for no or unknown detectors, and for a run without one of them.
    """
    _check(outcomes)
    names = list(outcomes["detector"].unique() if detectors is None else detectors)
    known = set(outcomes["detector"])
    if not names or not known.issuperset(names):
        raise ValueError(f"detectors={names} must name at least one detector, each of {sorted(known)}")
    runs = outcomes[["run_id", "seed", "fault"]].drop_duplicates()
    if runs["run_id"].duplicated().any():
        name = runs.loc[runs["run_id"].duplicated(), "run_id"].iloc[0]
        raise ValueError(f"run_id={name!r} has more than one seed or fault; a run has one of each")
    index = pd.MultiIndex.from_frame(outcomes[["run_id", "detector"]])
    table = pd.Series(_in_time(outcomes).to_numpy(float), index).unstack().reindex(index=runs["run_id"], columns=names)
    if table.isna().to_numpy().any():
        name, detector = table.isna().stack().idxmax()
        raise ValueError(f"run_id={name!r} has no outcome for detector {detector!r}; every run needs one")
    return table.to_numpy(bool), *(runs[name].to_numpy() for name in ("fault", "seed", "run_id"))


def seed_folds(seeds: NDArray[np.int_], faults: NDArray[np.object_]) -> NDArray[np.intp]:
    """Fold [runs] of each run: the rank of its seed among those of faulty runs, so that a seed is never in two folds.

    Healthy test runs have seeds of their own: they are dealt in order over the same folds, so none is only healthy.
    """
    healthy = np.asarray(faults) == HEALTHY
    folds = {seed: rank for rank, seed in enumerate(np.unique(seeds[~healthy]))}
    count = len(folds)
    for rank, seed in enumerate(np.unique(seeds[healthy])):
        folds.setdefault(seed, rank % max(count, 1))
    return np.array([folds[seed] for seed in seeds], dtype=np.intp)


def diagnose(
    outcomes: pd.DataFrame, *, detectors: Sequence[str] | None = None, permutations: int = 200, seed: int = 0
) -> Diagnosis:
    """Names each run's fault from its set of alarms alone, leaving out the runs of its seed.

    Bernoulli naive Bayes: argmax_f sum_m log P(x_m | f), with P(x_m = 1 | f) = (alarms + 1) / (runs + 2) over the other
    folds of ``seed_folds`` and a uniform prior, faults being equally likely by design. Ties go to the first class:
    healthy, then the faults in order of first appearance. Without any alarm there is nothing to name: such a run is
    named healthy if that is among the classes. A fault seen in one fold only can never be named.
    The null permutes the faults over the runs of a fold and repeats the whole leave-one-seed-out; ``seed`` draws it.
    Raises ValueError as ``alarm_sets`` does, for fewer than 2 classes or 2 folds, and for ``permutations`` under 1.
    """
    alarms, truth, seeds, run_ids = alarm_sets(outcomes, detectors)
    classes = [HEALTHY] * (HEALTHY in truth) + _faults(truth)
    if len(classes) < 2:
        raise ValueError(f"fault has the classes {classes}; a diagnosis needs at least 2")
    folds = seed_folds(seeds, truth)
    if folds.max() < 1:
        raise ValueError(f"seed={np.unique(seeds).tolist()} gives 1 fold; leave-one-seed-out needs 2 faulty seeds")
    if permutations < 1:
        raise ValueError(f"permutations={permutations} must be at least 1")
    labels = pd.Index(classes).get_indexer(truth)
    splits = list(LeaveOneGroupOut().split(alarms, labels, folds))
    silent = ~np.any(alarms, axis=1) & (HEALTHY in classes)
    generator = np.random.default_rng(seed)
    named = _named(alarms, labels, splits, silent)
    accuracy = float(balanced_accuracy_score(labels, named))
    null = np.empty(permutations)
    for i in range(permutations):
        permuted = labels.copy()
        for _, fold in splits:
            permuted[fold] = generator.permutation(labels[fold])
        null[i] = balanced_accuracy_score(permuted, _named(alarms, permuted, splits, silent))
    return Diagnosis(
        confusion=pd.DataFrame(
            confusion_matrix(labels, named, labels=range(len(classes))),
            index=pd.Index(classes, name="fault"),
            columns=pd.Index(classes, name="named"),
        ),
        accuracy=accuracy,
        null_accuracy=float(null.mean()),
        # the same recalls in another order may sum to one rounding less: that is a tie, and ties count
        p_value=float((1 + np.sum(null >= accuracy - 1e-12)) / (1 + permutations)),
        predictions=pd.DataFrame({"run_id": run_ids, "fault": truth, "named": np.array(classes, dtype=object)[named]}),
    )


def _named(
    alarms: NDArray[np.bool_], labels: NDArray[np.intp], splits: Splits, silent: NDArray[np.bool_]
) -> NDArray[np.intp]:
    """The class [runs] that the runs outside its fold give each run; class 0 for the ``silent``.

    What scikit-learn's ``BernoulliNB(fit_prior=False)`` names, without thousands of its fits: counts are subtracted.
    """
    member_RC = np.eye(labels.max() + 1)[labels]
    x_RM = alarms.astype(float)
    alarms_CM, runs_C = member_RC.T @ x_RM, member_RC.sum(0)
    named = np.empty_like(labels)
    for _, test in splits:
        runs = (runs_C - member_RC[test].sum(0))[:, None]
        share_CM = (alarms_CM - member_RC[test].T @ x_RM[test] + 1) / (runs + 2)
        likelihood = x_RM[test] @ np.log(share_CM).T + (1 - x_RM[test]) @ np.log1p(-share_CM).T
        named[test] = np.where(runs.T > 0, likelihood, -np.inf).argmax(1)
    return np.where(silent, 0, named)


def _in_time(outcomes: pd.DataFrame) -> pd.Series:
    healthy = outcomes["fault"] == HEALTHY
    return outcomes["outcome"].isin(IN_TIME).mask(healthy, outcomes["outcome"] == "false_alarm")


def _faults(names: pd.Series | NDArray[np.object_]) -> list[str]:
    """The faults in order of first appearance, without ``healthy``."""
    return [name for name in pd.unique(names) if name != HEALTHY]


def _check(outcomes: pd.DataFrame) -> None:
    if missing := [name for name in COLUMNS if name not in outcomes.columns]:
        raise ValueError(f"outcomes lacks the columns {missing}; it needs {list(COLUMNS)}")
    if unknown := sorted(set(outcomes["outcome"]) - set(OUTCOMES), key=str):
        raise ValueError(f"outcome={unknown[0]!r} must be one of {OUTCOMES}")
    if (twice := outcomes.duplicated(["run_id", "detector"])).any():
        run, detector = outcomes.loc[twice, ["run_id", "detector"]].iloc[0]
        raise ValueError(f"run_id={run!r} has two outcomes for detector {detector!r}; one row a run and detector")
