"""An audit receipt for each scored run: what was watched, what was done to it, what was promised, what came out."""

from __future__ import annotations

import html
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from foreshock.analysis.detect.detection import Detector
from foreshock.analysis.runs.catalogue import catalogue
from foreshock.analysis.runs.experiment import Experiment, ScoredRun
from foreshock.analysis.scores.contest import Contest
from foreshock.analysis.scores.inference import MIN_SEEDS, clopper_pearson_interval, false_alarm_law

MODULES = {
    "attention_update": "attention projections W_Q, W_K, W_V, W_O",
    "random_matrix": "attention projections W_Q, W_K",
    "router": "router of each mixture-of-experts layer",
    "optimization": "whole model and optimizer",
    "observability": "whole model and fault sites",
}
ENDS = {
    "completed": "none: the run was left to train to its end",
    "diverged": "stopped by the trainer once the held-out loss stood far above its best; no rollback",
    "non_finite": "stopped by the trainer at the first non-finite loss; no rollback",
}


def receipt(contest: Contest, run: ScoredRun) -> dict[str, Any]:
    """The receipt of a faulty or healthy test run, as plain values; positions are on the experiment's axis."""
    experiment = contest.experiment
    index, manifest = experiment.index, run.trace.manifest
    counts = {role: sorted(run.seed for run in experiment.of(role)) for role in ("reference", "calibration", "test")}
    return {
        "run": {
            "run_id": run.trace.run_id,
            "experiment": index["experiment"]["name"],
            "model": experiment.model,
            "seed": run.seed,
            "role": run.role,
            "end_reason": run.trace.end_reason,
            "steps_done": manifest["steps_done"],
            "commit": manifest["git_commit"],
            "source_sha256": manifest["source_sha256"],
            "data_sha256": manifest["data_sha256"],
        },
        "fault": {
            "name": run.fault or "healthy",
            "family": run.trace.card.family,
            "injections": [asdict(injection) for injection in run.trace.card.injections],
            "injected": manifest.get("injected", []),
            "onset": run.onset,
        },
        "label": {
            "signal": "held-out loss, the same batch for every run",
            "divergence": run.divergence,
            "degraded": run.degraded,
            "drawup_threshold_nats": experiment.drawup_threshold_nats,
            "settings": index["label"],
        },
        "healthy_baseline": {role: {"runs": len(seeds), "seeds": seeds} for role, seeds in counts.items()},
        "alarms": [_alarm(contest, contest.detectors[name], run) for name in experiment.named_detectors],
        "recovery_action": ENDS.get(run.trace.end_reason, run.trace.end_reason),
        "limits": limits(experiment),
    }


def _alarm(contest: Contest, detector: Detector, run: ScoredRun) -> dict[str, Any]:
    experiment, known = contest.experiment, catalogue()
    described = {name: experiment.signals[name] for name in detector.signals}
    families = sorted({signal.family for signal in described.values()})
    said: dict[str, Any] = {
        "detector": detector.name,
        "module": [MODULES.get(name, name) for name in families],
        "signals": {
            name: known["definition"].get(one.reference, "not in the catalogue") for name, one in described.items()
        },
    }
    if detector.declined:
        return said | {"declined": detector.declined}
    healthy = [detector.alarms[run.trace.run_id] is not None for run in experiment.of("test")]
    realised = clopper_pearson_interval(sum(healthy), len(healthy))
    result = contest.score(detector, run)
    return said | {
        "rule": experiment.index["rule"],
        "track": "reference",
        "threshold": detector.threshold,
        "alpha": experiment.alpha,
        "false_alarm_rate_95": list(false_alarm_law(len(detector.maxima), experiment.alpha)[1:]),
        "healthy_alarms": sum(healthy),
        "healthy_runs": len(healthy),
        "realised_false_alarm_rate_95": list(realised) if healthy else None,
        "alarm": detector.alarms[run.trace.run_id],
        "outcome": result.outcome,
        "lead": result.restricted_lead_steps,
    }


