"""One run, or a sweep of them: ``python -m experiments.train [-m] fault=bf16_shift seed=0,1``."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import hydra
from omegaconf import DictConfig, OmegaConf

from foreshock.experiments.build import Run, build_run
from foreshock.experiments.cli import CONF, guarded, one_line_errors
from foreshock.experiments.machine import BYTES_OF_A_PARAMETER, check_machine, count_parameters
from foreshock.experiments.pieces import Unfinished
from foreshock.experiments.places import check_folder_to_write
from foreshock.experiments.progress import RunProgress
from foreshock.experiments.settings import TrainCommand, check_command
from foreshock.experiments.training.data import Corpus, DataConfig
from foreshock.experiments.training.loop import train
from foreshock.experiments.training.missing_readings import is_complete
from foreshock.experiments.training.stopping import asked
from foreshock.monitors.base import Signal


def describe(run: Run) -> str:
    """Size of a run, from its model built on the meta device: nothing is allocated."""
    parameters = count_parameters(run.model_config)
    held_gib = BYTES_OF_A_PARAMETER * parameters / 2**30
    tokens = run.train.batch_size * run.model_config.context_length
    at_a_time = run.train.micro_batch or run.train.batch_size
    return (
        f"{parameters / 1e6:,.1f} M parameters, {held_gib:,.1f} GiB for FP32 weights, gradients "
        f"and AdamW moments; {tokens:,} tokens an update, {at_a_time} sequences at a time in {run.train.precision}, "
        f"{run.train.steps:,} updates"
    )


def signals_of(run: Run) -> list[Signal]:
    """What all monitors of a run record."""
    return [signal for monitor in run.monitors.values() for signal in monitor.signals]


def train_shown(run: Run, out: Path, show: bool) -> dict[str, Any]:
    """Train a run with its progress in its folder and, if asked, on a bar; returns its manifest."""
    folder = out / run.run_id
    folder.mkdir(parents=True, exist_ok=True)
    with RunProgress(folder, run.train.steps, signals_of(run), show=show) as progress:
        return train(run, out, progress)


def run_one(config: DictConfig, load: Callable[[DataConfig, int], Corpus] = Corpus) -> dict[str, Any]:
    """Build and train the run of one composed configuration; returns its manifest. load: see ``build_run``."""
    settings: Any = OmegaConf.to_container(config, resolve=True)
    check_command(TrainCommand, settings)
    run = build_run(config, load)
    if run.train.stack > 1:
        raise ValueError(
            f"train.stack={run.train.stack} has no effect on runs started one by one: "
            "python -m experiments.reproduce stacks those of an experiment"
        )
    if config.dry_run:
        print(f"{run.run_id}: {describe(run)}")
        return {"run_id": run.run_id, "end_reason": "dry_run"}
    out = check_folder_to_write(config.out, "out")
    if not is_complete(out / run.run_id, run):
        check_machine(run)
    manifest = train_shown(run, out, show=not config.quiet)
    if not config.quiet:
        folder, ended = out / run.run_id, f"{manifest['end_reason']} after {manifest['steps_done']} steps"
        print(f"{folder}: {ended}, {manifest['wall_s']:.0f} s")
    return manifest


@hydra.main(version_base="1.3", config_path=CONF, config_name="config")
@one_line_errors
def main(config: DictConfig) -> None:
    manifest = run_one(config)
    if manifest["end_reason"] == "interrupted" and not asked():
        piece_s = config.train.piece_s
        why = "a signal" if piece_s is None else f"train.piece_s={piece_s:g} seconds"
        raise Unfinished(
            f"{manifest['run_id']} after {manifest['steps_done']} of {config.train.steps} steps and {why}; "
            "the same command goes on"
        )


if __name__ == "__main__":
    guarded(main, "config")
