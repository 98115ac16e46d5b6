"""The leaderboard: every detector, control and entrant on the same runs, at the same false-alarm rate, with intervals.

Three stages that exchange plain tables: ``contest`` finds alarms, ``run_scores`` scores each run, ``board`` draws
the conclusions over seeds. Anything that can fill the first table can enter.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from analysis.alarms import AlarmRule, conformal_threshold, make_rule
from analysis.controls import CONTROLS
from analysis.costs import detector_cost
from analysis.detection import Detection, Detector, own_past_is_healthy
from analysis.entrants import Entrant
from analysis.experiment import LABEL_SIGNAL, Experiment, ScoredRun
from analysis.inference import (
    MIN_SEEDS,
    bca_interval,
    clopper_pearson_interval,
    confidence_set,
    false_alarm_bound,
    false_alarm_law,
    iqm,
    max_t_test,
    rank_agreement,
    rank_intervals,
    restricted_mean_time,
    seed_mean,
    wilson_interval,
)
from analysis.labels import OTHER_LABELS, sensitivity_labels
from analysis.score import score
from analysis.tracks import SELF_WINDOW, family
from experiments.trace import TraceError

RANKED = ("detector", "entrant", "external")
"""Kinds that compete; controls, and oracles that are told the fault, stand beside them."""
IN_TIME = ("lead", "benign_alarm")
ALL_FAULTS = "all"


@dataclass(frozen=True)
class Contest:
    """One model on one track: every detector's alarms by run id, and what kind of row it is."""

    experiment: Experiment
    track: str
    alpha: float
    detectors: Mapping[str, Detector]
    kinds: Mapping[str, str]
    baseline: str = field(default="")

    @property
    def scored(self) -> list[ScoredRun]:
        """Faulty runs and healthy ones that set no threshold: test runs, and where nothing is calibrated all others."""
        unused = ("calibration",) if self.track == "universal" else ()
        return self.experiment.of("faulty", "test", *unused)

    @property
    def keys(self) -> dict[str, str]:
        """What tells this contest's rows from those of others."""
        experiment = self.experiment
        return {"experiment": experiment.index["experiment"]["name"], "model": experiment.model, "track": self.track}

    def with_alarms(self, alarms: Mapping[str, Mapping[str, int | None]]) -> Contest:
        """The same contest of the detectors that other alarms are given for, by name and run id."""
        detectors = {name: replace(self.detectors[name], alarms=found) for name, found in alarms.items()}
        return replace(self, detectors=detectors)


def contest(
    experiment: Experiment,
    track: str,
    *,
    rule: AlarmRule | None = None,
    alpha: float | None = None,
    entrants: Iterable[Entrant] = (),
    external: Mapping[str, Mapping[str, int | None]] | None = None,
    singles: bool = False,
    maximum: bool = False,
    detection: Detection | None = None,
) -> Contest:
    """Every detector of an experiment on a track, with the controls and whoever else enters.

    rule, alpha: the experiment's own by default; external: by name, alarms by run id; singles: every signal by
    itself too; maximum: the largest of all calibration runs is the threshold, whatever alpha that is; detection: one
    whose z-scores are there already. Raises ValueError where calibration runs are too few for alpha or the baseline
    cannot be judged.
    """
    rule = make_rule(**experiment.index["rule"]) if rule is None else rule
    alpha = experiment.alpha if alpha is None else alpha
    alpha = 1 / (len(experiment.of("calibration")) + 1) if maximum else alpha
    detection, baseline = detection or Detection(experiment, track), experiment.index["experiment"]["baseline"]
    chosen = experiment.named_detectors | (experiment.single_signals if singles else {})
    detectors = {name: detection.detect(name, signals, rule, alpha) for name, signals in chosen.items()}
    kinds = dict.fromkeys(chosen, "detector")
    if track == "published":  # a number of random-matrix theory is no rule that a source proposes for monitoring
        kinds |= {name: "theory" for name, signals in chosen.items() if family(signals[0]) == "random_matrix"}
    kinds |= {name: "oracle" for name, signals in chosen.items() if family(signals[0]) == "oracle"}
    for entrant in entrants:
        if entrant.name in detectors:
            raise ValueError(f"detector {entrant.name!r} is on the board already: give it a name of its own")
        signals = entrant.signals or experiment.named_detectors[baseline]
        detectors[entrant.name] = detection.detect(entrant.name, signals, entrant.rule, alpha)
        kinds[entrant.name] = "entrant"
    for name, alarms in (external or {}).items():
        if name in detectors:
            raise ValueError(f"monitor {name!r} is on the board already: give it a name of its own")
        if alarms:
            detectors[name], kinds[name] = Detector(name, (), alarms=alarms), "external"
    one = Contest(experiment, track, alpha, detectors, kinds, baseline)
    for name, control in CONTROLS.items():
        alarms = {run.trace.run_id: control(run, experiment, alpha) for run in one.scored}
        detectors[name], kinds[name] = Detector(name, (), alarms=alarms), "control"
    if track in ("reference", "self") and detectors[baseline].declined:
        raise ValueError(f"the baseline {baseline!r} cannot be judged: {detectors[baseline].declined}")
    return one


