"""Whether an experiment can be scored as it asks, found out before a step is trained."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from foreshock.analysis.detect.alarms import conformal_rank
from foreshock.analysis.detect.bands import MIN_REFERENCE_RUNS
from foreshock.analysis.detect.controls import CONTROLS
from foreshock.analysis.detect.rules import make_rule
from foreshock.analysis.reports.kinds.by_name import kind_named
from foreshock.analysis.runs.checks import check_alike
from foreshock.analysis.runs.conf import Conf
from foreshock.analysis.runs.experiment import HEALTHY
from foreshock.analysis.runs.index import Seeds
from foreshock.analysis.scores.contest import ALL_FAULTS
from foreshock.experiments.build import Run
from foreshock.experiments.plain_config import monitors_of
from foreshock.experiments.plan import PlannedRun
from foreshock.experiments.trace import Trace
from foreshock.experiments.training.run_writer import HELD_OUT
from foreshock.experiments.validation import check_named, check_node, nearest
from foreshock.faults.base import Fault
from foreshock.monitors.base import Signal


def check_settings(
    settings: Mapping[str, Any], experiment: Mapping[str, Any], given: Sequence[str], conf: Conf | None = None
) -> None:
    """Every setting of the scoring that can be judged without a run.

    settings: the whole composed configuration; experiment: its experiment as chosen; given: the command line's
    overrides; conf: where kinds of reports are. Raises ValueError, in one line that names the key.
    """
    make_rule(**settings["rule"])
    if "cases" in experiment:
        return
    _check_seeds(settings, experiment)
    _check_names(experiment, settings["experiment"]["faults"], given)
    kind_named(experiment.get("draw"), conf or Conf()).check(experiment)
    for name, fault in experiment["faults"].items():
        if fault.get("overrides") is None:
            raise ValueError(f"experiment.faults.{name}.overrides is missing: what switches the fault on")
    for claim in experiment.get("claims", []):
        tests = [test for test in ("alarms", "falls", "rises") if claim.get(test)]
        if len(tests) != 1 or (tests != ["alarms"] and not claim.get("panel")):
            raise ValueError(
                f"experiment.claims: {claim['says']!r} is not allowed: one of alarms, falls and rises, "
                "the last two with a panel"
            )


def _check_seeds(settings: Mapping[str, Any], experiment: Mapping[str, Any]) -> None:
    where, alpha = "experiment" if "seeds" in experiment else "scale", settings["scale"]["alpha"]
    seeds: Any = (experiment if where == "experiment" else settings["scale"]).get("seeds")
    check_node(Seeds, seeds, f"{where}.seeds")
    for role, least in (("reference", MIN_REFERENCE_RUNS), ("faulty", 1)):
        if seeds.get(role, least) < least:
            raise ValueError(f"{where}.seeds.{role}={seeds[role]} is not allowed: scoring needs at least {least}")
    try:
        conformal_rank(seeds.get("calibration", 0), alpha)
    except ValueError as error:
        raise ValueError(f"{where}.seeds.calibration={seeds.get('calibration')} is not allowed: {error}") from None


def _check_taken(names: Iterable[str], taken: Collection[str], where: str) -> None:
    """Raises ValueError for a name that a row of every table has already."""
    name = next((name for name in names if name in taken), None)
    if name is not None:
        raise ValueError(f"{where}.{name} is not allowed: tables have a row of that name; give it another")


def _dropped(given: Sequence[str], where: str) -> set[str]:
    """The names below a key that the command line dropped: ``~experiment.faults.ramp``."""
    return {line.removeprefix(f"~{where}.").split("=")[0] for line in given if line.startswith(f"~{where}.")}


def _check_names(experiment: Mapping[str, Any], configured: Iterable[str], given: Sequence[str]) -> None:
    """Detectors and faults that an experiment refers to are there, or were dropped on purpose.

    configured: the experiment's faults, those among them that ``experiment.only`` leaves out.
    """
    baseline = experiment["baseline"]
    check_named([baseline] if isinstance(baseline, str) else baseline, experiment["detectors"], "experiment.baseline")
    _check_taken(experiment["detectors"], CONTROLS, "experiment.detectors")
    _check_taken(experiment["faults"], (HEALTHY, ALL_FAULTS), "experiment.faults")
    detectors = {*experiment["detectors"], *_dropped(given, "experiment.detectors")}
    faults = {*experiment["faults"], *configured, *_dropped(given, "experiment.faults")}
    ignored, claims = experiment.get("should_ignore", {}), experiment.get("claims", [])
    for key in ("groups", "headline"):
        check_named(experiment.get(key, []), sorted(detectors), f"experiment.{key}")
    check_named(ignored, sorted(detectors), "experiment.should_ignore")
    for family, names in ignored.items():
        check_named(names, sorted(faults), f"experiment.should_ignore.{family}")
    for key in ("cost_faults", "controls"):
        check_named(experiment.get(key, []), sorted(faults), f"experiment.{key}")
    for claim in claims:
        if claim.get("alarms"):
            check_named([claim["alarms"]["detector"]], sorted(detectors), "experiment.claims.alarms.detector")
            check_named([claim["alarms"]["fault"]], sorted(faults), "experiment.claims.alarms.fault")
        for test in ("falls", "rises"):
            check_named(claim.get(test) or [], ["healthy", *sorted(faults)], f"experiment.claims.{test}")


def check_runs(
    settings: Mapping[str, Any],
    experiment: Mapping[str, Any],
    planned: Sequence[PlannedRun],
    runs: Sequence[Run],
    conf: Conf | None = None,
) -> None:
    """What only the built runs tell: whether some monitor has every signal (one of ``conf/monitor`` that is not
    configured counts for detectors and panels, which are then left out), the label enough evaluations, every fault
    a run of its own, and a threshold healthy runs that are alike.

    Raises ValueError or TraceError, in one line that names the key.
    """
    signals = _signals_of(runs)
    if "cases" in experiment:
        _check_signals(list(experiment["laws"].values()), signals, "experiment.laws")
        return
    _check_taken(experiment["detectors"], signals, "experiment.detectors")
    _check_scored(experiment.get("score_every", 1), min(run.train.steps for run in runs))
    known = signals.keys() | {signal.name for monitor in monitors_of(True).values() for signal in monitor.signals}
    for name, wanted in experiment["detectors"].items():
        _check_signals(wanted, known, f"experiment.detectors.{name}")
    for name, panel in experiment["figure"].items():
        _check_signals(panel["signals"], known, f"experiment.figure.{name}.signals")
    _check_watched(experiment, runs)
    for claim in experiment.get("claims", []):
        if claim.get("panel"):
            _check_signals(claim["panel"]["signals"], signals, "experiment.claims.panel.signals")
    _check_signals(experiment.get("drift", []), signals, "experiment.drift")
    for name in experiment.get("drift", []):
        if signals[name].axes != ("layer", "head"):
            raise ValueError(f"experiment.drift={name!r} is not allowed: a signal of layers and heads")
    kind = kind_named(experiment["draw"], conf or Conf())
    kind.check_signals(signals.values())
    if kind.by_size and not any(_has_bits(run.fault) for run in runs):
        raise ValueError(
            f"experiment.draw={experiment['draw']} is not allowed: no fault of this experiment has a number of bits"
        )
    _check_evaluations(settings["label"]["consecutive"], runs)
    _check_faults(planned, runs)


def _signals_of(runs: Sequence[Run]) -> dict[str, Signal]:
    """What the configured monitors of these runs record, and the loop, by name."""
    return {name: signal for run in runs for name, signal in run.signals.items()} | {HELD_OUT.name: HELD_OUT}


def unwatched(experiment: Mapping[str, Any], runs: Sequence[Run]) -> list[str]:
    """The detectors all of whose signals belong to monitors that are not configured (``monitor=[...]``): no table has
    them."""
    signals = _signals_of(runs)
    detectors = experiment.get("detectors", {})
    return [name for name, wanted in detectors.items() if not any(signal in signals for signal in wanted)]


def _check_watched(experiment: Mapping[str, Any], runs: Sequence[Run]) -> None:
    """Some baseline, some panel and, where there is one, the family of the figure have signals that are recorded."""
    baseline, absent, signals = experiment["baseline"], unwatched(experiment, runs), _signals_of(runs)
    names = [baseline] if isinstance(baseline, str) else baseline
    if all(name in absent for name in names):
        raise ValueError(f"experiment.baseline={', '.join(names)}: no configured monitor has their signals")
    if experiment.get("family") in absent:
        raise ValueError(f"experiment.family={experiment['family']}: no configured monitor has its signals")
    panels = experiment["figure"]
    if panels and not any(signals.keys() >= set(panel["signals"]) for panel in panels.values()):
        raise ValueError(f"experiment.figure={', '.join(panels)}: no configured monitor has the signals of a panel")


def _has_bits(fault: Fault) -> bool:
    """Whether it is one bit operation that changes something."""
    card = fault.describe()
    return len(card.injections) == 1 and "bits" in card.injections[0].size and not card.control


def _check_signals(names: Sequence[str], known: Collection[str], where: str) -> None:
    for name in names:
        if name not in known:
            raise ValueError(f"{where}: no configured monitor has a signal {name!r}{nearest(name, known)}")


def _check_scored(every: int, steps: int) -> None:
    """Some step of the shortest run is scored. A detector without a reading there is declined in the report."""
    if every > steps:
        raise ValueError(f"experiment.score_every={every} is not allowed: at most {steps}, the steps of a run")


def _check_faults(planned: Sequence[PlannedRun], runs: Sequence[Run]) -> None:
    """Faulty runs have a fault, no two faults are one run, and nothing else tells faulty from healthy runs."""
    named: dict[str, str | None] = {}
    for cell, run in zip(planned, runs, strict=True):
        if cell.role == "faulty" and run.fault.onset is None:
            raise ValueError(f"experiment.faults.{cell.fault}.overrides switch no fault on")
        other = named.setdefault(run.run_id, cell.fault)
        if other != cell.fault:
            raise ValueError(f"experiment.faults.{cell.fault} is not allowed: it has the runs of {other!r}")
    for model in dict.fromkeys(cell.model for cell in planned):
        check_alike([_to_be(run) for cell, run in zip(planned, runs, strict=True) if cell.model == model])


def _to_be(run: Run) -> Trace:
    """What is known of a run's trace before it is trained."""
    return Trace(run.run_id, Path(), {"config": run.nodes, "onset_step": run.fault.describe().first_step})


def _check_evaluations(consecutive: int, runs: Sequence[Run]) -> None:
    shortest = min((run.train for run in runs), key=lambda train: train.steps // train.held_out_every_steps)
    evaluations = shortest.steps // shortest.held_out_every_steps + 1  # the first is before any update
    if consecutive > evaluations:
        raise ValueError(
            f"label.consecutive={consecutive} is not allowed: a run of train.steps={shortest.steps} with "
            f"train.held_out_every_steps={shortest.held_out_every_steps} has {evaluations} evaluations"
        )
