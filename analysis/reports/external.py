"""The external track: what detectors of loss and gradient norm are worth on public logs with real failures."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from foreshock.analysis.detect.fixed_rules import SPIKE_RULES
from foreshock.analysis.reports.elsewhere import ALPHA_POOLED, Findings, findings
from foreshock.analysis.runs.elsewhere import LABELS, TRAIN_LOSS, cells_of
from foreshock.analysis.runs.experiment import HEALTHY
from foreshock.analysis.runs.external_logs import algoperf_runs, checksums, fp6_runs
from foreshock.analysis.runs.labels import LABEL_SIGNAL
from foreshock.analysis.scores.elsewhere import Judged, calibrated_scores, fixed_scores, summary
from foreshock.analysis.scores.outcome import restricted_mean_lead, score
from foreshock.experiments.trace import Trace

ALGOPERF, FP6, E2M3 = "AlgoPerf", "MX-FP6", "MX-FP6 E2M3"
WORKLOADS = {"AlgoPerf WMT": "wmt", "AlgoPerf ViT": "imagenet_vit"}
"""Parts of AlgoPerf, and how the names of their cells begin."""

E2M3_RUNS = "fp6_e2m3"
"""How the names of the six runs in E2M3 begin, all of which diverge."""

RISE_SCALES = (0.5, 1.0, 2.0)
"""The protocol's sensitivity of a label."""

RUN_COLUMNS = [
    "logs", "scope", "alpha", "detector", "cell", "run_id", "fault", "alarm", "divergence", "check_steps", "outcome",
    "lead",
]  # fmt: skip
"""Of ``runs.csv``, which has every failure, and the healthy runs that have an alarm."""

GRADIENT_NORM = "gradient norm over its median"
FACTORS = (1.25, 1.5, 1.75, 2.0, 2.5, 3.0)
ALPHA_FP6 = 0.05
"""21 healthy runs support it."""


@dataclass(frozen=True)
class External:
    """findings: by logs; tables: by file; factors: of them, how FP6 depends on the factor; says: by logs, sentences."""

    findings: Mapping[str, Findings]
    tables: Mapping[str, pd.DataFrame]
    logs_sha256: Mapping[str, str]

    @property
    def factors(self) -> pd.DataFrame:
        return self.tables["factors.csv"]

    @property
    def says(self) -> dict[str, tuple[str, ...]]:
        return {name: part.says for name, part in self.findings.items()}


def score_external(logs: Path) -> External:
    """Score the logs of a folder. Raises ValueError in one line where they are not what is documented."""
    known = checksums(logs)
    runs = {ALGOPERF: algoperf_runs(logs), FP6: fp6_runs(logs)}
    by_logs = {
        ALGOPERF: findings(cells_of(runs[ALGOPERF]), SPIKE_RULES),
        FP6: findings(cells_of(runs[FP6]), SPIKE_RULES, ALPHA_FP6),
    }
    scores = pd.concat([part.scores.assign(logs=name) for name, part in by_logs.items()], ignore_index=True)
    tables = {
        "detectors.csv": pd.concat([summary(part).assign(logs=name) for name, part in _parts(scores).items()]),
        "runs.csv": scores.loc[(scores["fault"] != HEALTHY) | scores["alarm"].notna(), RUN_COLUMNS],
        "rises.csv": _rises(by_logs, runs),
        "factors.csv": _factors(by_logs[FP6].judged, runs[FP6]),
        "left_out.csv": pd.concat([part.left_out.assign(logs=name) for name, part in by_logs.items()]),
    }
    return External(by_logs, {name: _logs_first(table) for name, table in tables.items()}, known)


def _parts(scores: pd.DataFrame) -> dict[str, pd.DataFrame]:
    """The runs behind each group of rows of ``detectors.csv``."""
    parts = {}
    for name in (ALGOPERF, FP6):
        parts[name] = scores[scores["logs"] == name]
        for part, begins in WORKLOADS.items() if name == ALGOPERF else ():
            parts[part] = parts[name][parts[name]["cell"].str.startswith(begins)]
    healthy = parts[FP6]["fault"] == HEALTHY
    parts[E2M3] = parts[FP6][healthy | parts[FP6]["run_id"].str.startswith(E2M3_RUNS)]
    return parts


def _logs_first(table: pd.DataFrame) -> pd.DataFrame:
    return table[["logs", *table.columns.drop("logs")]] if "logs" in table else table


def _rises(by_logs: Mapping[str, Findings], runs: Mapping[str, Sequence[Trace]]) -> pd.DataFrame:
    """What other rises of the loss as the label would say: pooled in AlgoPerf, in the cell in FP6, and fixed rules."""
    rows = []
    for name, label in ((ALGOPERF, LABEL_SIGNAL), (FP6, TRAIN_LOSS)):
        pooled, alpha = (True, ALPHA_POOLED) if name == ALGOPERF else (False, ALPHA_FP6)
        for rise in _other_rises(label):
            judged = by_logs[name].judged.labelled(cells_of(runs[name], {label: rise}))
            scores = [calibrated_scores(judged, alpha, pooled), fixed_scores(judged)]
            table = summary(pd.concat([part for part in scores if len(part)]))
            rows.append(table.assign(logs=name, rise_nats=rise))
    return pd.concat(rows, ignore_index=True)


def _other_rises(signal: str) -> list[float]:
    """The rise of a loss that is a failure, and the protocol's sensitivity of it, in nats."""
    own = next(label.rise_nats for label in LABELS if label.signal == signal)
    return [scale * own for scale in RISE_SCALES]


def _factors(judged: Judged, runs: Sequence[Trace]) -> pd.DataFrame:
    """One row a rise and factor: how the gradient norm over its median does on the six runs in E2M3.

    rise_nats: of the smoothed training loss, which is the label; leads, late, missed: of ``runs``; healthy_alarms: of
    healthy_runs, in E3M2 with at least 51 readings and without a rise at the label's own size.
    """
    (cell,) = judged.cells
    seen = judged.paths[GRADIENT_NORM][cell.name]
    rows = []
    for rise in _other_rises(TRAIN_LOSS):
        (labelled,) = cells_of(runs, {TRAIN_LOSS: rise})
        failed = [run for run in labelled.experiment.of("faulty") if run.trace.run_id.startswith(E2M3_RUNS)]
        for factor in FACTORS:
            alarms = {run: path.alarm(math.log(factor)) for run, path in seen.items()}
            scores = [
                score(
                    alarm=alarms[run.trace.run_id],
                    onset=run.onset,
                    divergence=run.divergence,
                    horizon=labelled.experiment.horizon,
                )
                for run in failed
            ]
            outcomes = [result.outcome for result in scores]
            rows.append(
                {
                    "rise_nats": rise,
                    "factor": factor,
                    "runs": len(failed),
                    "leads": outcomes.count("lead"),
                    "late": outcomes.count("late"),
                    "missed": outcomes.count("missed"),
                    "mean_lead_steps": restricted_mean_lead(scores),
                    "healthy_runs": len(cell.healthy),
                    "healthy_alarms": sum(alarms[run.trace.run_id] is not None for run in cell.healthy),
                }
            )
    return pd.DataFrame(rows)
