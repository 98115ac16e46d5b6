"""An experiment from one command: train its runs, score them, draw the report.

    python -m experiments.reproduce experiment=paper_attention scale=laptop

Runs are shared by identity: what another experiment has trained already is not trained again, and a
broken sweep goes on where it stopped. The runs are handed to the configured Hydra launcher (joblib on
one machine, submitit on a cluster), as ``-m`` would hand it a grid. With ``train.stack=N`` a job is a stack of up to
N runs, trained together along a model axis; runs that cannot be stacked are trained one by one.
"""

from __future__ import annotations

import dataclasses
import shlex
import sys
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from concurrent.futures import BrokenExecutor
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
from joblib import Parallel, delayed, effective_n_jobs
from omegaconf import DictConfig, OmegaConf, open_dict

from analysis.report import make_report
from analysis.runs.align import AXES
from analysis.runs.index import check_parts
from experiments import trace
from experiments.build import Run, build_run
from experiments.cli import COMPOSE_ERRORS, CONF, USER_ERRORS, explain, guarded, one_line_errors
from experiments.files import sealed, write_whole
from experiments.names import check_name
from experiments.pieces import Unfinished, in_pieces
from experiments.plan import PlannedRun, plan, plan_cases
from experiments.progress import RunInSweep, StackProgress, SweepProgress
from experiments.scoring import check_runs, check_settings
from experiments.settings import ReproduceCommand, check_command
from experiments.train import describe, run_one, signals_of, train_shown
from experiments.training.checkpoint import RunError
from experiments.training.data import load_once
from experiments.training.loop import train_stack
from experiments.training.missing_readings import is_complete
from experiments.training.stacking import stacks, why_single
from experiments.training.stopping import asked, check_in, end_if_orphaned, end_with_parent, launching
from experiments.validation import check_named

CONFIG_NAME = "reproduce"


def train_quietly(jobs: Sequence[Sequence[Sequence[str]]], config: DictConfig) -> list[dict[str, Any]]:
    """What a launcher's worker does with one job: no bar of its own; a mistake comes back as one line for every run.

    jobs: of every job, its runs' overrides; config: of this job's first run.
    """
    with open_dict(config):
        config.quiet = True
    members = jobs[HydraConfig.get().job.num]
    end_with_parent()
    if asked():
        return []
    try:
        return run_together(members, Path(config.out)) if config.train.stack > 1 else [run_one(config, load_once)]
    except USER_ERRORS as error:
        return [{"error": " ".join(str(error).split())}] * len(members)
    finally:
        end_if_orphaned()


def run_together(members: Sequence[Sequence[str]], out: Path) -> list[dict[str, Any]]:
    """Build and train a stack, or the one run that cannot be in one; their manifests. members: the runs' overrides."""
    runs = build_all(members)  # launchers hand Hydra's state on to their workers, so that it composes there
    if why_single(runs[0]) is not None:
        return [train_shown(runs[0], out, show=False)]
    with StackProgress(signals_of(runs[0])) as progress:
        return train_stack(runs, out, progress)


def build_all(members: Sequence[Sequence[str]]) -> list[Run]:
    """Compose, check and identify runs; those with the same data share it. members: the runs' overrides, the seed last.

    Runs that differ in their seed alone are composed once: composing takes a third of a second.
    """
    runs: list[Run] = []
    composed: dict[tuple[str, ...], DictConfig] = {}
    for *shared, seed in members:
        if tuple(shared) not in composed:
            try:
                composed[tuple(shared)] = compose(CONFIG_NAME, overrides=shared)
            except COMPOSE_ERRORS as error:
                raise ValueError(explain(error, CONFIG_NAME, shared)) from None
        config = composed[tuple(shared)]
        config.seed = int(seed.removeprefix("seed="))
        runs.append(build_run(config, load_once))
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


def start_workers(launcher: Mapping[str, Any], folder: Path) -> None:
    """Start joblib's processes, which it keeps for the jobs, so that each ends with this one from the start."""
    workers = at_once(launcher)
    if "n_jobs" in launcher and workers > 1:
        settings = {key: value for key, value in launcher.items() if key != "_target_"}
        Parallel(**settings)(delayed(check_in)(folder, workers) for _ in range(workers))


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
    try:
        done = launcher.launch([members[0] for members in overrides], initial_job_idx=0)
    except BrokenExecutor:
        raise RunError(
            "a process that trained was killed, for want of memory perhaps: the same command resumes, a lower at_once "
            "needs less"
        ) from None
    return [
        job.return_value if job.status is JobStatus.COMPLETED else [{"error": repr(job._return_value)}] * len(members)
        for job, members in zip(done, overrides, strict=True)
    ]


