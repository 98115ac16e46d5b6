"""Score saved runs again, in seconds, with any detector: python -m analysis.score runs=DIR out=DIR

runs=DIR            reduced folders, folders with experiment.json beside their runs, or bare run folders
out=DIR             tables: leaderboard, runs, labels, charts, halves, selectivity, cross_talk, diagnosis, confusion
detector=FILE.py    one's own detector (analysis/entrants.py); may be given again
time_limit_s=120    what a detector's answers may take together, on one track of one experiment
memory_limit_gib=4  what its process may have
alarms=FILE.csv     one's own alarms: run_id, monitor, step; may be given again
rule=NAME           a file of conf/rule for every signal, instead of the experiment's own
alpha=NUMBER        false-alarm rate of a run, instead of the experiment's own
threshold=maximum   the largest of all calibration runs; without it conformal, at the rate of alpha
tracks=A,B          of reference, self, floor, published, universal; all by default
singles=true        every signal by itself too
allow_mixed=true    accept runs of different sources, data or torch, and say so
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import pandas as pd
from rich.console import Console

from analysis.alarms import AlarmRule, anytime_threshold, make_rule
from analysis.attribution import HEALTHY, alarm_probabilities, cross_talk, diagnose, selectivity
from analysis.contest import Contest, contest, mean_leads, mean_shares, run_scores
from analysis.costs import monitor_costs
from analysis.detection import Detection, Detector
from analysis.entrants import RIVER, Entrant, entrant_of
from analysis.experiment import LABEL_SIGNAL, Experiment
from analysis.external import read_alarms
from analysis.found import conf, find
from analysis.inference import keeps_rate, performance_profile
from analysis.isolation import DEFAULT_LIMITS, Limits
from analysis.leaderboard import RANKED, board
from analysis.leaderboard_figure import leaderboard_figure
from analysis.leaderboard_print import print_board
from analysis.sensitivity import halves, label_sensitivity
from analysis.tracks import TRACKS, catalogue, family
from experiments.trace import TraceError
from experiments.usage import show_help
from experiments.validation import check_distinct

LIMITS = {"time_limit_s": DEFAULT_LIMITS.time_s, "memory_limit_gib": DEFAULT_LIMITS.memory_gib}
CHARTS = ("shewhart", "ewma", "cusum", "glr", "shiryaev_roberts")
PROFILE_SHARES = tuple(i / 20 for i in range(21))


@dataclass(frozen=True)
class Request:
    """What was asked for on the command line."""

    runs: Path
    out: Path
    detectors: tuple[Path, ...] = ()
    alarms: tuple[Path, ...] = ()
    rule: str | None = None
    alpha: float | None = None
    tracks: tuple[str, ...] = TRACKS
    maximum: bool = False
    singles: bool = False
    allow_mixed: bool = False
    limits: Limits = DEFAULT_LIMITS


@dataclass
class Tables:
    """Every table of a replay, by the name of its file."""

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


ENTERED_ON = ("reference", "self")
"""Tracks with charts, on which a detector's statistic can be calibrated."""


def entrants(request: Request, experiment: Experiment, track: str) -> Iterator[Entrant]:
    """river's detectors on the first baseline's first signal, and the files that were given, on tracks with charts."""
    watched = experiment.named_detectors[experiment.baselines[0]][:1]
    if track == "reference":
        for name in RIVER:
            yield Entrant(f"river {name}", watched, make_rule(**conf("rule", name)))
    if track in ENTERED_ON:
        for path in request.detectors:
            with entrant_of(path, request.limits) as entrant:
                yield entrant


def replay(request: Request) -> Tables:
    """Score every experiment of the folder on every track. Raises ValueError, OSError or TraceError in one line."""
    unknown = [track for track in request.tracks if track not in TRACKS]
    if unknown:
        raise ValueError(f"tracks={unknown[0]} is not allowed: of {', '.join(TRACKS)}")
    check_distinct(request.tracks, "tracks")
    for given, key, judges in ((request.alarms, "alarms", ("reference",)), (request.detectors, "detector", ENTERED_ON)):
        if given and not set(judges) & set(request.tracks):
            raise ValueError(f"{key}={given[0]} has no effect without tracks={' or '.join(judges)}")
    rule = None if request.rule is None else make_rule(**conf("rule", request.rule))
    experiments, tables = find(request.runs, request.allow_mixed), Tables()
    external = read_alarms(request.alarms, experiments)
    for experiment, alarms in zip(experiments, external, strict=True):
        for track in request.tracks:
            detection = Detection(experiment, track)
            one = contest(
                experiment,
                track,
                detection=detection,
                rule=rule,
                alpha=request.alpha,
                maximum=request.maximum,
                entrants=entrants(request, experiment, track),
                external=alarms if track == "reference" else None,
                singles=request.singles,
            )
            if track == "universal" and all(one.detectors[name].declined for name in experiment.named_detectors):
                continue  # no monitor here predicts its noise: controls among themselves are no board
            _score(one, tables)
            if track == "reference":
                rows = tables.parts["leaderboard"][-1]
                request.out.mkdir(parents=True, exist_ok=True)
                name = experiment.index["experiment"]["name"]
                leaderboard_figure(one, rows, request.out / f"{name}-{experiment.model}.png")
                tables.add("charts", charts(detection, one, rule or make_rule(**experiment.index["rule"])))
                tables.add("labels", label_sensitivity(one))
    if "leaderboard" not in tables.parts:
        raise ValueError(f"tracks={','.join(request.tracks)} is not allowed: no monitor of these runs has a say on it")
    tables.write(request.out)
    return tables