def _scorable(one: Contest, detector: Detector, run: ScoredRun) -> bool:
    """On the self track a run counts where its past was healthy for long enough, for the detector's cadence.

    Who has no cadence, a control or a table of alarms, is scored on the baseline's runs.
    """
    watched = detector if detector.charts else one.detectors[one.baseline]
    return one.track != "self" or own_past_is_healthy(run, watched, SELF_WINDOW)


def run_scores(one: Contest, divergences: Mapping[str, int | None] | None = None) -> pd.DataFrame:
    """One row a detector and a run of ``Contest.scored``.

    Columns: experiment, model, track, detector, kind, fault (or ``healthy``), seed, run_id, alarm, onset,
    divergence, reach (where the run's scoring ends), outcome, lead (restricted; NaN unless it diverges),
    normalised_lead (of onset to divergence), delay (alarm - onset, or what was waited in vain), detected (an alarm at
    or after onset), degraded (never diverges, ends worse than every calibration run).
    divergences: by run id, another label than the primary. Declined detectors have no rows.
    """
    rows = []
    for name, detector in one.detectors.items():
        if detector.declined:
            continue
        for run in one.scored:
            if not _scorable(one, detector, run):
                continue
            run_id = run.trace.run_id
            divergence = run.divergence if divergences is None else divergences[run_id]
            alarm = detector.alarms[run_id]
            result = score(alarm=alarm, onset=run.onset, divergence=divergence, horizon=one.experiment.horizon)
            lead = np.nan if result.restricted_lead_steps is None else float(result.restricted_lead_steps)
            detected = run.onset is not None and alarm is not None and alarm >= run.onset
            rows.append(
                {
                    **one.keys,
                    "detector": name,
                    "kind": one.kinds[name],
                    "fault": run.fault or "healthy",
                    "seed": run.seed,
                    "run_id": run_id,
                    "alarm": alarm,
                    "onset": run.onset,
                    "divergence": divergence,
                    "reach": run.horizon,
                    "outcome": result.outcome,
                    "lead": lead,
                    "normalised_lead": lead / (divergence - run.onset) if lead > 0 else lead,
                    "delay": (alarm if detected else _last(run, one)) - run.onset if run.onset is not None else np.nan,
                    "detected": detected,
                    "degraded": run.degraded,
                }
            )
    table = pd.DataFrame(rows)
    for column in ("alarm", "onset", "divergence"):
        table[column] = table[column].astype("Int64")
    return table


def _last(run: ScoredRun, one: Contest) -> int:
    """How far the run was watched: its own end, at most the horizon."""
    done = run.trace.manifest["steps_done" if one.experiment.axis == "steps" else "tokens_done"]
    return max(min(done, one.experiment.horizon), run.onset or 0)