def left_to_train(planned: Sequence[PlannedRun], runs: Sequence[Run], out: Path) -> list[tuple[PlannedRun, Run]]:
    """The runs that are not finished. Raises RunError where finished ones are damaged, and names them all."""
    pending, damaged, errors = [], [], []
    for cell, run in zip(planned, runs, strict=True):
        folder = out / run.run_id
        try:
            if not is_complete(folder, run):
                pending.append((cell, run))
        except trace.TraceError as error:
            damaged.append(shlex.quote(str(folder)))
            errors.append(error)
    if len(damaged) == 1:
        raise errors[0]
    if damaged:
        raise RunError(
            f"{len(damaged)} of {len(runs)} runs are damaged: rm -r {' '.join(damaged)}, then the same command trains "
            f"them again; the first: {errors[0]}"
        )
    return pending


def _cpu_s(folder: Path) -> float:
    """What earlier commands have spent on a run."""
    manifest = trace.read_manifest(folder)
    return 0.0 if manifest is None else manifest["cpu_s"]


def sweep(planned: Sequence[PlannedRun], runs: Sequence[Run], out: Path, given: Sequence[str]) -> dict[str, Any] | None:
    """Train the runs that are not there yet; how long that took and how busy the cores were, or None.

    Raises RunError where runs failed, after all others are done, or where finished ones are damaged, and Unfinished
    where ``train.piece_s`` is over.
    """
    pending = left_to_train(planned, runs, out)
    if not pending:
        return None
    jobs = [[pending[index] for index in stack] for stack in stacks([run for _, run in pending])]
    for reason, count in Counter(why_single(run) for _, run in pending if run.train.stack > 1).items():
        if reason is not None:
            print(f"{count} runs train by themselves: {reason}")
    started, spent_s = time.monotonic(), sum(_cpu_s(out / run.run_id) for _, run in pending)
    config = with_launcher(given)
    processes, piece_s = min(at_once(config.hydra.launcher), len(jobs)), pending[0][1].train.piece_s
    shown = {
        out / run.run_id: RunInSweep(f"{cell.fault or 'healthy'} {cell.seed}", run.train.steps)
        for cell, run in zip(planned, runs, strict=True)
    }
    with SweepProgress(shown, processes * max(map(len, jobs))), launching() as folder:
        start_workers(config.hydra.launcher, folder)

        def launched(some: Sequence[Sequence[tuple[PlannedRun, Run]]], *more: str) -> list[list[dict[str, Any]]]:
            return launch([[cell for cell, _ in job] for job in some], [*given, *more], config)

        if piece_s is None:
            done = launched(jobs)
        else:
            done = in_pieces(jobs, processes, piece_s, lambda some, left_s: launched(some, f"train.piece_s={left_s}"))
    if asked():  # in a job of -m, which ends with the others
        raise Unfinished("runs are left after a signal; the same command goes on")
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
    unfinished = sum(not is_complete(out / run.run_id, run) for _, run in pending)
    if unfinished:
        why = "a signal to their process" if piece_s is None else f"train.piece_s={piece_s:g} seconds"
        raise Unfinished(f"{unfinished} runs are left after {why}; the same command goes on")
    cpu_s = sum(result["cpu_s"] for _, result in results) - spent_s
    return {
        "trained": len(pending),
        "wall_s": round(wall_s, 1),
        "processes": processes,
        "busy": round(cpu_s / (processes * wall_s), 3),
    }


INSTEAD = {
    "model": "set experiment.models=[...], or scale.dense and scale.moe",
    "seed": "its runs have the seeds of their roles: set scale.seeds={reference: ..., calibration: ..., ...}",
    "fault": "its faults are those of experiment.faults: set 'experiment.faults.NAME.overrides=[\"fault=...\"]'",
}
"""By key of a single run, which an experiment sets for each of its own, what to set in its place."""


