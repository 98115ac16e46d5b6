"""Many faults in one command, each on a model that has its place, with what each injection really changed.

    foreshock campaign campaign=smoke                     every fault once
    foreshock campaign campaign=random n=100 seed=7       100 faults at sites that nobody chose
    foreshock campaign campaign=outcomes                  every fault's largest dose with 5 seeds: what becomes of a run
    foreshock campaign campaign.faults=[clip_off,label_noise] campaign.doses=all campaign.onsets=[50,100]

Every faulty run has a healthy twin of the same seed. ``runs.csv`` and ``injections.csv`` in ``report`` hold what came
out, the injection log as ground truth. The same command goes on where it stopped. Every other key is one of
foreshock train; ``dry_run=true`` lists the runs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import hydra
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf

from foreshock.experiments.build import Run
from foreshock.experiments.campaign_runs import Campaign, Cell, cells, check_campaign, needed
from foreshock.experiments.campaign_table import Outcome, write_tables
from foreshock.experiments.cli import CONF, guarded, one_line_errors
from foreshock.experiments.faults import NEEDS, rows, said_keys
from foreshock.experiments.names import check_name
from foreshock.experiments.plan import PlannedRun
from foreshock.experiments.reproduce import build_all, executor_for
from foreshock.experiments.settings import CampaignCommand, check_command
from foreshock.experiments.sweep import sweep
from foreshock.experiments.training.checkpoint import RunError
from foreshock.experiments.validation import check_node, check_seed

CONFIG_NAME = "campaign"
OF_THE_DRAW = ("n", "seed")
"""Keys of the command that a campaign without a draw has no use for."""


def _check_given(given: Sequence[str], campaign: Campaign) -> None:
    """Raises ValueError for an override without effect."""
    for line in given:
        key = line.lstrip("+~").split("=")[0]
        if key.split(".")[0] == "fault":
            raise ValueError(f"{line} has no effect on a campaign, which chooses its faults: set campaign.faults=[...]")
        if key in OF_THE_DRAW and campaign.draw is None:
            raise ValueError(f"{line} has no effect on campaign={campaign.name}, which draws nothing: campaign=random")


def of_training(given: Sequence[str]) -> list[str]:
    """The overrides that a single run has too."""
    own = ("campaign", "n", "seed", "report", "at_once", "hydra/launcher")
    return [line for line in given if line.lstrip("+~").split("=")[0].split(".")[0] not in own]


def healthy_runs(
    shared: Sequence[str], needs: Mapping[str, Sequence[str]], seeds: Sequence[int]
) -> dict[str, list[Run]]:
    """By need, the healthy twins of these seeds."""
    return {
        need: build_all([[*shared, *overrides, "fault=none", f"seed={seed}"] for seed in seeds])
        for need, overrides in needs.items()
    }


def faulty_run(shared: Sequence[str], cell: Cell) -> Run | ValueError:
    """The run of a cell, or why its fault is refused."""
    try:
        (run,) = build_all([[*shared, *NEEDS[cell.needs], *cell.overrides, f"seed={cell.seed}"]])
    except ValueError as error:
        return error
    return run


def planned(run: Run, name: str | None) -> PlannedRun:
    """A run as a sweep takes it. name: of the fault, None for a healthy twin."""
    return PlannedRun("", "twin" if name is None else "faulty", name, run.seed, ())


@hydra.main(version_base="1.3", config_path=CONF, config_name=CONFIG_NAME)
@one_line_errors
def main(config: DictConfig) -> None:
    settings: Any = OmegaConf.to_container(config, resolve=True)
    check_command(CampaignCommand, settings)
    check_seed(settings["seed"], "seed")
    given = list(HydraConfig.get().overrides.task)
    campaign = check_node(Campaign, settings["campaign"], "campaign")
    _check_given(given, campaign)
    check_name(campaign.name, "campaign.name")
    known, shared = rows(), [*of_training(given), *campaign.overrides]
    check_campaign(campaign, known)
    examples = {need: twins[0] for need, twins in healthy_runs(shared, NEEDS, [0]).items()}
    chosen = cells(campaign, known, examples, settings["seed"])
    built = [(cell, faulty_run(shared, cell)) for cell in chosen]
    refused = [(cell, run) for cell, run in built if isinstance(run, ValueError)]
    for cell, error in refused:
        print(f"refused: {cell.fault} {said_keys(cell.keys)}: {error}")
    faulty = [(cell, run) for cell, run in built if isinstance(run, Run)]
    if config.dry_run:
        for cell, run in faulty:
            print(f"{run.run_id}  seed {cell.seed}  {cell.fault} {said_keys(cell.keys)}")
        return
    twins = healthy_runs(shared, needed([cell for cell, _ in faulty]), sorted({cell.seed for cell in chosen}))
    healthy = [run for of_need in twins.values() for run in of_need]
    out, report, error = Path(config.out), Path(config.report), None
    report.mkdir(parents=True, exist_ok=True)
    runs = [*(run for _, run in faulty), *healthy]
    names = [*(planned(run, cell.fault) for cell, run in faulty), *(planned(run, None) for run in healthy)]
    try:
        sweep(names, runs, out, executor_for(given))
    except RunError as failure:  # the others are done: their table comes first
        error = failure
    write_tables(report, [Outcome(cell, run, twins.get(cell.needs, [])) for cell, run in built], out)
    print(f"{report / 'runs.csv'}: {len(faulty)} faulty runs, {len(healthy)} healthy twins, {len(refused)} refused")
    if error is not None:
        raise error
    if refused:
        cell, reason = refused[0]
        raise ValueError(f"{len(refused)} of {len(built)} faults are refused; the first, {cell.fault}: {reason}")


if __name__ == "__main__":
    guarded(main, CONFIG_NAME)
