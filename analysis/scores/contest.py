"""A contest: every detector, control and entrant on the same runs, at the same false-alarm rate, and each run's score.

Two stages that exchange plain tables: ``contest`` finds alarms, ``run_scores`` scores each run. Anything that can
fill the first table can enter; ``analysis.scores.leaderboard`` draws the conclusions over seeds.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

import numpy as np
import pandas as pd

from foreshock.analysis.detect.charts import AlarmRule
from foreshock.analysis.detect.controls import CONTROLS
from foreshock.analysis.detect.detection import Detection, Detector
from foreshock.analysis.detect.entrants import Entrant
from foreshock.analysis.detect.rules import make_rule
from foreshock.analysis.detect.tracks.base import Track
from foreshock.analysis.detect.tracks.by_name import TRACKS
from foreshock.analysis.runs.experiment import Experiment, ScoredRun
from foreshock.analysis.scores.outcome import IN_TIME, Score, score
from foreshock.analysis.scores.overall import fault_weights
from foreshock.experiments.validation import check_named

ALL_FAULTS = "all"
OWN = ("detector", "baseline", "oracle", "theory")
"""Kinds of rows that watch with signals of the experiment."""


@dataclass(frozen=True)
class Contest:
    """One model on one track: every detector's alarms by run id, and what kind of row it is."""

    experiment: Experiment
    track: Track
    alpha: float
    detectors: Mapping[str, Detector]
    kinds: Mapping[str, str]
    baselines: tuple[str, ...] = ()

    @property
    def scored(self) -> list[ScoredRun]:
        """Faulty runs, and healthy ones that set no threshold."""
        return self.experiment.of("faulty", *self.track.healthy_roles)

    @property
    def own(self) -> dict[str, Detector]:
        """The detectors of the experiment, without controls and without those that entered from elsewhere."""
        return {name: d for name, d in self.detectors.items() if self.kinds[name] in OWN}

    @property
    def keys(self) -> dict[str, str]:
        """What tells this contest's rows from those of others."""
        experiment = self.experiment
        return {
            "experiment": experiment.index["experiment"]["name"],
            "model": experiment.model,
            "track": self.track.name,
        }

    def score(self, detector: Detector, run: ScoredRun, divergences: Mapping[str, int | None] | None = None) -> Score:
        """Outcome and lead of one run under a detector that is not declined.

        divergences: by run id, another label than the primary.
        """
        alarm = detector.alarms[run.trace.run_id]
        divergence = run.divergence if divergences is None else divergences[run.trace.run_id]
        return score(alarm=alarm, onset=run.onset, divergence=divergence, horizon=self.experiment.horizon)

    def without_singles(self) -> Contest:
        """The contest without the signals that are no detector of the experiment by themselves."""
        singles = self.experiment.single_signals.keys() - self.experiment.named_detectors.keys()
        return replace(self, detectors={name: d for name, d in self.detectors.items() if name not in singles})

    def with_alarms(self, alarms: Mapping[str, Mapping[str, int | None]]) -> Contest:
        """The same contest of the detectors that other alarms are given for, by name and run id."""
        detectors = {name: replace(self.detectors[name], alarms=found) for name, found in alarms.items()}
        return replace(self, detectors=detectors)


def contest(
    experiment: Experiment,
    track: Track | str,
    *,
    rule: AlarmRule | None = None,
    alpha: float | None = None,
    entrants: Iterable[Entrant] = (),
    external: Mapping[str, Mapping[str, int | None]] | None = None,
    singles: bool = False,
    detection: Detection | None = None,
) -> Contest:
    """Every detector of an experiment on a track, with the controls and whoever else enters.

    track: one, or the name of one of the project's; rule, alpha: the experiment's own by default; external: by name,
    alarms by run id; singles: every signal by itself too; detection: of this experiment and track, whose z-scores are
    there already. An entrant without signals watches those of the first baseline. Raises ValueError where calibration
    runs are too few for alpha, or a baseline cannot be judged (on the self track: none can).
    """
    rule = make_rule(**experiment.index["rule"]) if rule is None else rule
    alpha = experiment.alpha if alpha is None else alpha
    detection, baselines = detection or Detection(experiment, _track(track)), experiment.baselines
    chosen = experiment.named_detectors | (experiment.single_signals if singles else {})
    detectors = {name: detection.detect(name, signals, rule, alpha) for name, signals in chosen.items()}
    first = {name: experiment.signals[signals[0]] for name, signals in chosen.items()}
    kinds = {name: detection.track.kind_of(signal) for name, signal in first.items()}
    kinds |= dict.fromkeys(baselines, "baseline")
    kinds |= {name: "oracle" for name, signal in first.items() if signal.family == "oracle"}
    for entrant in entrants:
        if entrant.name in detectors or entrant.name in CONTROLS:
            raise ValueError(f"detector {entrant.name!r} is on the board already: give it a name of its own")
        signals = entrant.signals or experiment.named_detectors[baselines[0]]
        detectors[entrant.name] = detection.detect(entrant.name, signals, entrant.rule, alpha)
        kinds[entrant.name] = "entrant"
    for name, alarms in (external or {}).items():
        if name in detectors:
            raise ValueError(f"monitor {name!r} is on the board already: give it a name of its own")
        if alarms:
            detectors[name], kinds[name] = Detector(name, (), alarms=alarms), "external"
    held = Contest(experiment, detection.track, alpha, detectors, kinds, baselines)
    for name, control in CONTROLS.items():
        alarms = {run.trace.run_id: control(run, experiment, alpha) for run in held.scored}
        detectors[name], kinds[name] = Detector(name, (), alarms=alarms), "control"
    declined = [name for name in baselines if detectors[name].declined]
    if detection.track.lacks_baselines(len(declined), len(baselines)):
        raise ValueError(f"the baseline {declined[0]!r} cannot be judged: {detectors[declined[0]].declined}")
    return held


