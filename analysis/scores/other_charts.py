"""Whether a ranking depends on the chart: the same detectors under every chart."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import numpy as np
import pandas as pd

from foreshock.analysis.detect.alarms import anytime_threshold
from foreshock.analysis.detect.charts import AlarmRule
from foreshock.analysis.detect.detection import Detection, Detector
from foreshock.analysis.detect.rules import make_rule
from foreshock.analysis.runs.conf import conf
from foreshock.analysis.runs.experiment import HEALTHY
from foreshock.analysis.scores.contest import Contest, contest, mean_leads, mean_shares, run_scores
from foreshock.analysis.scores.inference import keeps_rate

CHARTS = ("shewhart", "ewma", "cusum", "glr", "shiryaev_roberts")


def charts(detection: Detection, primary: Contest, own_rule: AlarmRule) -> pd.DataFrame:
    """Whether the ranking depends on the chart: every detector's mean restricted lead and false alarms under each.

    ``anytime`` is the Shiryaev-Roberts chart with the threshold of its theory instead of the conformal one. No lead
    where healthy test runs alarm more often than alpha allows. primary: the contest under ``own_rule``, which is not
    held again.
    """
    parts = []
    for name in CHARTS:
        rule = make_rule(**conf("rule", name))
        if rule == own_rule:
            held = primary
        else:
            held = contest(detection.experiment, detection.track, rule=rule, alpha=primary.alpha, detection=detection)
        own = {n: held.detectors[n] for n in detection.experiment.named_detectors if not held.detectors[n].declined}
        calibration = {n: len(d.maxima) for n, d in own.items()}
        parts.append(_chart_rows(held.with_alarms({n: d.alarms for n, d in own.items()}), name, calibration))
        if name == "shiryaev_roberts":
            anytime = {n: _anytime_alarms(d, detection, primary.alpha) for n, d in own.items()}
            parts.append(_chart_rows(held.with_alarms(anytime), "shiryaev_roberts, anytime threshold", {}))
    return pd.concat(parts, ignore_index=True)


def _anytime_alarms(detector: Detector, detection: Detection, alpha: float) -> dict[str, int | None]:
    """A union over the signals of a family and the sides of each shares alpha; the theory is of charts as they are."""
    samples = max(len(where) for charts in detector.charts.values() for where, _ in charts)
    sides = sum(2 if detection.experiment.signals[s].bad == "both" else 1 for s in detector.signals)
    return replace(detector, scales=()).alarms_at(anytime_threshold(samples, alpha / sides))


def _chart_rows(held: Contest, chart: str, calibration: Mapping[str, int]) -> pd.DataFrame:
    """calibration: by detector, the runs that set its threshold; none where a theory does."""
    scores = run_scores(held)
    faulty, healthy = (scores[(scores["fault"] == HEALTHY) == chosen].groupby("detector") for chosen in (False, True))
    table = pd.DataFrame(
        {
            "rmlt_steps": mean_leads(scores),
            "share_of_possible_lead": mean_shares(held, scores),
            "detected": faulty["detected"].mean(),
            "healthy_alarms": healthy["outcome"].agg(lambda outcomes: (outcomes == "false_alarm").sum()),
            "healthy_runs": healthy.size(),
        }
    )
    rates = table[["healthy_alarms", "healthy_runs"]].fillna(0).astype(int).itertuples()
    too_often = [not keeps_rate(alarms, runs, calibration.get(n, 0), held.alpha) for n, alarms, runs in rates]
    table.loc[too_often, ["rmlt_steps", "share_of_possible_lead"]] = np.nan
    return table.rename_axis("detector").reset_index().assign(**held.keys, chart=chart)
