"""An experiment from one command: train its runs, score them, draw the report.

    python -m experiments.reproduce experiment=paper_attention scale=laptop

Runs are shared by identity: what another experiment has trained already is not trained again, and a
broken sweep goes on where it stopped. The runs are handed to the configured Hydra launcher (joblib on
one machine, submitit on a cluster), as ``-m`` would hand it a grid.
"""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import hydra
from hydra import compose
from hydra._internal.callbacks import Callbacks
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.plugins import Plugins
from hydra.core.utils import JobStatus
from hydra.types import HydraContext
from omegaconf import DictConfig, OmegaConf, open_dict

from analysis.align import AXES
from analysis.report import make_report
from experiments import trace
from experiments.build import Run, build_run
from experiments.cli import CONF, USER_ERRORS, guarded, one_line_errors
from experiments.loop import RunError
from experiments.pieces import Unfinished, in_pieces
from experiments.plan import PlannedRun, plan
from experiments.progress import SweepProgress
from experiments.train import describe, run_one

CONFIG_NAME = "reproduce"


def train_quietly(config: DictConfig) -> dict[str, Any]:
    """What a launcher's worker does with one run: no bar of its own; a mistake comes back as one line."""
    with open_dict(config):
        config.quiet = True
    try:
        return run_one(config)
    except USER_ERRORS as error:
        return {"error": " ".join(str(error).split())}


def build_all(planned: Sequence[PlannedRun], given: Sequence[str]) -> list[Run]:
    """Check and identify every run before the first one trains; one corpus serves all."""
    runs: list[Run] = []
    for cell in planned:
        config = compose(CONFIG_NAME, overrides=[*given, *cell.overrides])
        runs.append(build_run(config, corpus=runs[0].corpus if runs else None))
    return runs


def launch(pending: Sequence[PlannedRun], given: Sequence[str]) -> list[dict[str, Any]]:
    """Train the runs by the configured launcher; what each returned, in order."""
    master = compose(CONFIG_NAME, overrides=[*HydraConfig.get().overrides.hydra, *given], return_hydra_config=True)
    launcher = Plugins.instance().instantiate_launcher(
        hydra_context=HydraContext(config_loader=GlobalHydra.instance().config_loader(), callbacks=Callbacks()),
        task_function=train_quietly,
        config=master,
    )
    jobs = launcher.launch([[*given, *cell.overrides] for cell in pending], initial_job_idx=0)
    return [
        job.return_value if job.status is JobStatus.COMPLETED else {"error": repr(job._return_value)} for job in jobs
    ]


def is_done(folder: Path) -> bool:
    manifest = trace.read_manifest(folder)
    return manifest is not None and manifest["end_reason"] in trace.FINAL_REASONS


def sweep(planned: Sequence[PlannedRun], runs: Sequence[Run], out: Path, given: Sequence[str]) -> dict[str, Any] | None:
    """Train the runs that are not there yet; how long that took and how busy the cores were, or None.

    Raises RunError where runs failed, after all others are done, and Unfinished where ``train.piece_s`` is over.
    """
    pending = [(cell, run) for cell, run in zip(planned, runs, strict=True) if not is_done(out / run.run_id)]
    if not pending:
        return None
    started = time.monotonic()
    at_once, piece_s = HydraConfig.get().launcher.get("n_jobs", 1), pending[0][1].train.piece_s
    with SweepProgress({out / run.run_id: run.train.steps for run in runs}):
        if piece_s is None:
            results = launch([cell for cell, _ in pending], given)
        else:
            cells = [cell for cell, _ in pending]
            results = in_pieces(
                cells, at_once, piece_s, lambda some, left_s: launch(some, [*given, f"train.piece_s={left_s}"])
            )
    wall_s = time.monotonic() - started
    failed = [(run, result) for (_, run), result in zip(pending, results, strict=False) if "error" in result]
    if failed:
        run, result = failed[0]
        raise RunError(
            f"{len(failed)} of {len(pending)} runs failed and can be resumed by the same command; "
            f"the first, {run.run_id} (seed {run.seed}): {result['error']}"
        )
    unfinished = sum(not is_done(out / run.run_id) for _, run in pending)
    if unfinished:
        raise Unfinished(
            f"{unfinished} runs are left after train.piece_s={piece_s:g} seconds; the same command goes on"
        )
    processes = min(at_once, len(pending))
    cpu_s = sum(result["cpu_s"] for result in results)
    return {
        "trained": len(pending),
        "wall_s": round(wall_s, 1),
        "processes": processes,
        "busy": round(cpu_s / (processes * wall_s), 3),
    }


def chosen_experiment(settings: Mapping[str, Any], given: Sequence[str]) -> dict[str, Any]:
    """The composed experiment, its ``align`` replaced by a top-level one.

    Raises ValueError on an unknown axis, and on an override that every run would undo.
    """
    for line in given:
        if line.startswith("model="):
            raise ValueError(
                f"{line} has no effect on an experiment: set experiment.models=[...], or scale.dense and scale.moe"
            )
    align = settings["experiment"]["align"] if settings["align"] is None else [settings["align"]]
    if not align or not set(align) <= set(AXES):
        raise ValueError(f"align={','.join(align)} is not allowed: {' or '.join(AXES)}")
    return {**settings["experiment"], "align": align}


@hydra.main(version_base="1.3", config_path=CONF, config_name=CONFIG_NAME)
@one_line_errors
def main(config: DictConfig) -> None:
    settings = OmegaConf.to_container(config, resolve=True)
    given = list(HydraConfig.get().overrides.task)
    experiment = chosen_experiment(settings, given)
    seeds = experiment.get("seeds", settings["scale"]["seeds"])
    planned = plan(seeds, experiment["faults"], experiment["models"], experiment.get("overrides", ()))
    runs = build_all(planned, given)
    if config.dry_run:
        for cell, run in zip(planned, runs, strict=True):
            print(f"{run.run_id}  {cell.model:<9}  {cell.role:<11}  seed {cell.seed:<5} {cell.fault or 'healthy'}")
        for model in experiment["models"]:
            cell_of_model = [cell.model for cell in planned].index(model)
            print(f"{model}, each: {describe(runs[cell_of_model])}")
        return
    out, report = Path(config.out), Path(config.report)
    timing = None if config.score_only else sweep(planned, runs, out, given)
    report.mkdir(parents=True, exist_ok=True)
    index = {
        "experiment": experiment,
        "scale": settings["scale"],
        "label": settings["label"],
        "rule": settings["rule"],
        "sweep": timing,
        "runs": [{**dataclasses.asdict(cell), "run_id": run.run_id} for cell, run in zip(planned, runs, strict=True)],
    }
    trace.write_whole(report / "experiment.json", json.dumps(index, indent=1).encode() + b"\n")
    make_report(report, out)


if __name__ == "__main__":
    guarded(main, CONFIG_NAME)