def _by_seed(scores: pd.DataFrame, names: Sequence[str], column: str) -> tuple[np.ndarray, np.ndarray]:
    """Sums and counts of a column by seed, both (S, D); runs without a value count nothing."""
    table = scores[scores[column].notna()].pivot_table(
        index="seed", columns="detector", values=column, aggfunc=["sum", "count"], fill_value=0.0
    )
    seeds = sorted(scores["seed"].unique())
    return tuple(
        (table[what] if what in table else pd.DataFrame())
        .reindex(index=seeds, columns=names, fill_value=0.0)
        .to_numpy(float)
        for what in ("sum", "count")
    )


def _relative(scores: pd.DataFrame, baseline: str) -> pd.DataFrame:
    """Adds ``relative``: baseline's alarm minus the detector's, both at most the run's reach; NaN unless it diverges.

    An alarm before the onset counts as none, on either side. A run that was stopped because it diverged reaches to the
    horizon. Under a fault that does no harm there is nothing to be early for.
    """
    alarm = scores["alarm"].astype(float).where(scores["outcome"] != "false_alarm")
    restricted = alarm.fillna(np.inf).clip(upper=scores["reach"].astype(float))
    table = scores.assign(restricted=restricted)
    reference = table[table["detector"] == baseline].set_index("run_id")
    joined = table["run_id"].map(reference["restricted"])
    return table.assign(relative=(joined - restricted).where(table["lead"].notna()))


def board(one: Contest, scores: pd.DataFrame, costs: Mapping[str, tuple[str, float]] | None = None) -> pd.DataFrame:
    """The leaderboard of one contest: a row for each detector and fault, and one for all faults together.

    costs: by signal, its monitor and the share of a step that it takes. Intervals are over seeds, jointly across
    faults, and conditional on the threshold; ``false_alarm_law`` is what its own luck adds. NaN under 10 seeds.
    """
    rows = [_declined_row(one, detector) for detector in one.detectors.values() if detector.declined]
    if len(scores):
        scores = _relative(scores, one.baseline)
        healthy = scores[scores["fault"] == "healthy"]
        faulty = scores[scores["fault"] != "healthy"]
        for fault in (ALL_FAULTS, *one.experiment.faults):
            of_fault = faulty if fault == ALL_FAULTS else faulty[faulty["fault"] == fault]
            rows += _fault_rows(one, fault, of_fault, healthy, costs or {})
    return pd.DataFrame(rows)


def _declined_row(one: Contest, detector: Detector) -> dict[str, Any]:
    return {
        **one.keys,
        "fault": ALL_FAULTS,
        "detector": detector.name,
        "kind": one.kinds[detector.name],
        "declined": detector.declined,
    }


