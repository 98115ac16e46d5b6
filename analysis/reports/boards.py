"""Boards: every experiment of a folder scored on every track, as tables."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pandas as pd

from foreshock.analysis.detect.detection import Detection
from foreshock.analysis.detect.entrants import Entrant, entrant_of
from foreshock.analysis.detect.external import read_alarms
from foreshock.analysis.detect.isolation import DEFAULT_LIMITS, Limits
from foreshock.analysis.detect.river import RIVER
from foreshock.analysis.detect.rules import make_rule
from foreshock.analysis.detect.tracks.base import Track
from foreshock.analysis.detect.tracks.by_name import tracks_of
from foreshock.analysis.figures.leaderboard import leaderboard_figure
from foreshock.analysis.locate.attribution import alarm_probabilities, cross_talk, diagnose, selectivity
from foreshock.analysis.locate.selectivity import any_alarm, designed_for
from foreshock.analysis.runs.conf import Conf, conf
from foreshock.analysis.runs.discover import find
from foreshock.analysis.runs.experiment import HEALTHY, Experiment
from foreshock.analysis.runs.labels import LABEL_SIGNAL
from foreshock.analysis.scores.contest import Contest, contest, run_scores
from foreshock.analysis.scores.costs import monitor_costs
from foreshock.analysis.scores.leaderboard import RANKED, board
from foreshock.analysis.scores.other_charts import charts
from foreshock.analysis.scores.profiles import profiles
from foreshock.analysis.scores.sensitivity import halves, label_sensitivity
from foreshock.experiments.names import check_distinct
from foreshock.experiments.validation import check_named


@dataclass(frozen=True)
class Request:
    """What was asked for on the command line. tracks: None for all of ``conf``, where rules and tracks are found."""

    runs: Path
    out: Path
    detectors: tuple[Path, ...] = ()
    alarms: tuple[Path, ...] = ()
    rule: str | None = None
    alpha: float | None = None
    tracks: tuple[str, ...] | None = None
    maximum: bool = False
    singles: bool = False
    allow_mixed: bool = False
    limits: Limits = DEFAULT_LIMITS
    conf: Conf = field(default_factory=Conf)


@dataclass
class Tables:
    """Every table of the boards, by the name of its file."""

    parts: dict[str, list[pd.DataFrame]] = field(default_factory=dict)

    def add(self, name: str, table: pd.DataFrame) -> None:
        if len(table):
            self.parts.setdefault(name, []).append(table)

    def get(self, name: str) -> pd.DataFrame:
        return pd.concat(self.parts[name], ignore_index=True) if name in self.parts else pd.DataFrame()

    def write(self, out: Path) -> None:
        out.mkdir(parents=True, exist_ok=True)
        for name in self.parts:
            self.get(name).to_csv(out / f"{name}.csv", index=False, float_format="%.6g")


def entrants(request: Request, experiment: Experiment, track: Track) -> Iterator[Entrant]:
    """river's detectors on the first baseline's first signal, and the files that were given, on tracks with charts."""
    watched = experiment.named_detectors[experiment.baselines[0]][:1]
    if track.primary:
        for name in RIVER:
            yield Entrant(f"river {name}", watched, make_rule(**conf("rule", name)))
    if track.takes_files:
        for path in request.detectors:
            with entrant_of(path, request.limits) as entrant:
                yield entrant


def _chosen_tracks(request: Request) -> list[Track]:
    """The tracks that were asked for.

    Raises ValueError for one that there is not, and where what was given enters on none of them.
    """
    known = tracks_of(request.conf)
    names = tuple(known) if request.tracks is None else request.tracks
    check_named(names, known, "tracks")
    check_distinct(names, "tracks")
    primary = [track.name for track in known.values() if track.primary]
    open_to_files = [track.name for track in known.values() if track.takes_files]
    for given, key, judges in ((request.alarms, "alarms", primary), (request.detectors, "detector", open_to_files)):
        if given and not set(judges) & set(names):
            raise ValueError(f"{key}={given[0]} has no effect without tracks={' or '.join(judges)}")
    return [known[name] for name in names]


def score_runs(request: Request) -> Tables:
    """Score every experiment of the folder on every track. Raises ValueError, OSError or TraceError in one line."""
    tracks = _chosen_tracks(request)
    rule = None if request.rule is None else make_rule(**request.conf.content("rule", request.rule))
    experiments, tables = find(request.runs, request.allow_mixed), Tables()
    external = read_alarms(request.alarms, experiments)
    for experiment, alarms in zip(experiments, external, strict=True):
        for track in tracks:
            detection = Detection(experiment, track)
            held = contest(
                experiment,
                track,
                detection=detection,
                rule=rule,
                alpha=experiment.smallest_alpha if request.maximum else request.alpha,
                entrants=entrants(request, experiment, track),
                external=alarms if track.primary else None,
                singles=request.singles,
            )
            if not track.lists_declined and all(detector.declined for detector in held.own.values()):
                continue
            _score(held, tables)
            if track.primary:
                rows = tables.parts["leaderboard"][-1]
                request.out.mkdir(parents=True, exist_ok=True)
                name = experiment.index["experiment"]["name"]
                leaderboard_figure(held, rows, request.out / f"{name}-{experiment.model}.png")
                tables.add("charts", charts(detection, held, rule or make_rule(**experiment.index["rule"])))
                tables.add("labels", label_sensitivity(held))
    if "leaderboard" not in tables.parts:
        names = ",".join(track.name for track in tracks)
        raise ValueError(f"tracks={names} is not allowed: no monitor of these runs has a say on it")
    tables.write(request.out)
    return tables


def _score(held: Contest, tables: Tables) -> None:
    scores = run_scores(held)
    tables.add("runs", scores)
    tables.add("leaderboard", board(held, scores, monitor_costs(held.experiment.model)))
    keys = held.keys
    if any(len(detector.maxima) > 1 and not detector.declined for detector in held.detectors.values()):
        half, tau = halves(held)
        tables.add("halves", half.assign(**keys, tau=tau))
    tables.add("profiles", profiles(held, scores))
    competing = scores[scores["kind"].isin(RANKED)]
    if competing.empty:  # no signal has a say on this track
        return
    matrix = alarm_probabilities(competing)
    tables.add(
        "selectivity",
        matrix.assign(selectivity=selectivity(matrix)).rename_axis("detector").reset_index().assign(**keys),
    )
    ours = {n: d.signals[0] for n, d in held.detectors.items() if held.kinds[n] in ("detector", "baseline")}
    families = {name: held.experiment.signals[signal].family for name, signal in ours.items() if signal != LABEL_SIGNAL}
    tables.add("cross_talk", cross_talk(matrix, families, designed_for(held)).assign(**keys))
    faulty = competing[competing["fault"] != HEALTHY]
    if held.track.primary and competing["fault"].nunique() > 1 and faulty["seed"].nunique() > 1:
        diagnosis = diagnose(any_alarm(competing))
        summary = {
            "accuracy": diagnosis.accuracy,
            "null_accuracy": diagnosis.null_accuracy,
            "p_value": diagnosis.p_value,
        }
        tables.add("diagnosis", pd.DataFrame([{**keys, "runs": len(diagnosis.predictions), **summary}]))
        tables.add("confusion", diagnosis.confusion.reset_index().assign(**keys))
