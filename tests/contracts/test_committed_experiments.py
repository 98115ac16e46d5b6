"""An experiment that is named after a folder of results/ has the runs of the command that made the folder."""

import shlex

import pytest
from hydra import initialize_config_dir

from foreshock.experiments import reproduce
from foreshock.experiments.cli import CONF
from foreshock.experiments.reproduce import build_all
from tests.contracts.commands import OF_9F4E31E, corpus, planned_by

MADE_BY = {
    "early_warning_committed scale=desk": "out=report/mine/runs ~experiment.faults.o4",
    "early_warning_every_step scale=desk": "monitor.attention_laws.rows=1",
    "early_warning_moe_committed scale=desk": "scale.early_warning={steps: 240, onset: 100}",
    "early_warning_rivals scale=desk": "scale.early_warning={steps: 1800, onset: 300}",
    "early_warning_silence scale=desk": "calibration: 59",
    "early_warning_small scale=desk": "scale.dense=mha_small",
    "localise_60_steps scale=desk": "scale.localise={steps: 120, onset: 60, every_steps: 1, rows: 0}",
    "localise_committed scale=desk": "test: 10, faulty: 2}",
    "natural_bf16_committed": "scale.natural_bf16={steps: 1200}",
    "smallest_fault_committed scale=desk": "experiment=smallest_fault scale=desk monitor",
}
"""By short command, what only the long one of commit 9f4e31e has."""


def arguments_of(short: str) -> tuple[list[str], list[str]]:
    """Of the short command and of the long one, without where its files went."""
    (long,) = [words for words in map(shlex.split, OF_9F4E31E) if MADE_BY[short] in " ".join(words)]
    return f"experiment={short}".split(), [word for word in long[3:] if not word.startswith(("out=", "report="))]


def runs_of(arguments, planned):
    """Run ids, and the configuration of the monitors, which a run id leaves out."""
    with initialize_config_dir(CONF, version_base="1.3"):
        runs = build_all([[*arguments, *cell.overrides] for cell in planned])
    return [(run.run_id, run.config["monitor"]) for run in runs]


def planned_both(short):
    """Arguments and planned runs of the short and of the long command, which are the same but for their overrides."""
    both = [(arguments, planned_by(arguments)[1]) for arguments in arguments_of(short)]
    first, second = ([(cell.model, cell.role, cell.fault, cell.seed) for cell in planned] for _, planned in both)
    assert first == second
    return both


@pytest.mark.parametrize(
    "short", [pytest.param(short, marks=pytest.mark.slow if i % 4 else ()) for i, short in enumerate(MADE_BY)]
)
def test_a_short_command_plans_the_runs_of_the_long_one(short, monkeypatch):
    monkeypatch.setattr(reproduce, "load_once", corpus)
    first, second = (runs_of(arguments, [planned[0], planned[-1]]) for arguments, planned in planned_both(short))
    assert first == second and first[0][0] != first[1][0]


@pytest.mark.slow
@pytest.mark.parametrize("short", list(MADE_BY)[::5])  # a minute or two each
def test_all_of_its_runs_are_those_of_the_long_one(short, monkeypatch):
    monkeypatch.setattr(reproduce, "load_once", corpus)
    first, second = (runs_of(*command) for command in planned_both(short))
    assert first == second