def _track(track: Track | str) -> Track:
    """A track, or the project's one of a name. Raises ValueError where there is none."""
    if isinstance(track, Track):
        return track
    check_named([track], TRACKS, "track")
    return TRACKS[track]


def _scorable(contest: Contest, detector: Detector, run: ScoredRun) -> bool:
    """Whether the track counts a run, for the detector's cadence.

    Who has no cadence, a control or a table of alarms, is scored on the runs of the first baseline that has one.
    """
    watching = (detector, *map(contest.detectors.get, contest.baselines))
    charts = next((watcher.charts for watcher in watching if watcher and watcher.charts), {})
    return contest.track.counts(run.onset, [positions for positions, _ in charts.get(run.trace.run_id, ())])


def run_scores(contest: Contest, divergences: Mapping[str, int | None] | None = None) -> pd.DataFrame:
    """One row a detector and a run of ``Contest.scored``.

    Columns: experiment, model, track, detector, kind, fault (or ``healthy``), seed, run_id, alarm, onset,
    divergence, reach (where the run's scoring ends), outcome, lead (restricted; NaN unless it diverges),
    share_of_possible_lead (of onset to divergence), detected (in time: ``scores.outcome.IN_TIME``), alarmed (at or
    after onset, however late), delay (alarm - onset, or what was waited in vain), degraded (never diverges, ends worse
    than every calibration run).
    divergences: by run id, another label than the primary. Declined detectors have no rows.
    """
    rows, keys, scored = [], contest.keys, contest.scored
    for name, detector in contest.detectors.items():
        if detector.declined:
            continue
        for run in scored:
            if not _scorable(contest, detector, run):
                continue
            run_id = run.trace.run_id
            divergence = run.divergence if divergences is None else divergences[run_id]
            alarm = detector.alarms[run_id]
            result = contest.score(detector, run, divergences)
            lead = np.nan if result.restricted_lead_steps is None else float(result.restricted_lead_steps)
            alarmed = run.onset is not None and alarm is not None and alarm >= run.onset
            watched_to = alarm if alarm is not None and alarmed else _last(run, contest)
            possible = np.nan if divergence is None or run.onset is None else divergence - run.onset
            rows.append(
                {
                    **keys,
                    "detector": name,
                    "kind": contest.kinds[name],
                    "fault": run.fault or "healthy",
                    "seed": run.seed,
                    "run_id": run_id,
                    "alarm": alarm,
                    "onset": run.onset,
                    "divergence": divergence,
                    "reach": run.horizon,
                    "outcome": result.outcome,
                    "lead": lead,
                    "share_of_possible_lead": lead / possible if lead > 0 else lead,
                    "detected": result.outcome in IN_TIME,
                    "alarmed": alarmed,
                    "delay": np.nan if run.onset is None else watched_to - run.onset,
                    "degraded": run.degraded,
                }
            )
    table = pd.DataFrame(rows)
    for column in ("alarm", "onset", "divergence"):
        table[column] = table[column].astype("Int64")
    return table


def _last(run: ScoredRun, contest: Contest) -> int:
    """How far the run was watched: its own end, at most the horizon."""
    done = run.trace.manifest["steps_done" if contest.experiment.axis == "steps" else "tokens_done"]
    return max(min(done, contest.experiment.horizon), run.onset or 0)


def mean_leads(scores: pd.DataFrame) -> pd.Series:
    """RMLT of each detector over all of its faulty runs that diverge; NaN if none does."""
    return scores[scores["fault"] != "healthy"].groupby("detector", sort=False)["lead"].mean()


def mean_shares(contest: Contest, scores: pd.DataFrame) -> pd.Series:
    """Share of the possible lead of each detector, faults weighted as boards do; NaN where it lacks a fault's runs."""
    by_fault = scores.groupby(["detector", "fault"], sort=False)["share_of_possible_lead"].mean().unstack()
    by_fault = by_fault.dropna(axis=1, how="all")
    weights = fault_weights([contest.experiment.fault_families[fault] for fault in by_fault.columns])
    return (by_fault * weights).sum(axis=1, skipna=False)