def _fault_rows(
    one: Contest, fault: str, scores: pd.DataFrame, healthy: pd.DataFrame, costs: Mapping[str, tuple[str, float]]
) -> list[dict[str, Any]]:
    names = [name for name in one.detectors if (scores["detector"] == name).any()]
    if not names:
        return []
    totals_SD, counts_SD = _by_seed(scores, names, "lead")
    ranked = [i for i, name in enumerate(names) if one.kinds[name] in RANKED]
    # Who was not scored on all of these runs, or alarms in healthy ones more often than allowed, cannot be compared.
    whole = counts_SD.sum(0).max(initial=0.0)
    ranked = [i for i in ranked if counts_SD[:, i].sum() == whole > 0 and _keeps_rate(one, names[i], healthy)]
    ranks = dict(zip(ranked, rank_intervals(totals_SD[:, ranked], counts_SD[:, ranked]), strict=True)) if ranked else {}
    best = _possibly_best(totals_SD, counts_SD, ranked)
    p_values, smallest_p = _against_baseline(one, names, totals_SD, counts_SD, ranked)
    rows = []
    for i, name in enumerate(names):
        mine = scores[scores["detector"] == name]
        rank, low, high = ranks.get(i, (np.nan,) * 3)
        rmlt_low, rmlt_high = bca_interval(totals_SD[:, i], counts_SD[:, i])
        detected = int(mine["outcome"].isin(IN_TIME).sum())
        detected_low, detected_high = wilson_interval(detected, len(mine))
        waited = mine[mine["outcome"] != "false_alarm"]
        outcomes = mine["outcome"].value_counts()
        rows.append(
            {
                **one.keys,
                "fault": fault,
                "detector": name,
                "kind": one.kinds[name],
                "runs": len(mine),
                "seeds": mine["seed"].nunique(),
                "diverged": int(mine["divergence"].notna().sum()),
                "degraded": int(mine["degraded"].sum()),
                **_healthy_columns(one, name, healthy),
                "detected": detected / len(mine),
                "detected_low": detected_low,
                "detected_high": detected_high,
                "rmlt_steps": seed_mean(totals_SD[:, i], counts_SD[:, i]),
                "rmlt_low": rmlt_low,
                "rmlt_high": rmlt_high,
                "iqm_lead_steps": iqm(mine["lead"].dropna()),
                "normalised_lead": mine["normalised_lead"].mean(),
                "relative_lead_steps": mine["relative"].mean(),
                "p_beats_baseline": p_values.get(i, np.nan),
                "smallest_p": smallest_p if i in p_values else np.nan,
                "delay_steps": np.nan if fault == ALL_FAULTS else _delay(waited, one.experiment.horizon),
                "rank": rank,
                "rank_low": low,
                "rank_high": high,
                "possibly_best": i in best if i in ranks else None,
                **{outcome: int(outcomes.get(outcome, 0)) for outcome in ("late", "missed", "false_alarm")},
                "cost_share_of_step": detector_cost(one.detectors[name].signals, costs),
                "exploratory": mine["seed"].nunique() < MIN_SEEDS or not len(healthy),
                "declined": None,
            }
        )
    return rows


def _keeps_rate(one: Contest, name: str, healthy: pd.DataFrame) -> bool:
    """Whether its healthy test runs leave it possible that a detector alarms in no more than alpha of them."""
    alarms = healthy.loc[healthy["detector"] == name, "outcome"] == "false_alarm"
    if not len(alarms):  # nothing was seen; a conformal threshold still promises it, nobody else does
        return one.kinds[name] != "external" and one.track != "published"
    return clopper_pearson_interval(int(alarms.sum()), len(alarms))[0] <= one.alpha


def _delay(scores: pd.DataFrame, horizon: int) -> float:
    """Mean time from onset to alarm, restricted to what is left of the horizon; NaN without runs."""
    left = (horizon - scores["onset"].astype(float)).min()
    return restricted_mean_time(scores["delay"], scores["detected"], left) if len(scores) and left > 0 else np.nan


def _healthy_columns(one: Contest, name: str, healthy: pd.DataFrame) -> dict[str, Any]:
    """What healthy test runs say of a detector, and what the threshold promised."""
    mine = healthy[healthy["detector"] == name]
    alarms, n = int((mine["outcome"] == "false_alarm").sum()), len(one.detectors[name].maxima)
    low, high = clopper_pearson_interval(alarms, len(mine))
    law = false_alarm_law(n, one.alpha) if n else (np.nan,) * 3
    return {
        "alpha": one.alpha if n or one.track == "universal" else np.nan,
        "calibration_runs": n,
        "alpha_supported": 1 / (n + 1) if n else np.nan,
        "threshold": one.detectors[name].threshold,
        "healthy_alarms": alarms,
        "healthy_runs": len(mine),
        "false_alarm_low": low,
        "false_alarm_high": high,
        "false_alarm_law_low": law[1],
        "false_alarm_law_high": law[2],
        "false_alarm_bound": false_alarm_bound(n, one.alpha) if n else np.nan,
    }


