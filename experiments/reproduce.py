"""An experiment from one command: train its runs, score them, draw the report.

    python -m experiments.reproduce experiment=paper_attention scale=laptop

Runs are shared by identity: what another experiment has trained already is not trained again, and a
broken sweep goes on where it stopped. The runs are handed to joblib's processes on one machine, to submitit on a
cluster (``hydra/launcher=...``). With ``train.stack=N`` a job is a stack of up to N runs, trained together along a
model axis; runs that cannot be stacked are trained one by one.
"""

from __future__ import annotations

import dataclasses
import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import hydra
from hydra import compose
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf

from foreshock.analysis.report import make_report
from foreshock.analysis.reports.kinds.by_name import recorded
from foreshock.analysis.runs.align import AXES
from foreshock.analysis.runs.conf import Conf
from foreshock.analysis.runs.index import Several, check_parts
from foreshock.experiments.build import Run, build_run
from foreshock.experiments.cli import (
    COMPOSE_ERRORS,
    CONF,
    explain,
    guarded,
    one_line_errors,
    options,
    own_folders,
)
from foreshock.experiments.executors import Executor, executor_of
from foreshock.experiments.files import sealed, write_whole
from foreshock.experiments.names import check_name
from foreshock.experiments.places import check_folder_to_read, check_folder_to_write
from foreshock.experiments.plan import PlannedRun, plan, plan_cases
from foreshock.experiments.scoring import check_runs, check_settings, unwatched
from foreshock.experiments.settings import ReproduceCommand, check_command, resolved
from foreshock.experiments.sweep import sweep
from foreshock.experiments.train import describe
from foreshock.experiments.training.data import load_once
from foreshock.experiments.validation import check_mapping, check_named, check_value, did_you_mean

CONFIG_NAME = "reproduce"


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
                raise ValueError(explain(error, CONFIG_NAME, shared, own_folders())) from None
        config = composed[tuple(shared)]
        config.seed = int(seed.removeprefix("seed="))
        runs.append(build_run(config, load_once))
    return runs


def executor_for(given: Sequence[str], config_name: str = CONFIG_NAME) -> Executor:
    """The executor that the command's ``hydra/launcher`` asks for. config_name: of the command's configuration."""
    overrides = [*HydraConfig.get().overrides.hydra, *given]
    launcher = compose(config_name, overrides=overrides, return_hydra_config=True).hydra.launcher
    settings: Any = OmegaConf.to_container(launcher, resolve=True)
    return executor_of(settings)


INSTEAD = {
    "model": "set experiment.models=[...], or scale.dense and scale.moe",
    "seed": "its runs have the seeds of their roles: set scale.seeds={reference: ..., calibration: ..., ...}",
    "fault": "its faults are those of experiment.faults: set 'experiment.faults.NAME.overrides=[\"fault=...\"]'",
}
"""By key of a single run, which an experiment sets for each of its own, what to set in its place."""


def _check_has_effect(line: str, experiment: Mapping[str, Any], settings: Mapping[str, Any]) -> None:
    """Raises ValueError on an override that no run takes up, or that every run replaces by another."""
    scale = settings["scale"]
    key, _, value = line.lstrip("+~").partition("=")
    root = key.split(".")[0].split("@")[0]
    if key in INSTEAD or root in ("seed", "fault"):
        raise ValueError(f"{line} has no effect on an experiment: {INSTEAD[root]}")
    if key.startswith("scale.seeds") and experiment.get("seeds", scale["seeds"]) != scale["seeds"]:
        raise ValueError(f"{line} has no effect on this experiment, which has seeds of its own: set experiment.seeds")
    if line.startswith("+scale.") and key.count(".") > 1 and not key.startswith(("scale.seeds", "scale.moe_seeds")):
        known, leaf = _keys(settings["sizes"]), key.rpartition(".")[2]
        if leaf not in known:
            raise ValueError(f"{key} is not a key of the configuration{did_you_mean(leaf, known)}")
    for own in experiment.get("overrides") or ():
        its_key, _, its_value = str(own).partition("=")
        if its_key == key and its_value != value:
            raise ValueError(
                f"{line} has no effect on this experiment, whose runs all have {own}: change experiment.overrides, or "
                "what it takes from the scale"
            )