def limits(experiment: Experiment) -> list[str]:
    """What these numbers do not say."""
    tests, faulty = len(experiment.of("test")), len({run.seed for run in experiment.of("faulty")})
    said = [
        "Reference track: every reading is held against healthy runs of the same configuration; a trainer without such "
        "runs could not have had this alarm.",
        "The false-alarm rate holds on average over calibrations; the interval beside it is what this one may have.",
        f"One model ({experiment.model}), one corpus, one fault at a time as listed; positions in {experiment.axis}.",
    ]
    if tests < MIN_SEEDS:
        said.append(f"Only {tests} healthy test runs: the realised false-alarm rate is hardly known.")
    if faulty < MIN_SEEDS:
        said.append(f"Only {faulty} faulty seeds: exploratory, no interval over seeds.")
    if experiment.mixed:
        said.append(f"Runs of different make were accepted on request: {'; '.join(experiment.mixed)}.")
    return said


def as_markdown(content: dict[str, Any], axis: str) -> str:
    """The receipt for people. Names out of files are escaped: Markdown passes HTML on."""
    run, fault, label = content["run"], content["fault"], content["label"]
    never = "none"
    lines = [
        f"# Audit receipt: run {_text(run['run_id'])}",
        "",
        f"{_text(run['experiment'])}, {_text(run['model'])}, seed {run['seed']} ({run['role']}); ended "
        f"{run['end_reason']} after {run['steps_done']:,} steps; sources {run['source_sha256'][:12]}.",
        "",
        f"**Fault:** {_text(fault['name'])}, onset {never if fault['onset'] is None else fault['onset']}: "
        f"`{json.dumps(fault['injections'])}`",
        "",
        f"**Divergence:** {never if label['divergence'] is None else format(label['divergence'], ',')} ({axis}); "
        f"{label['signal']}, {label['drawup_threshold_nats']:.3f} nats above its minimum"
        f"{'; ended degraded' if label['degraded'] else ''}.",
        "",
        "**Healthy runs:** "
        + ", ".join(f"{seeds['runs']} {role}" for role, seeds in content["healthy_baseline"].items()),
        "",
        f"**Recovery action:** {content['recovery_action']}.",
        "",
        f"| detector | module | threshold | alarm ({axis}) | outcome | lead | healthy alarms |",
        "|---|---|---|---|---|---|---|",
    ]
    for alarm in content["alarms"]:
        name, module = _text(alarm["detector"]), _text("; ".join(alarm["module"]))
        if "declined" in alarm:
            lines.append(f"| {name} | {module} | declined: {_text(alarm['declined'])} | | | | |")
            continue
        realised = alarm["realised_false_alarm_rate_95"]
        interval = f" ({realised[0]:.0%} to {realised[1]:.0%})" if realised else ""
        lines.append(
            f"| {name} | {module} | {alarm['threshold']:.4g} at {alarm['alpha']:.0%} | "
            f"{never if alarm['alarm'] is None else format(alarm['alarm'], ',')} | {alarm['outcome']} | "
            f"{'–' if alarm['lead'] is None else format(alarm['lead'], ',')} | "
            f"{alarm['healthy_alarms']}/{alarm['healthy_runs']}{interval} |"
        )
    return "\n".join([*lines, "", "**Limits**", "", *(f"- {limit}" for limit in content["limits"]), ""])


def _text(name: str) -> str:
    """A name as it stands in a line or a cell of Markdown."""
    return html.escape(" ".join(name.split()), quote=False).replace("|", "\\|")


def write_receipts(contest: Contest, folder: Path) -> int:
    """``<run id>.json`` and ``.md`` for every faulty and healthy test run; how many runs."""
    experiment = contest.experiment
    folder.mkdir(parents=True, exist_ok=True)
    runs = experiment.of("faulty", "test")
    for run in runs:
        content = receipt(contest, run)
        (folder / f"{run.trace.run_id}.json").write_text(
            json.dumps(content, indent=1, allow_nan=False) + "\n", encoding="utf-8"
        )
        (folder / f"{run.trace.run_id}.md").write_text(as_markdown(content, experiment.axis), encoding="utf-8")
    return len(runs)