def _check_has_effect(line: str, experiment: Mapping[str, Any]) -> None:
    """Raises ValueError on an override that every run of the experiment replaces by another."""
    key, _, value = line.lstrip("+~").partition("=")
    root = key.split(".")[0].split("@")[0]
    if key in INSTEAD or root in ("seed", "fault"):
        raise ValueError(f"{line} has no effect on an experiment: {INSTEAD[root]}")
    for own in experiment.get("overrides") or ():
        its_key, _, its_value = str(own).partition("=")
        if its_key == key and its_value != value:
            raise ValueError(
                f"{line} has no effect on this experiment, whose runs all have {own}: change experiment.overrides, or "
                "what it takes from the scale"
            )


def chosen_experiment(settings: Mapping[str, Any], given: Sequence[str]) -> dict[str, Any]:
    """The composed experiment, its ``align`` replaced by a top-level one, its ``monitors`` an override of every run.

    Raises ValueError on a value that is not allowed, and on an override that every run would undo.
    """
    check_parts(settings)
    experiment = settings["experiment"]
    for line in {line.split("=")[0]: line for line in given}.values():  # the last of each key
        _check_has_effect(line, experiment)
    for field in ("experiment", "scale"):
        check_name(settings[field]["name"], f"{field}.name")
    if experiment.get("monitors") is not None:
        experiment = {
            **experiment,
            "overrides": [*experiment.get("overrides", ()), _chosen(experiment["monitors"], given)],
        }
    if settings["align"] is None:
        return experiment
    if settings["align"] not in AXES:
        raise ValueError(f"align={settings['align']} is not allowed: {' or '.join(AXES)}")
    return {**experiment, "align": [settings["align"]]}


def _chosen(monitors: Sequence[str], given: Sequence[str]) -> str:
    """The override that lets these monitors watch. Raises ValueError on an unknown one, or if another is asked for."""
    check_named(monitors, sorted(path.stem for path in (Path(CONF) / "monitor").glob("*.yaml")), "experiment.monitors")
    for line in given:
        root, *rest = line.lstrip("+~").split("=")[0].split(".")
        if root == "monitor" and not set(rest[:1]) & set(monitors):
            raise ValueError(
                f"{line} has no effect on this experiment, whose runs are watched by {', '.join(monitors)}: "
                "set experiment.monitors=[...], or null for all"
            )
    return f"monitor=[{','.join(monitors)}]"


def planned_runs(experiment: Mapping[str, Any], scale: Mapping[str, Any]) -> list[PlannedRun]:
    """Every run of an experiment: of its cases where it has any, else of its faults and of healthy twins."""
    overrides = experiment.get("overrides", ())
    if "cases" in experiment:
        return plan_cases(experiment["cases"], experiment["models"][0], experiment["seeds"], overrides)
    return plan(experiment.get("seeds", scale["seeds"]), experiment["faults"], experiment["models"], overrides)


@hydra.main(version_base="1.3", config_path=CONF, config_name=CONFIG_NAME)
@one_line_errors
def main(config: DictConfig) -> None:
    settings = OmegaConf.to_container(config, resolve=True)
    check_command(ReproduceCommand, settings)
    given = list(HydraConfig.get().overrides.task)
    experiment = chosen_experiment(settings, given)
    check_settings(settings, experiment, given)
    planned = planned_runs(experiment, settings["scale"])
    runs = build_all([[*given, *cell.overrides] for cell in planned])
    check_runs(settings, experiment, planned, runs)
    if config.dry_run:
        for cell, run in zip(planned, runs, strict=True):
            print(f"{run.run_id}  {cell.model:<9}  {cell.role:<11}  seed {cell.seed:<5} {cell.fault or 'healthy'}")
        for model in dict.fromkeys(cell.model for cell in planned):
            cell_of_model = [cell.model for cell in planned].index(model)
            print(f"{model}, each: {describe(runs[cell_of_model])}")
        return
    out, report = Path(config.out), Path(config.report)
    report.mkdir(parents=True, exist_ok=True)
    timing = None if config.score_only else sweep(planned, runs, out, given)
    index = {
        "experiment": experiment,
        "scale": settings["scale"],
        "label": settings["label"],
        "rule": settings["rule"],
        "command": shlex.join(["python", "-m", "experiments.reproduce", *sys.argv[1:]]),
        "sweep": timing,
        "runs": [{**dataclasses.asdict(cell), "run_id": run.run_id} for cell, run in zip(planned, runs, strict=True)],
    }
    write_whole(report / "experiment.json", sealed(index))
    make_report(report, out)


if __name__ == "__main__":
    guarded(main, CONFIG_NAME)