def _possibly_best(totals_SD: np.ndarray, counts_SD: np.ndarray, ranked: Sequence[int]) -> set[int]:
    """The model confidence set over seeds' mean leads, of the ranked detectors."""
    if len(ranked) < 2:
        return set(ranked)
    some = counts_SD[:, ranked[0]] > 0
    losses = -totals_SD[some][:, ranked] / counts_SD[some][:, ranked]
    return {ranked[i] for i in confidence_set(losses)}


def _against_baseline(
    one: Contest, names: Sequence[str], totals_SD: np.ndarray, counts_SD: np.ndarray, ranked: Sequence[int]
) -> tuple[dict[int, float], float]:
    """By column, max-T adjusted p that a restricted lead is larger than the baseline's; the smallest there is."""
    others = [i for i in ranked if names[i] != one.baseline]
    if one.baseline not in names or names.index(one.baseline) not in ranked or not others:
        return {}, np.nan
    base = names.index(one.baseline)
    some = counts_SD[:, base] > 0
    if some.sum() < 2:
        return {}, np.nan
    means = totals_SD[some] / np.maximum(counts_SD[some], 1)
    test = max_t_test(means[:, others] - means[:, [base]])
    return dict(zip(others, test.p_adjusted_D.tolist(), strict=True)), test.smallest_p


def halves(one: Contest) -> tuple[pd.DataFrame, float]:
    """How much of the ranking is the luck of its thresholds: made again on disjoint halves of the calibration runs.

    Returns a row a detector with its mean restricted lead under each half, and Kendall's tau of the two rankings. The
    rate is alpha, or the smallest that half of the runs support.
    """
    order = {
        run.trace.run_id: i for i, run in enumerate(sorted(one.experiment.of("calibration"), key=lambda r: r.seed))
    }
    judged = {name: d for name, d in one.detectors.items() if not d.declined and d.maxima}
    columns = {}
    for half, column in enumerate(("rmlt_half_a", "rmlt_half_b")):
        alarms = {}
        for name, detector in judged.items():
            maxima = [value for run, value in detector.maxima.items() if order[run] % 2 == half]
            alarms[name] = detector.alarms_at(conformal_threshold(maxima, max(one.alpha, 1 / (len(maxima) + 1))))
        columns[column] = mean_leads(run_scores(one.with_alarms(alarms)))
    table = pd.DataFrame(columns).rename_axis("detector")
    known = table.dropna()
    return table.reset_index(), rank_agreement(-known["rmlt_half_a"], -known["rmlt_half_b"])


def mean_leads(scores: pd.DataFrame) -> pd.Series:
    """RMLT of each detector over all of its faulty runs that diverge; NaN if none does."""
    return scores[scores["fault"] != "healthy"].groupby("detector", sort=False)["lead"].mean()


def other_labels(experiment: Experiment) -> dict[str, dict[str, int | None]]:
    """By run id, divergence by every other label; out of the manifest where a reduced run keeps it there."""
    reference = [run.trace for run in experiment.of("reference")]
    found: dict[str, dict[str, int | None]] = {}
    for run in experiment.runs:
        if "labels" in run.trace.manifest:
            found[run.trace.run_id] = dict(run.trace.manifest["labels"])
            continue
        if "train_loss_raw" not in run.trace.signals:
            raise TraceError(f"run {run.trace.run_id} has no train_loss_raw, which the other labels need")
        held_out, training = run.trace.signals[LABEL_SIGNAL], run.trace.signals["train_loss_raw"]
        found[run.trace.run_id] = sensitivity_labels(
            (held_out.steps, held_out.values.ravel()),
            (training.steps, training.values.ravel()),
            healthy_held_out=[one.signals[LABEL_SIGNAL].values.ravel() for one in reference],
            healthy_training=[one.signals["train_loss_raw"].values.ravel() for one in reference],
            settings=experiment.index["label"],
            stopped=run.trace.end_reason == "diverged",
        )
    return found


