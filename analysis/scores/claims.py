"""The paper's claims held against the runs: what was measured, and whether it agrees.

A claim is a node of an experiment's YAML: ``says``, in words, and one of two tests.
``falls`` or ``rises``: faults in order (``healthy`` among them), with a ``panel`` (signals and reduce); the
value of its runs at the common end must change in that sense from each to the next, each step with an exact one-sided
Mann-Whitney p of at most 5 % (three runs against three can just reach it).
``alarms``: a fault and a detector, and whether it ``should``. It should where more runs alarm than chance explains, and
should not where no more do: chance is what healthy runs that share the threshold do, at 5 %
(``inference.chance_of_alarms``). A single run can show no alarm where alpha is 5 % or more, and few runs cannot show
silence beyond that test. A declined detector leaves ``holds`` empty.
``align`` (steps or tokens) and ``model`` confine a claim to one view.
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise
from typing import Any

import numpy as np
import pandas as pd
from scipy.stats import mannwhitneyu

from foreshock.analysis.runs.experiment import Experiment
from foreshock.analysis.runs.readings import at_end, common_end
from foreshock.analysis.scores.contest import Contest
from foreshock.analysis.scores.inference import CHANCE, chance_of_alarms
from foreshock.analysis.scores.outcome import IN_TIME


def check_claims(contest: Contest) -> pd.DataFrame:
    """Columns model, align, claim, measured, holds; one row a claim that this view can answer."""
    experiment, rows = contest.experiment, []
    for claim in experiment.index["experiment"].get("claims", []):
        if _answerable(experiment, claim):
            answer = _alarms(contest, claim) if "alarms" in claim else _order(experiment, claim)
            rows.append((experiment.model, experiment.axis, claim["says"], *answer))
    return pd.DataFrame(rows, columns=["model", "align", "claim", "measured", "holds"])


def _answerable(experiment: Experiment, claim: Mapping[str, Any]) -> bool:
    """Whether this view has the claim's axis, model, faults, detector and signals."""
    if (
        claim.get("align", experiment.axis) != experiment.axis
        or claim.get("model", experiment.model) != experiment.model
    ):
        return False
    known = {"healthy", *experiment.faults}
    if "alarms" in claim:
        return claim["alarms"]["fault"] in known and claim["alarms"]["detector"] in experiment.named_detectors
    return {*claim.get("falls", []), *claim.get("rises", [])} <= known and {*claim["panel"]["signals"]} <= {
        *experiment.signals
    }


def _order(experiment: Experiment, claim: Mapping[str, Any]) -> tuple[str, bool]:
    sense = 1 if "rises" in claim else -1
    order = claim["rises" if sense > 0 else "falls"]
    faults = [None if name == "healthy" else name for name in order]
    end = common_end(experiment, faults)
    values = [at_end(experiment, fault, claim["panel"], end) for fault in faults]
    chance = max(
        mannwhitneyu(later, earlier, alternative="greater" if sense > 0 else "less", method="exact").pvalue
        for earlier, later in pairwise(values)
    )
    said = ", ".join(
        f"{experiment.label(fault)} {np.median(v):.3g} ({v.min():.3g} to {v.max():.3g}, n={len(v)})"
        for fault, v in zip(faults, values, strict=True)
    )
    return f"{said} at {end:,} {experiment.axis}; p at most {chance:.2g}", bool(chance <= CHANCE)


def _alarms(contest: Contest, claim: Mapping[str, Any]) -> tuple[str, bool | None]:
    experiment = contest.experiment
    detector = contest.detectors[claim["alarms"]["detector"]]
    fault = claim["alarms"]["fault"]
    if detector.declined:
        return f"declined: {detector.declined}", None
    runs = experiment.of("faulty", fault=fault)
    should = claim["alarms"]["should"]
    counted = IN_TIME if should else (*IN_TIME, "late")  # silence is silence to the end
    count = sum(contest.score(detector, run).outcome in counted for run in runs)
    chance = chance_of_alarms(count, len(runs), len(detector.maxima), experiment.alpha)
    said = (
        f"{detector.name} alarms {'in time ' if should else ''}in {count} of {len(runs)} runs of "
        f"{experiment.label(fault)} at {experiment.alpha:.0%} false alarms (by chance {chance:.2g})"
    )
    return said, (chance < CHANCE) == should
