"""Every command that README.md, results/README.md and the Makefile show, today and at commit 9f4e31e, is one still.

Hydra's are composed and checked as they are before training, the arguments of the others are parsed, and make's are
expanded by make with programs that only say how they were called.
"""

import importlib
import importlib.util
import os
import shlex
import subprocess

import pytest
from hydra import compose, initialize_config_dir

from foreshock.experiments import reproduce
from foreshock.experiments.build import ROOT, build_run
from foreshock.experiments.cli import CONF, check_overrides
from tests.contracts.commands import OF_9F4E31E, commands_of, corpus, planned_by, targets_of

TEXTS = ("README.md", "results/README.md")

SHOWN = [command for name in TEXTS for command in commands_of((ROOT / name).read_text())]
COMMANDS = list(dict.fromkeys([*OF_9F4E31E, *SHOWN, *targets_of((ROOT / "Makefile").read_text())]))

UNCHECKED = {
    "python -m experiments.reproduce experiment=NAME scale=SCALE": "NAME and SCALE stand for those of each folder",
    "python -m experiments.train fault=lr_flicker fault.factor=30": (
        "the README's own example of a fault, which is not in conf/: tests/experiments/test_readme.py builds it"
    ),
}
"""Commands that cannot be checked, and why."""

REFUSED = {line: "no fault of this experiment has a number of bits" for line in COMMANDS if "calibration: 59" in line}
"""Commands that compose and are refused before training, and what is said: ``experiment=early_warning`` tells faults by
their number of bits, which lr10, batch8 and decay lack. ``experiment=early_warning_silence`` has the same runs."""

WORK = {
    "analysis.doses": ("read_parquet",),
    "analysis.order": ("read_table",),
    "analysis.reduced": ("load",),
    "analysis.report": ("make_report",),
    "analysis.score": ("score_runs",),
    "analysis.threshold_source": ("load",),
    "experiments.bench": ("measure",),
    "experiments.bench_gpt2": ("_found",),
    "experiments.bench_stack": ("measure",),
    "experiments.gpu_check": ("new_record",),
    "experiments.gpu_tiles": ("Record",),
    "experiments.natural_rounding": ("_write",),
    "experiments.runs": ("stored_in",),
}
"""By command without Hydra, what it calls first once its arguments are read."""


class Reached(Exception):
    """A command's arguments were read, and its work would begin."""


def reach(*_, **__):
    raise Reached


def of_module(*modules: str) -> list[str]:
    return [line for line in COMMANDS if line.startswith("python") and shlex.split(line)[2] in modules]


def checked(*modules: str) -> list[str]:
    return [line for line in of_module(*modules) if line not in UNCHECKED]


def needs_a_plugin(line: str) -> bool:
    return "submitit" in line and importlib.util.find_spec("hydra_plugins.hydra_submitit_launcher") is None


@pytest.mark.parametrize("line", checked("experiments.reproduce"))
def test_an_experiment_composes_and_has_its_runs(line):
    if needs_a_plugin(line):
        pytest.skip("hydra-submitit-launcher is to be installed first, as the README says")
    arguments = shlex.split(line)[3:]
    check_overrides("reproduce", arguments)
    experiment, planned = planned_by(arguments)
    assert {cell.fault for cell in planned} >= set(experiment.get("cases", experiment.get("faults")))


@pytest.mark.slow
@pytest.mark.parametrize("line", checked("experiments.reproduce")[::5])  # each takes up to a minute
def test_an_experiment_is_ready_to_train(line, monkeypatch, capsys):
    """The command itself with dry_run=true: every run of it is built, and held against the others."""
    if needs_a_plugin(line):
        pytest.skip("hydra-submitit-launcher is to be installed first, as the README says")
    monkeypatch.setattr(reproduce, "load_once", corpus)
    monkeypatch.setattr("sys.argv", ["reproduce", *shlex.split(line)[3:], "dry_run=true"])
    if line not in REFUSED:
        reproduce.main()
        assert "parameters" in capsys.readouterr().out
        return
    with pytest.raises(SystemExit):
        reproduce.main()
    assert REFUSED[line] in capsys.readouterr().err


@pytest.mark.parametrize("line", checked("experiments.train"))
def test_a_run_composes_and_builds(line):
    arguments = shlex.split(line)[3:]
    check_overrides("config", arguments)
    if "-m" not in arguments:  # a sweep's runs are each composed by the check
        with initialize_config_dir(CONF, version_base="1.3"):
            assert build_run(compose("config", arguments), corpus).train.steps > 0


@pytest.mark.parametrize("line", of_module(*WORK))
def test_the_arguments_of_another_command_are_its_own(line, tmp_path, monkeypatch):
    _, _, name, *arguments = shlex.split(line)
    module = importlib.import_module(f"foreshock.{name}")
    for work in WORK[name]:
        monkeypatch.setattr(module, work, reach)
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("foreshock.experiments.gpu_record.machine", lambda: {"device": "some GPU"})
    (tmp_path / "runs").mkdir()
    for key, _, value in (argument.partition("=") for argument in arguments):
        if key in ("runs", "report"):  # a folder that is to be there is looked for first
            (tmp_path / value).mkdir(parents=True, exist_ok=True)
        if key == "detector":
            (tmp_path / value).touch()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(Reached):
        module.main(arguments)


def test_every_python_command_is_checked_here():
    known = {*of_module("experiments.reproduce", "experiments.train", *WORK)}
    assert {line for line in COMMANDS if line.startswith("python")} == known
    assert set(UNCHECKED) <= known


@pytest.fixture
def made(tmp_path):
    """``made(line)``: the commands that a line of make would start, by programs that only say how they were called."""
    programs = tmp_path / "venv" / "bin"
    programs.mkdir(parents=True)
    for name in ("python", "ruff", "mypy"):
        (programs / name).write_text(f'#!/bin/sh\nprintf "%s\\n" "{name} $*"\n')
        (programs / name).chmod(0o755)
    (tmp_path / "venv" / ".locked").touch()

    def run(line: str) -> list[str]:
        arguments = [word for word in shlex.split(line)[1:] if not word.startswith("PYTHON=")]
        chosen = [f"VENV={tmp_path / 'venv'}", f"PYTHON={programs / 'python'}"]
        environment = {key: value for key, value in os.environ.items() if not key.startswith("MAKE")}
        done = subprocess.run(
            ["make", "--silent", "-C", str(ROOT), *arguments, *chosen], env=environment, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        return done.stdout.splitlines()

    return run


MADE = [line for line in COMMANDS if line.startswith("make ") and line.split()[1] not in ("clean", "help", "setup")]


@pytest.mark.parametrize("line", MADE)
def test_make_starts_commands_that_there_are(line, made):
    """What its ARGS mean is judged above, where a command of the same module is; here, that each target starts it."""
    said = [shlex.split(command) for command in made(line) if not command.startswith("python -c")]
    assert said
    given = next((word.removeprefix("ARGS=") for word in shlex.split(line) if word.startswith("ARGS=")), "")
    for program, *arguments in said:
        assert program in ("python", "ruff", "mypy")
        module = arguments[1] if arguments[:1] == ["-m"] else None
        assert module in (None, "pytest", "tests.six_cpus", "experiments.reproduce", *WORK)
        if module == "experiments.reproduce":
            check_overrides("reproduce", arguments[2:])
    assert any(given in " ".join(arguments) for _, *arguments in said)
