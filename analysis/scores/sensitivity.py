"""How much of a ranking is luck: under other labels of divergence, and on disjoint halves of the calibration runs."""

from __future__ import annotations

import pandas as pd

from foreshock.analysis.detect.alarms import conformal_threshold
from foreshock.analysis.runs.experiment import Experiment
from foreshock.analysis.runs.labels import OTHER_LABELS, DrawupLabel, clean_label, sensitivity_labels
from foreshock.analysis.scores.contest import Contest, mean_leads, mean_shares, run_scores
from foreshock.analysis.scores.inference import rank_agreement
from foreshock.analysis.scores.leaderboard import RANKED
from foreshock.experiments.trace import TraceError


def halves(contest: Contest) -> tuple[pd.DataFrame, float]:
    """How much of the ranking is the luck of its thresholds: made again on disjoint halves of the calibration runs.

    Returns a row a detector with its mean restricted lead and its share of the possible lead under each half, and
    Kendall's tau of the two rankings by that share. The rate is alpha, or the smallest that half of the runs support.
    """
    order = {
        run.trace.run_id: i for i, run in enumerate(sorted(contest.experiment.of("calibration"), key=lambda r: r.seed))
    }
    judged = {name: d for name, d in contest.detectors.items() if not d.declined and d.maxima}
    columns = {}
    for half, name_of_half in enumerate("ab"):
        alarms = {}
        for name, detector in judged.items():
            maxima = [value for run, value in detector.maxima.items() if order[run] % 2 == half]
            alarms[name] = detector.alarms_at(conformal_threshold(maxima, max(contest.alpha, 1 / (len(maxima) + 1))))
        scores = run_scores(contest.with_alarms(alarms))
        columns[f"rmlt_half_{name_of_half}"] = mean_leads(scores)
        columns[f"share_half_{name_of_half}"] = mean_shares(contest, scores)
    table = pd.DataFrame(columns).rename_axis("detector")
    return table.reset_index(), rank_agreement(-table["share_half_a"], -table["share_half_b"])


def other_labels(experiment: Experiment) -> dict[str, dict[str, int | None]]:
    """By run id, divergence by every other label; out of the manifest where a reduced run keeps it there."""
    reference = [run.trace for run in experiment.of("reference")]
    labels: dict[str, dict[str, int | None]] = {}
    for run in experiment.runs:
        if "labels" in run.trace.manifest:
            labels[run.trace.run_id] = dict(run.trace.manifest["labels"])
            continue
        if "train_loss_raw" not in run.trace.signals:
            raise TraceError(f"run {run.trace.run_id} has no train_loss_raw, which the other labels need")
        held_out, training = clean_label(run.trace), run.trace.signals["train_loss_raw"]
        labels[run.trace.run_id] = sensitivity_labels(
            (held_out.steps, held_out.values.ravel()),
            (training.steps, training.values.ravel()),
            healthy_held_out=[clean_label(run).values.ravel() for run in reference],
            healthy_training=[run.signals["train_loss_raw"].values.ravel() for run in reference],
            label=DrawupLabel(**experiment.index["label"]),
            stopped=run.trace.end_reason == "diverged",
        )
    return labels


def label_sensitivity(contest: Contest) -> pd.DataFrame:
    """Leads under every other label: label, detector, diverged, rmlt_steps, share_of_possible_lead, tau_to_primary.

    tau_to_primary: Kendall's tau of the orders by share under this label and the primary one. Empty on the token axis,
    where the other labels are not defined.
    """
    if contest.experiment.axis != "steps":
        return pd.DataFrame()
    labels = other_labels(contest.experiment)
    names = [n for n, d in contest.detectors.items() if contest.kinds[n] in RANKED and not d.declined]
    primary = None
    parts = []
    for label in ("primary", *OTHER_LABELS):
        divergences = None if label == "primary" else {run: of_run[label] for run, of_run in labels.items()}
        scores = run_scores(contest, divergences)
        scores = scores[scores["detector"].isin(names) & (scores["fault"] != "healthy")]
        share = mean_shares(contest, scores).reindex(names)
        primary = share if primary is None else primary
        diverged = scores.drop_duplicates("run_id")["divergence"].notna().sum()
        parts.append(
            pd.DataFrame(
                {
                    **contest.keys,
                    "label": label,
                    "diverged": diverged,
                    "tau_to_primary": rank_agreement(-share, -primary),
                    "detector": names,
                    "rmlt_steps": mean_leads(scores).reindex(names).to_numpy(),
                    "share_of_possible_lead": share.to_numpy(),
                }
            )
        )
    return pd.concat(parts, ignore_index=True)
