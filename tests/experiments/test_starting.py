"""Signals in the first seconds of a command that trains: one line, its exit code, nothing half-written.

An audit hook in the command's own process sends the signal at the very moment that a module is imported or a file is
opened, so that no test depends on how fast a machine is.
"""

import os
import signal
import subprocess
import sys
from functools import partial

import pytest

from foreshock.__main__ import COMMANDS
from foreshock.experiments.build import ROOT
from foreshock.starting import TRAINING, is_training_command

HOOK = """
import os, signal, sys

kind, name, number = os.environ["AT_KIND"], os.environ["AT_NAME"], int(os.environ["AT_SIGNAL"])
sent = []


def hook(event, arguments):
    if event == kind and not sent and str(arguments[0]).endswith(name) and sys.argv[-1:] == [os.environ["AT_LAST"]]:
        sent.append(True)
        os.kill(os.getpid(), number)


sys.addaudithook(hook)
"""
"""Before Python's first line of a command; of this process alone, not of the workers that it starts."""

FIRST, TORCH, LOOP = (("import", name) for name in ("foreshock.experiments", "torch", "training.loop"))
CONFIGURATION, CORPUS = ("open", "conf/config.yaml"), ("open", "text.txt")
"""Moments of a start, in its order: an audit event and what its first argument ends with."""

SAID = {
    signal.SIGTERM: (143, "stopped by SIGTERM: the same command resumes from the last checkpoints\n"),
    signal.SIGHUP: (129, "stopped by SIGHUP: the same command resumes from the last checkpoints\n"),
    signal.SIGINT: (130, "interrupted: the same command resumes from the last checkpoints\n"),
}


def started(command, arguments, moment, number, tmp_path):
    """A command that gets a signal at a moment; its exit code and standard error."""
    (tmp_path / "hook").mkdir()
    (tmp_path / "hook" / "sitecustomize.py").write_text(HOOK)
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(tmp_path / "hook"), str(ROOT)]),
        "AT_KIND": moment[0],
        "AT_NAME": moment[1],
        "AT_SIGNAL": str(int(number)),
        "AT_LAST": arguments[-1],
    }
    heard = partial(signal.signal, number, signal.SIG_DFL)  # a suite in the background ignores SIGINT
    line = [sys.executable, "-m", *command, *arguments]
    return subprocess.run(
        line, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300, preexec_fn=heard
    )


@pytest.mark.e2e
@pytest.mark.slow
@pytest.mark.parametrize(
    ("command", "moment", "number"),
    [
        ("foreshock train", FIRST, signal.SIGTERM),
        ("foreshock train", TORCH, signal.SIGINT),
        ("experiments.train", LOOP, signal.SIGHUP),
        ("foreshock train", CONFIGURATION, signal.SIGINT),
        ("foreshock train", CORPUS, signal.SIGTERM),
        ("foreshock reproduce", TORCH, signal.SIGTERM),
        ("foreshock.experiments.reproduce", CORPUS, signal.SIGINT),
        ("foreshock campaign", LOOP, signal.SIGTERM),
    ],
)
def test_a_command_that_is_starting_ends_with_one_line(command, moment, number, tiny, text, tmp_path):
    places = [f"out={tmp_path / 'runs'}"] + ([] if "train" in command else [f"report={tmp_path / 'report'}"])
    arguments = ["data=text", f"data.path={text}", *places]
    arguments += [*tiny, "quiet=true"] if "train" in command else []
    ended = started(command.split(), arguments, moment, number, tmp_path)
    assert (ended.returncode, ended.stderr) == SAID[number]
    assert ended.stdout == "" and [path.name for path in tmp_path.iterdir()] == ["hook"]


@pytest.mark.e2e
def test_a_program_that_imports_the_package_keeps_its_handlers(tmp_path):
    """Also one that is started by ``-m`` itself."""
    own = tmp_path / "mine"
    own.mkdir()
    (own / "__init__.py").write_text("import foreshock\n")
    shown = "import signal\nprint([signal.getsignal(n) for n in (15, 2)] == [0, signal.default_int_handler])\n"
    (own / "train.py").write_text(shown)
    done = subprocess.run(
        [sys.executable, "-m", "mine.train", "train"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        preexec_fn=lambda: [signal.signal(number, signal.SIG_DFL) for number in (signal.SIGTERM, signal.SIGINT)],
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "True\n", "")


@pytest.mark.parametrize(
    ("original", "trains"),
    [
        ("python -m foreshock train seed=1", True),
        ("python -X dev -m foreshock.experiments.reproduce", True),
        ("python -m experiments.campaign", True),
        ("python -m foreshock score runs=a", False),
        ("python -m foreshock", False),
        ("python -m analysis.report", False),
        ("python -m mine.train", False),
        ("python script.py -m", False),
        ("python -m", False),
    ],
)
def test_commands_that_train_are_known_by_their_command_line(original, trains):
    assert is_training_command(original.split()) == trains


def test_every_command_that_trains_is_among_them():
    """Those whose modules end in one line for a signal, and no others."""
    sources = {name: (ROOT / f"{module.replace('.', '/')}.py").read_text() for name, (module, _) in COMMANDS.items()}
    assert {name for name, source in sources.items() if "guarded(" in source or "@stoppable()" in source} == {*TRAINING}
    assert all(COMMANDS[name][0] == f"experiments.{name}" for name in TRAINING)