def _score(one: Contest, tables: Tables) -> None:
    scores = run_scores(one)
    tables.add("runs", scores)
    tables.add("leaderboard", board(one, scores, monitor_costs(one.experiment.model)))
    keys = one.keys
    if any(detector.maxima and not detector.declined for detector in one.detectors.values()):
        half, tau = halves(one)
        tables.add("halves", half.assign(**keys, tau=tau))
    tables.add("profiles", profiles(one, scores))
    competing = scores[scores["kind"].isin(RANKED)]
    if competing.empty:  # no signal has a say on this track
        return
    matrix = alarm_probabilities(competing)
    tables.add(
        "selectivity",
        matrix.assign(selectivity=selectivity(matrix)).rename_axis("detector").reset_index().assign(**keys),
    )
    ours = {n: d.signals[0] for n, d in one.detectors.items() if one.kinds[n] in ("detector", "baseline")}
    families = {name: family(signal) for name, signal in ours.items() if signal != LABEL_SIGNAL}
    tables.add("cross_talk", cross_talk(matrix, families, designed_for(one)).assign(**keys))
    faulty = competing[competing["fault"] != HEALTHY]
    if one.track == "reference" and competing["fault"].nunique() > 1 and faulty["seed"].nunique() > 1:
        found = diagnose(alarm_sets(competing))
        summary = {"accuracy": found.accuracy, "null_accuracy": found.null_accuracy, "p_value": found.p_value}
        tables.add("diagnosis", pd.DataFrame([{**keys, "runs": len(found.predictions), **summary}]))
        tables.add("confusion", found.confusion.reset_index().assign(**keys))


def alarm_sets(scores: pd.DataFrame) -> pd.DataFrame:
    """Outcomes in which any alarm at any time counts: who names a fault does not know its onset or its end."""
    alarmed, healthy = scores["alarm"].notna(), scores["fault"] == HEALTHY
    outcome = np.select([alarmed & healthy, alarmed], ["false_alarm", "lead"], "quiet")
    return scores.assign(outcome=outcome)


ANSWERS = {
    "attention numerics": ("attention", "both"),
    "lr": ("ramp", "both"),
    "batch": ("batch8",),
    "aux loss off": ("aux_off",),
}
"""What the catalogue's ``answers_to`` calls the faults of the reference set."""


def designed_for(one: Contest) -> dict[str, set[str]]:
    """By family, the faults that the catalogue says its monitors answer to."""
    found: dict[str, set[str]] = {}
    for _, row in catalogue().iterrows():
        for cause in str(row["answers_to"]).split("; "):
            found.setdefault(row["family"], set()).update(set(ANSWERS.get(cause, ())) & set(one.experiment.faults))
    return found


def profiles(one: Contest, scores: pd.DataFrame) -> pd.DataFrame:
    """Performance profiles: the share of diverging runs with at least so much of onset to divergence as lead."""
    parts = []
    for name, mine in scores[scores["share_of_possible_lead"].notna()].groupby("detector", sort=False):
        share = performance_profile(mine["share_of_possible_lead"], PROFILE_SHARES)
        parts.append(pd.DataFrame({"detector": name, "share_of_possible_lead": PROFILE_SHARES, "share_of_runs": share}))
    table = pd.concat(parts, ignore_index=True) if parts else pd.DataFrame()
    return table.assign(**one.keys) if parts else table


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
            one = primary
        else:
            one = contest(detection.experiment, detection.track, rule=rule, alpha=primary.alpha, detection=detection)
        own = {n: one.detectors[n] for n in detection.experiment.named_detectors if not one.detectors[n].declined}
        calibration = {n: len(d.maxima) for n, d in own.items()}
        parts.append(_chart_rows(one.with_alarms({n: d.alarms for n, d in own.items()}), name, calibration))
        if name == "shiryaev_roberts":
            anytime = {n: _anytime_alarms(d, detection, primary.alpha) for n, d in own.items()}
            parts.append(_chart_rows(one.with_alarms(anytime), "shiryaev_roberts, anytime threshold", {}))
    return pd.concat(parts, ignore_index=True)


