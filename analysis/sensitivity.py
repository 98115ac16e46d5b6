"""How much of a ranking is luck: under other labels of divergence, and on disjoint halves of the calibration runs."""

from __future__ import annotations

import numpy as np
import pandas as pd

from analysis.alarms import conformal_threshold
from analysis.contest import Contest, mean_leads, run_scores
from analysis.experiment import LABEL_SIGNAL, Experiment
from analysis.inference import rank_agreement
from analysis.labels import OTHER_LABELS, sensitivity_labels
from analysis.leaderboard import RANKED
from experiments.trace import TraceError


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