def label_sensitivity(one: Contest) -> pd.DataFrame:
    """The ranking under every other label: label, detector, diverged, rmlt_steps, rank, and tau against the primary's.

    Empty on the token axis, where the other labels are not defined.
    """
    if one.experiment.axis != "steps":
        return pd.DataFrame()
    labels = other_labels(one.experiment)
    names = [n for n, d in one.detectors.items() if one.kinds[n] in RANKED and not d.declined]
    primary = None
    parts = []
    for label in ("primary", *OTHER_LABELS):
        scores = run_scores(one, None if label == "primary" else {run: found[label] for run, found in labels.items()})
        scores = scores[scores["detector"].isin(names) & (scores["fault"] != "healthy")]
        mean = mean_leads(scores).reindex(names)
        primary = mean if primary is None else primary
        known = mean.notna() & primary.notna()
        agreement = rank_agreement(-mean[known], -primary[known]) if known.sum() > 1 else np.nan
        diverged = scores.drop_duplicates("run_id")["divergence"].notna().sum()
        parts.append(
            pd.DataFrame(
                {
                    **one.keys,
                    "label": label,
                    "diverged": diverged,
                    "tau_to_primary": agreement,
                    "detector": names,
                    "rmlt_steps": mean.to_numpy(),
                    "rank": mean.rank(ascending=False).to_numpy(),
                }
            )
        )
    return pd.concat(parts, ignore_index=True)


def read_alarms(paths: Sequence[Path], experiments: Sequence[Experiment]) -> list[dict[str, dict[str, int | None]]]:
    """For each experiment, by monitor, alarms by run id, out of CSV files with columns run_id, monitor, step.

    An empty step is a run without alarm, and so is a run that a monitor does not list; an experiment of which it
    lists no run it does not enter. Raises ValueError on missing columns, unknown or repeated runs, steps that are no
    whole numbers from 0, and alarms after a run's end, naming file and line.
    """
    runs = {run.trace.run_id: (index, run) for index, one in enumerate(experiments) for run in one.runs}
    found: list[dict[str, dict[str, int | None]]] = [{} for _ in experiments]
    listed: set[tuple[str, str]] = set()
    for path in paths:
        table = pd.read_csv(path, dtype={"run_id": str, "monitor": str})
        missing = {"run_id", "monitor", "step"} - set(table.columns)
        if missing:
            raise ValueError(f"alarms={path} has no column {sorted(missing)[0]!r}: run_id, monitor, step")
        for line, row in enumerate(table.itertuples(index=False), start=2):
            where = f"alarms={path}, line {line}"
            if pd.isna(row.monitor):
                raise ValueError(f"{where}: monitor is empty: give it a name")
            if row.run_id not in runs:
                raise ValueError(f"{where}: run_id={row.run_id!r} is not one of the {len(runs)} runs")
            if (row.monitor, row.run_id) in listed:
                raise ValueError(f"{where}: run {row.run_id} has two alarms of {row.monitor!r}")
            listed.add((row.monitor, row.run_id))
            index, run = runs[row.run_id]
            step = _step(row.step, run, experiments[index], where)
            if run.role in ("test", "faulty"):
                blank = {one.trace.run_id: None for one in experiments[index].of("test", "faulty")}
                found[index].setdefault(row.monitor, blank)[row.run_id] = step
    return found


def _step(given: Any, run: ScoredRun, experiment: Experiment, where: str) -> int | None:
    if pd.isna(given):
        return None
    step = float(pd.to_numeric(given, errors="coerce"))
    if not 0 <= step < np.inf or step != int(step):
        raise ValueError(f"{where}: step={given!r} is not allowed: a whole number from 0")
    if step > experiment.horizon:
        raise ValueError(f"{where}: step={int(step)} is beyond the horizon of {experiment.horizon}")
    done = run.trace.manifest["steps_done"]
    if experiment.axis == "steps" and step > done:
        raise ValueError(f"{where}: step={int(step)} is after the run's end at {done}")
    return int(step)
