"""Many faults in one command, each on a model that has its place, with what each injection really changed.

    foreshock campaign campaign=smoke                     every fault once
    foreshock campaign campaign=random n=100 seed=7       100 faults at sites that nobody chose
    foreshock campaign campaign=outcomes                  every fault's largest dose with 5 seeds: what becomes of a run
    foreshock campaign campaign.faults=[clip_off,label_noise] campaign.doses=all campaign.onsets=[50,100]

Every faulty run has a healthy twin of the same seed. In the folder ``report``, ``runs.csv`` says how each run ended,
``injections.csv`` what its fault really changed, and ``outcomes.csv`` what became of the runs of each fault. The same
command goes on where it stopped. Every other key is one of foreshock train; ``dry_run=true`` lists the runs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import hydra
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf

from foreshock.analysis.runs.labels import DrawupLabel
from foreshock.experiments.build import Run
from foreshock.experiments.campaign_runs import Campaign, Cell, cells, chosen_rows, needed
from foreshock.experiments.campaign_table import RUNS, Result, write_tables
from foreshock.experiments.cli import CONF, guarded, one_line_errors
from foreshock.experiments.executors import Executor
from foreshock.experiments.faults import NEEDS, rows, said_keys
from foreshock.experiments.names import check_name
from foreshock.experiments.places import check_folder_to_write
from foreshock.experiments.plan import PlannedRun
from foreshock.experiments.reproduce import build_all, executor_for
from foreshock.experiments.settings import CampaignCommand, check_command
from foreshock.experiments.sweep import check_can_train, left_to_train, sweep
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
        for need, overrides in NEEDS.items():
            if key in [override.split("=")[0] for override in overrides] and line not in overrides:
                print(f"{line}: runs that need {need} have {' '.join(overrides)} all the same")
        if key in OF_THE_DRAW and campaign.draw is None:
            raise ValueError(f"{line} has no effect on campaign={campaign.name}, which draws nothing: campaign=random")


def of_training(given: Sequence[str]) -> list[str]:
    """The overrides that a single run has too."""
    own = ("campaign", "n", "seed", "report", "at_once")
    return [line for line in given if line.lstrip("+~").split("=")[0].split(".")[0] not in own]


def healthy_runs(
    shared: Sequence[str], needs: Mapping[str, Sequence[str]], seeds: Sequence[int]
) -> dict[str, list[Run]]:
    """By need, the healthy twins of these seeds."""
    return {
        need: build_all([[*shared, *overrides, "fault=none", f"seed={seed}"] for seed in seeds])
        for need, overrides in needs.items()
    }


def faulty_runs(shared: Sequence[str], chosen: Sequence[Cell]) -> list[tuple[Cell, Run | ValueError]]:
    """By cell its run, or why its fault is refused. Neighbours that differ in their seed alone are composed once."""
    built: list[tuple[Cell, Run | ValueError]] = []
    for overrides, group in groupby(chosen, lambda cell: [*NEEDS[cell.needs], *cell.overrides]):
        alike = list(group)
        try:
            runs: Sequence[Run | ValueError] = build_all([[*shared, *overrides, f"seed={c.seed}"] for c in alike])
        except ValueError as error:
            runs = [error] * len(alike)
        built += zip(alike, runs, strict=True)
    return built


@dataclass(frozen=True)
class Runs:
    """The runs of a campaign.

    built: by cell its run, or why its fault is refused; twins: by need, the healthy runs of the same seeds.
    """

    built: Sequence[tuple[Cell, Run | ValueError]]
    twins: Mapping[str, Sequence[Run]]

    @property
    def faulty(self) -> list[tuple[Cell, Run]]:
        return [(cell, run) for cell, run in self.built if isinstance(run, Run)]

    @property
    def healthy(self) -> list[Run]:
        """Each once: of two needs, twins may be the same runs."""
        return list({run.run_id: run for of_need in self.twins.values() for run in of_need}.values())

    @property
    def refused(self) -> list[tuple[Cell, ValueError]]:
        return [(cell, run) for cell, run in self.built if isinstance(run, ValueError)]

    @property
    def results(self) -> list[Result]:
        return [Result(cell, run, self.twins.get(cell.needs, ())) for cell, run in self.built]


def runs_of(campaign: Campaign, given: Sequence[str], seed: int) -> Runs:
    """Choose and check the runs of a campaign. seed: of its draw. Raises ValueError in one line."""
    of_campaign, shared = chosen_rows(campaign, rows()), [*campaign.overrides, *of_training(given)]
    examples = {need: twins[0] for need, twins in healthy_runs(shared, needed(of_campaign), [0]).items()}
    built = faulty_runs(shared, cells(campaign, of_campaign, examples, seed))
    fitting = [cell for cell, run in built if isinstance(run, Run)]
    twins = healthy_runs(shared, needed(fitting), sorted({cell.seed for cell in fitting}))
    return Runs(built, twins)


def train(runs: Runs, out: Path, report: Path, label: DrawupLabel, executor: Executor) -> None:
    """Train what is not there yet and write the tables, also where a run failed. Raises RunError that names one."""
    names = [PlannedRun("", "faulty", cell.fault, run.seed, ()) for cell, run in runs.faulty]
    names += [PlannedRun("", "twin", None, run.seed, ()) for run in runs.healthy]
    all_runs = [*(run for _, run in runs.faulty), *runs.healthy]
    check_can_train([run for _, run in left_to_train(names, all_runs, out)], out, executor)
    check_folder_to_write(report, "report").mkdir(parents=True, exist_ok=True)
    try:
        sweep(names, all_runs, out, executor)
    finally:
        table = write_tables(report, runs.results, out, label)
        counts = f"{len(runs.faulty)} faulty runs, {len(runs.healthy)} healthy twins, {len(runs.refused)} refused"
        print(f"{report / RUNS}: {counts}")
        for name, count in table.outcome.value_counts().items():
            print(f"  {count:>4} {name}")


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
    runs = runs_of(campaign, given, settings["seed"])
    for cell, reason in runs.refused:
        print(f"refused: {cell.fault} {said_keys(cell.keys)}: {reason}")
    if config.dry_run:
        for cell, run in runs.faulty:
            print(f"{run.run_id}  seed {cell.seed}  {cell.fault} {said_keys(cell.keys)}")
    else:
        train(
            runs,
            Path(config.out),
            Path(config.report),
            DrawupLabel(**settings["label"]),
            executor_for(given, CONFIG_NAME),
        )
    if runs.refused:
        cell, reason = runs.refused[0]
        raise ValueError(
            f"{len(runs.refused)} of {len(runs.built)} faults are refused; the first, {cell.fault}: {reason}"
        )


if __name__ == "__main__":
    guarded(main, CONFIG_NAME)
