"""Where the fault sits, in every run of an experiment: what ``analysis.locate.naming`` names, held against the truth.

A level is the logarithm of a law's statistic, 0 at its median over the reference runs and 1 at the largest that it
reached in any of them, so that every law pays for its own tail: a wild law must not blind the others. Its threshold is
conformal: on the largest level of each calibration run, over laws, layers, heads and readings. One rank serves all, for
n runs support 1 / (n + 1) in all, with nothing to share out. No faulty run sets anything.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd

from foreshock.analysis.detect.alarms import conformal_threshold
from foreshock.analysis.detect.bands import DeclinedSignal
from foreshock.analysis.detect.detection import Detection
from foreshock.analysis.locate.fault_truth import HEALTHY, OTHER, Truth, truth_of
from foreshock.analysis.locate.laws import CLASSES, INPUTS
from foreshock.analysis.locate.naming import NO_ALARM, Levels, Verdict, name_site, rolling_rms
from foreshock.analysis.runs.experiment import Experiment, ScoredRun
from foreshock.analysis.scores.inference import clopper_pearson_interval
from foreshock.experiments.trace import TraceError


@dataclass(frozen=True)
class Localisation:
    """Every faulty and healthy test run with what is true of it and what was named.

    table: one row a run, columns as in ``_row``; threshold: of the level; declined: by signal, why it takes no part.
    """

    table: pd.DataFrame
    threshold: float
    declined: Mapping[str, str]


def localise(experiment: Experiment) -> Localisation:
    """Name the place of the fault in every faulty and healthy test run.

    Raises ValueError where no law has a ratio to noise, calibration runs are too few for alpha, or one is not finite.
    """
    statistics, declined = _statistics(experiment)
    if not statistics:
        raise ValueError("localisation needs a conservation law over its predicted noise: no run has one")
    by_run = {run.trace.run_id: [levels[run.trace.run_id] for levels in statistics.values()] for run in experiment.runs}
    maxima = [_largest(by_run[run.trace.run_id]) for run in experiment.of("calibration")]
    threshold = conformal_threshold(maxima, experiment.alpha)
    if not np.isfinite(threshold):
        raise ValueError("localisation: a calibration run is not finite")
    rows = [_row(run, name_site(by_run[run.trace.run_id], threshold)) for run in experiment.of("faulty", "test")]
    table = pd.DataFrame(rows)
    for column in ("alarm_step", "verdict_step", "named_layer", "named_head"):
        table[column] = table[column].astype("Int64")
    for column in ("class_right", "part_right", "layer_right", "head_right"):
        table[column] = table[column].astype("boolean")
    return Localisation(table, threshold, declined)


def _largest(signals: Sequence[Levels]) -> float:
    return float(np.nanmax(np.concatenate([signal.level.ravel() for signal in signals]), initial=-np.inf))


def _statistics(experiment: Experiment) -> tuple[dict[str, dict[str, Levels]], dict[str, str]]:
    """By signal and run, its levels; and what has none."""
    detection = Detection(experiment)
    statistics, declined = {}, {}
    for signal, described in experiment.signals.items():
        if described.law is None or not any(signal in run.trace.signals for run in experiment.runs):
            continue  # a law of a part that this model does not have
        try:
            rms = {run: (series.positions, rolling_rms(series)) for run, series in detection.aligned(signal).items()}
        except (DeclinedSignal, TraceError) as reason:
            declined[signal] = str(reason)
            continue
        reference = np.concatenate([rms[run.trace.run_id][1].ravel() for run in experiment.of("reference")])
        usual, reach = np.nanmedian(reference), np.nanmax(reference, initial=-np.inf)
        if not 0 < usual < reach < np.inf:
            declined[signal] = (
                f"{signal}: reference runs give no level, their median {usual:.3g}, their most {reach:.3g}"
            )
            continue
        with np.errstate(divide="ignore"):
            levels = {run: (where, np.log(x / usual) / np.log(reach / usual)) for run, (where, x) in rms.items()}
        law, axes = described.law, described.axes
        statistics[signal] = {run: Levels(law, axes, where, level) for run, (where, level) in levels.items()}
    return statistics, declined


def _row(run: ScoredRun, named: Verdict) -> dict:
    true = truth_of(run.trace)
    return {
        "run_id": run.trace.run_id,
        "fault": run.fault or HEALTHY,
        "seed": run.seed,
        "onset_step": run.onset,
        "true_class": true.site_class,
        "true_part": true.part,
        "true_layers": _joined(true.layers),
        "true_heads": _joined(true.heads),
        "alarm_step": named.alarm,
        "verdict_step": named.verdict,
        "named_class": named.site_class,
        "named_part": named.part,
        "named_layer": named.layer,
        "named_head": named.head,
        "inexact": named.inexact,
        "broken_laws": _joined(named.broken),
        **_right(true, named, run.onset),
    }


def _joined(values: tuple | None) -> str | None:
    return None if values is None else "; ".join(str(value) for value in values)


def _right(true: Truth, named: Verdict, onset: int | None) -> dict[str, bool | None]:
    """Whether class, part, layer and key-value head are right; None where there is no telling.

    An alarm before onset is wrong.
    """
    if true.site_class is None:
        return dict.fromkeys(("class_right", "part_right", "layer_right", "head_right"))
    if true.site_class in (HEALTHY, OTHER):
        return {"class_right": named.alarm is None, "part_right": None, "layer_right": None, "head_right": None}
    timely = named.alarm is not None and onset is not None and named.alarm >= onset
    parts = (named.part, *INPUTS.get(named.part or "", ()))
    return {
        "class_right": timely and named.site_class == true.site_class,
        "part_right": None
        if true.part is None
        else timely and named.site_class == true.site_class and true.part in parts,
        "layer_right": None if true.layers is None else timely and named.layer in true.layers,
        "head_right": None
        if true.heads is None
        else timely and named.head in true.heads and (true.layers is None or named.layer in true.layers),
    }


def confusion(table: pd.DataFrame) -> pd.DataFrame:
    """Counts of runs, rows the true class, columns the named one and ``no alarm``; only classes that occur.

    Runs whose true class no derivation gives are left out.
    """
    rows = [name for name in (*CLASSES, OTHER, HEALTHY) if (table["true_class"] == name).any()]
    columns = [name for name in (*CLASSES, NO_ALARM) if name in {*rows, NO_ALARM, *table["named_class"]}]
    counts = table.groupby(["true_class", "named_class"]).size().unstack(fill_value=0)
    return counts.reindex(index=rows, columns=columns, fill_value=0).rename_axis(index="true", columns="named")


def faults_right(runs: pd.DataFrame, what: str) -> tuple[int, int]:
    """In how many faults ``what`` (class, part, layer, head) is right in every run, and of how many; healthy runs each.

    The seeds of one fault share its place and size, so they are right or wrong together: the fault is the unit.
    """
    known = runs[runs[f"{what}_right"].notna()]
    unit = known["fault"].where(known["true_class"] != HEALTHY, known["run_id"])
    right = known[f"{what}_right"].astype(bool).groupby(unit).all()
    return int(right.sum()), len(right)


def shares_right(table: pd.DataFrame) -> pd.DataFrame:
    """By true class: runs, and in how many class, part, layer and head are right.

    faults_right of faults: the class is right in all their runs, with 95 % Clopper-Pearson interval (``faults_right``).
    """
    rows = []
    for site_class, runs in table.groupby("true_class", sort=False):
        right, faults = faults_right(runs, "class")
        low, high = clopper_pearson_interval(right, faults)
        row = {"true_class": site_class, "runs": len(runs), "class_right": int(runs["class_right"].sum())}
        row |= {"faults": faults, "faults_right": right, "low": low, "high": high}
        for what in ("part", "layer", "head"):
            known = runs[f"{what}_right"].dropna()
            row |= {f"{what}_right": int(known.sum()), f"{what}_runs": len(known)}
        rows.append(row)
    return pd.DataFrame(rows).set_index("true_class")


def sentences(localisation: Localisation) -> str:
    """What came out, in two sentences."""
    broken = localisation.table[localisation.table["true_class"].isin(CLASSES)]
    unknown = int(localisation.table["true_class"].isna().sum())
    sound = localisation.table[localisation.table["true_class"].isin((HEALTHY, OTHER))]

    def share(what: str) -> str:
        known = broken[f"{what}_right"].dropna()
        right, faults = faults_right(broken, what)
        low, high = clopper_pearson_interval(right, faults)
        by_fault = f" (every run of {right} of {faults} faults, {low:.0%} to {high:.0%})" if faults else ""
        return f"{known.sum()} of {len(known)}{by_fault}"

    false = int((~sound["class_right"]).sum())
    low, high = clopper_pearson_interval(false, len(sound))
    wrongly = f" ({low:.0%} to {high:.0%})" if len(sound) else ""
    return (
        f"The broken laws name the class of the site in {share('class')} runs with a broken kernel, its layer "
        f"in {share('layer')} and its head in {share('head')} where not all were hit; "
        f"{int(broken['inexact'].sum())} patterns were inexact. They name a place in {false} of {len(sound)} runs "
        f"without one{wrongly}."
        + (f" {unknown} runs of faults whose laws no derivation gives are not judged." if unknown else "")
        + (f" Declined: {', '.join(localisation.declined)}." if localisation.declined else "")
    )