def _anytime_alarms(detector: Detector, detection: Detection, alpha: float) -> dict[str, int | None]:
    """A union over the signals of a family and the sides of each shares alpha; the theory is of charts as they are."""
    samples = max(len(where) for charts in detector.charts.values() for where, _ in charts)
    sides = sum(2 if detection.experiment.signals[s]["bad"] == "both" else 1 for s in detector.signals)
    return replace(detector, scales=()).alarms_at(anytime_threshold(samples, alpha / sides))


def _chart_rows(one: Contest, chart: str, calibration: Mapping[str, int]) -> pd.DataFrame:
    """calibration: by detector, the runs that set its threshold; none where a theory does."""
    scores = run_scores(one)
    faulty, healthy = (scores[(scores["fault"] == HEALTHY) == chosen].groupby("detector") for chosen in (False, True))
    table = pd.DataFrame(
        {
            "rmlt_steps": mean_leads(scores),
            "share_of_possible_lead": mean_shares(one, scores),
            "detected": faulty["detected"].mean(),
            "healthy_alarms": healthy["outcome"].agg(lambda outcomes: (outcomes == "false_alarm").sum()),
            "healthy_runs": healthy.size(),
        }
    )
    rates = table[["healthy_alarms", "healthy_runs"]].fillna(0).astype(int).itertuples()
    too_often = [not keeps_rate(alarms, runs, calibration.get(n, 0), one.alpha) for n, alarms, runs in rates]
    table.loc[too_often, ["rmlt_steps", "share_of_possible_lead"]] = np.nan
    return table.rename_axis("detector").reset_index().assign(**one.keys, chart=chart)


def _number(key: str, given: str | float) -> float:
    try:
        return float(given)
    except ValueError:
        raise ValueError(f"{key}={given} is not allowed: a number above 0") from None


def _request(arguments: Sequence[str]) -> Request:
    given: dict[str, list[str]] = {}
    for argument in arguments:
        key, _, value = argument.partition("=")
        given.setdefault(key, []).append(value)
    several = {"detector": "detectors", "alarms": "alarms"}
    single = {"runs", "out", "rule", "alpha", "threshold", "tracks", "singles", "allow_mixed", *LIMITS}
    for key, values in given.items():
        if key not in several and key not in single:
            raise ValueError(f"{key} is not an option: {', '.join(sorted({*several, *single}))}")
        if key in single and len(values) > 1:
            raise ValueError(f"{key} is given {len(values)} times")
    for key in ("runs", "out"):
        if not given.get(key, [""])[0]:
            raise ValueError(f"{key}=DIR is missing: python -m analysis.score runs=DIR out=DIR")
    for key in ("singles", "allow_mixed"):
        if given.get(key, ["false"])[0] not in ("true", "false"):
            raise ValueError(f"{key}={given[key][0]} is not allowed: true or false")
    if given.get("threshold", ["conformal"])[0] not in ("conformal", "maximum"):
        raise ValueError(f"threshold={given['threshold'][0]} is not allowed: conformal or maximum")
    if "alpha" in given and given.get("threshold") == ["maximum"]:
        raise ValueError("alpha has no effect with threshold=maximum: the calibration runs are all that sets it")
    alpha = given.get("alpha", [None])[0]
    try:
        rate = None if alpha is None else float(alpha)
    except ValueError:
        raise ValueError(f"alpha={alpha} is not allowed: between 0 and 1") from None
    if rate is not None and not 0 < rate < 1:
        raise ValueError(f"alpha={alpha} is not allowed: between 0 and 1")
    limits = Limits(*(_number(key, given.get(key, [default])[0]) for key, default in LIMITS.items()))
    return Request(
        runs=Path(given["runs"][0]),
        out=Path(given["out"][0]),
        detectors=tuple(Path(path) for path in given.get("detector", ())),
        alarms=tuple(Path(path) for path in given.get("alarms", ())),
        rule=given.get("rule", [None])[0],
        alpha=rate,
        tracks=tuple(given["tracks"][0].split(",")) if "tracks" in given else TRACKS,
        maximum=given.get("threshold") == ["maximum"],
        singles=given.get("singles", ["false"])[0] == "true",
        allow_mixed=given.get("allow_mixed", ["false"])[0] == "true",
        limits=limits,
    )


def main(arguments: Sequence[str]) -> None:
    show_help(arguments, __doc__)
    try:
        request = _request(arguments)
        tables = replay(request)
    except (ValueError, OSError, TraceError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(2)
    console = Console(width=None if sys.stdout.isatty() else 150)  # of the lines between its tables
    print_board(tables.get("leaderboard"), console)
    written = ", ".join(f"{name}.csv" for name in tables.parts)
    console.print(f"{request.out}: {written}", highlight=False, markup=False)