def _keys(sizes: Any) -> list[str]:
    """The keys of an experiment's sizes, at any depth."""
    if not isinstance(sizes, Mapping):
        return []
    return [key for name, size in sizes.items() for key in (str(name), *_keys(size))]


def chosen_experiment(settings: Mapping[str, Any], given: Sequence[str]) -> dict[str, Any]:
    """The composed experiment, its ``align`` replaced by a top-level one, its ``monitors`` an override of every run,
    its faults those that ``only`` names.

    Raises ValueError on a value that is not allowed, and on an override that every run would undo.
    """
    whole: Any = settings.get("experiment")
    check_mapping(whole, "experiment")
    experiment = {key: value for key, value in whole.items() if key != "only"}
    check_parts({**settings, "experiment": experiment})
    if whole.get("only") is not None:
        experiment["faults"] = _chosen_faults(whole["only"], experiment.get("faults", {}))
    for line in {line.split("=")[0]: line for line in given}.values():  # the last of each key
        _check_has_effect(line, experiment, settings)
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


def _chosen_faults(names: Any, faults: Mapping[str, Any]) -> dict[str, Any]:
    """The faults that ``experiment.only`` names, in their own order. Raises ValueError on a name that is none."""
    check_value(Several, names, "experiment.only")
    check_named(names, faults, "experiment.only")
    return {name: fault for name, fault in faults.items() if name in names}


def _chosen(monitors: Sequence[str], given: Sequence[str]) -> str:
    """The override that lets these monitors watch. Raises ValueError on an unknown one, or if another is asked for."""
    check_named(monitors, options("monitor", own_folders()), "experiment.monitors")
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
    settings = resolved(config)
    check_command(ReproduceCommand, settings)
    given = list(HydraConfig.get().overrides.task)
    experiment = chosen_experiment(settings, given)
    conf = Conf(own_folders(), settings["plugins"] or ())
    check_settings(settings, experiment, given, conf)
    planned = planned_runs(experiment, settings["scale"])
    runs = build_all([[*given, *cell.overrides] for cell in planned])
    check_runs(settings, experiment, planned, runs, conf)
    left_out = unwatched(experiment, runs)
    if left_out:
        print(f"not scored, as no configured monitor has their signals: {', '.join(left_out)}")
    if config.dry_run:
        for cell, run in zip(planned, runs, strict=True):
            print(f"{run.run_id}  {cell.model:<9}  {cell.role:<11}  seed {cell.seed:<5} {cell.fault or 'healthy'}")
        for model in dict.fromkeys(cell.model for cell in planned):
            cell_of_model = [cell.model for cell in planned].index(model)
            print(f"{model}, each: {describe(runs[cell_of_model])}")
        return
    out, report, executor = Path(config.out), Path(config.report), executor_for(given)
    check_folder_to_write(report, "report")
    if config.score_only:
        check_folder_to_read(out, "out")
    timing = None if config.score_only else sweep(planned, runs, out, executor)
    index = {
        "experiment": experiment,
        "scale": settings["scale"],
        "label": settings["label"],
        "rule": settings["rule"],
        "command": shlex.join(["python", "-m", "experiments.reproduce", *sys.argv[1:]]),
        "sweep": timing,
        "runs": [{**dataclasses.asdict(cell), "run_id": run.run_id} for cell, run in zip(planned, runs, strict=True)],
        **recorded(experiment["draw"], conf),
    }
    report.mkdir(parents=True, exist_ok=True)
    write_whole(report / "experiment.json", sealed(index))
    make_report(report, out, conf=conf)


if __name__ == "__main__":
    guarded(main, CONFIG_NAME)
