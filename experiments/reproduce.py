"""An experiment from one command: train its runs, score them, draw the report.

    python -m experiments.reproduce experiment=paper_attention scale=laptop

Runs are shared by identity: what another experiment has trained already is not trained again, and a
broken sweep goes on where it stopped. The runs are handed to the configured Hydra launcher (joblib on
one machine, submitit on a cluster), as ``-m`` would hand it a grid. With ``train.stack=N`` a job is a stack of up to
N runs, trained together along a model axis; runs that cannot be stacked are trained one by one.
"""

from __future__ import annotations

import dataclasses
import json
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from functools import partial
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
from joblib import effective_n_jobs
from omegaconf import DictConfig, OmegaConf, open_dict

from analysis.align import AXES
from analysis.report import make_report
from experiments import trace
from experiments.build import Run, build_run
from experiments.checkpoint import RunError
from experiments.cli import CONF, USER_ERRORS, guarded, one_line_errors
from experiments.names import check_name
from experiments.pieces import Unfinished, in_pieces
from experiments.plan import PlannedRun, plan
from experiments.progress import StackProgress, SweepProgress
from experiments.stacked_loop import train_stack
from experiments.stacking import stacks, why_single
from experiments.train import describe, run_one, train_shown

CONFIG_NAME = "reproduce"


def train_quietly(jobs: Sequence[Sequence[Sequence[str]]], config: DictConfig) -> list[dict[str, Any]]:
    """What a launcher's worker does with one job: no bar of its own; a mistake comes back as one line for every run.

    jobs: of every job, its runs' overrides; config: of this job's first run.
    """
    with open_dict(config):
        config.quiet = True
    members = jobs[HydraConfig.get().job.num]
    try:
        return run_together(members, Path(config.out)) if config.train.stack > 1 else [run_one(config)]
    except USER_ERRORS as error:
        return [{"error": " ".join(str(error).split())}] * len(members)


def run_together(members: Sequence[Sequence[str]], out: Path) -> list[dict[str, Any]]:
    """Build and train a stack, or the one run that cannot be in one; their manifests. members: the runs' overrides."""
    runs = build_all(members)  # launchers hand Hydra's state on to their workers, so that it composes there
    if why_single(runs[0]) is not None:
        return [train_shown(runs[0], out, show=False)]
    with StackProgress() as progress:
        return train_stack(runs, out, progress)


def build_all(members: Sequence[Sequence[str]]) -> list[Run]:
    """Compose, check and identify runs; one corpus serves all. members: the runs' overrides, the seed last.

    Runs that differ in their seed alone are composed once: composing takes a third of a second.
    """
    runs: list[Run] = []
    composed: dict[tuple[str, ...], DictConfig] = {}
    for *shared, seed in members:
        if tuple(shared) not in composed:
            composed[tuple(shared)] = compose(CONFIG_NAME, overrides=shared)
        config = composed[tuple(shared)]
        config.seed = int(seed.removeprefix("seed="))
        runs.append(build_run(config, corpus=runs[0].corpus if runs else None))
    return runs


def with_launcher(given: Sequence[str]) -> DictConfig:
    """The command's configuration with Hydra's own, of which the launcher is a part."""
    return compose(CONFIG_NAME, overrides=[*HydraConfig.get().overrides.hydra, *given], return_hydra_config=True)


def at_once(launcher: Mapping[str, Any]) -> int:
    """How many jobs a launcher runs at a time: joblib's limit or submitit's, 1 where it has none."""
    if "n_jobs" in launcher:
        if not isinstance(launcher["n_jobs"], int) or launcher["n_jobs"] == 0:
            raise ValueError(f"at_once={launcher['n_jobs']} is not allowed: at least 1, or -1 for a run on every core")
        return effective_n_jobs(launcher["n_jobs"])
    return launcher.get("array_parallelism", 1)


def launch(
    jobs: Sequence[Sequence[PlannedRun]], given: Sequence[str], config: DictConfig
) -> list[list[dict[str, Any]]]:
    """Train stacks of runs by the launcher in ``config``; what each run returned, in order."""
    overrides = [[[*given, *cell.overrides] for cell in job] for job in jobs]
    launcher = Plugins.instance().instantiate_launcher(
        hydra_context=HydraContext(config_loader=GlobalHydra.instance().config_loader(), callbacks=Callbacks()),
        task_function=partial(train_quietly, overrides),
        config=config,
    )
    done = launcher.launch([members[0] for members in overrides], initial_job_idx=0)
    return [
        job.return_value if job.status is JobStatus.COMPLETED else [{"error": repr(job._return_value)}] * len(members)
        for job, members in zip(done, overrides, strict=True)
    ]


def is_done(folder: Path) -> bool:
    manifest = trace.read_manifest(folder)
    return manifest is not None and manifest["end_reason"] in trace.FINAL_REASONS


def _cpu_s(folder: Path) -> float:
    """What earlier commands have spent on a run."""
    manifest = trace.read_manifest(folder)
    return 0.0 if manifest is None else manifest["cpu_s"]


def sweep(planned: Sequence[PlannedRun], runs: Sequence[Run], out: Path, given: Sequence[str]) -> dict[str, Any] | None:
    """Train the runs that are not there yet; how long that took and how busy the cores were, or None.

    Raises RunError where runs failed, after all others are done, and Unfinished where ``train.piece_s`` is over.
    """
    pending = [(cell, run) for cell, run in zip(planned, runs, strict=True) if not is_done(out / run.run_id)]
    if not pending:
        return None
    jobs = [[pending[index] for index in stack] for stack in stacks([run for _, run in pending])]
    for reason, count in Counter(why_single(run) for _, run in pending if run.train.stack > 1).items():
        if reason is not None:
            print(f"{count} runs train by themselves: {reason}")
    started, spent_s = time.monotonic(), sum(_cpu_s(out / run.run_id) for _, run in pending)
    config = with_launcher(given)
    processes, piece_s = min(at_once(config.hydra.launcher), len(jobs)), pending[0][1].train.piece_s
    with SweepProgress({out / run.run_id: run.train.steps for run in runs}):

        def launched(some: Sequence[Sequence[tuple[PlannedRun, Run]]], *more: str) -> list[list[dict[str, Any]]]:
            return launch([[cell for cell, _ in job] for job in some], [*given, *more], config)

        if piece_s is None:
            done = launched(jobs)
        else:
            done = in_pieces(jobs, processes, piece_s, lambda some, left_s: launched(some, f"train.piece_s={left_s}"))
    wall_s = time.monotonic() - started
    results = [
        (run, result)
        for job, returned in zip(jobs, done, strict=False)  # a piece may be over before every job's turn
        for (_, run), result in zip(job, returned, strict=True)
    ]
    failed = [(run, result) for run, result in results if "error" in result]
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
    cpu_s = sum(result["cpu_s"] for _, result in results) - spent_s
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
    for field in ("experiment", "scale"):
        check_name(settings[field]["name"], f"{field}.name")
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
    runs = build_all([[*given, *cell.overrides] for cell in planned])
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
