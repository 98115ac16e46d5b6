"""The commands that a text of ours shows, in code blocks and between backticks, and what one of them plans.

Taken are ``python -m experiments.*`` and ``python -m analysis.*``, ``make``, and ``experiment=...``, which stands for
``python -m experiments.reproduce experiment=...``. The fixture beside it, ``commands_9f4e31e.txt``, holds those of
commit 9f4e31e, written out where its text described one in words.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from hydra import compose, initialize_config_dir

from foreshock.experiments.cli import CONF, flags_and_overrides
from foreshock.experiments.plan import PlannedRun
from foreshock.experiments.reproduce import chosen_experiment, planned_runs
from foreshock.experiments.scoring import check_settings
from foreshock.experiments.settings import ReproduceCommand, check_command, resolved

OF_9F4E31E = Path(__file__).with_name("commands_9f4e31e.txt").read_text().splitlines()
COMMAND = re.compile(r"(python3? -m (experiments|analysis)\b|make [a-z]|experiment=\w+ )")


def commands_of(text: str) -> list[str]:
    """Each command once, on one line, without its comment."""
    blocks = re.findall(r"^```\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)
    lines = [line for block in blocks for line in block.replace("\\\n", " ").splitlines()]
    prose = re.sub(r"^```.*?^```$", "", text, flags=re.DOTALL | re.MULTILINE)
    spans = [" ".join(span.split()) for span in re.findall(r"`([^`]+)`", prose)]
    shown = [line for line in [*lines, *spans] if COMMAND.match(line)]
    return list(dict.fromkeys(_written_out(line) for line in shown))


def _written_out(line: str) -> str:
    line = shlex.join(shlex.split(line, comments=True)).replace("python3 -m", "python -m", 1)
    return line if line.startswith(("python", "make")) else f"python -m experiments.reproduce {line}"


def targets_of(makefile: str) -> list[str]:
    """``make`` with each target of a Makefile that a comment explains, and with the ``ARGS`` that the comment shows."""
    commands = []
    for comment, target in re.findall(r"((?:^# .*\n)+)([a-z0-9-]+):", makefile, re.MULTILINE):
        given = [[], *([f"ARGS={shown}"] for shown in re.findall(r'ARGS="([^"]*)"', comment))]
        commands += [shlex.join(["make", target, *arguments]) for arguments in given]
    return commands


def planned_by(arguments: Sequence[str]) -> tuple[dict[str, Any], list[PlannedRun]]:
    """The experiment and the runs of ``experiments.reproduce`` with these arguments, judged as before training."""
    _, given = flags_and_overrides(arguments)
    with initialize_config_dir(CONF, version_base="1.3"):
        settings = resolved(compose("reproduce", given))
    check_command(ReproduceCommand, settings)
    experiment = chosen_experiment(settings, given)
    check_settings(settings, experiment, given)
    return experiment, planned_runs(experiment, settings["scale"])


def corpus(config: Any, context_length: int) -> SimpleNamespace:
    """In place of a corpus, which some commands name and the clone has not."""
    return SimpleNamespace(vocab_size=config.vocab_size or 256, digest="d", config=config)
