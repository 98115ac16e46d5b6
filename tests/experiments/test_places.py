"""Files and folders of every command: a wrong one is one line with field and value, exit code 2, nothing written."""

import importlib
import os

import pytest

from foreshock.experiments import places

NO_FOLDER = "is not allowed: a folder, and"
NOT_THERE = "is not allowed: there is no such"
NO_FILE = "is not allowed: a file, and this is a folder"

COMMANDS = [
    ("analysis.score", "runs=FILE out=NEW", "runs", NO_FOLDER),
    ("analysis.score", "runs=MISSING out=NEW", "runs", NOT_THERE),
    ("analysis.score", "runs=DIR out=FILE", "out", NO_FOLDER),
    ("analysis.score", "runs=DIR out=BELOW", "out", NO_FOLDER),
    ("analysis.score", "runs=DIR out=NEW detector=MISSING", "detector", NOT_THERE),
    ("analysis.score", "runs=DIR out=NEW detector=DIR", "detector", NO_FILE),
    ("analysis.score", "runs=DIR out=NEW alarms=DIR", "alarms", NO_FILE),
    ("analysis.report", "runs=FILE report=DIR", "runs", NO_FOLDER),
    ("analysis.report", "runs=DIR report=FILE", "report", NO_FOLDER),
    ("analysis.report", "runs=DIR report=MISSING", "report", NOT_THERE),
    ("analysis.load", "runs=FILE csv=NEW", "runs", NO_FOLDER),
    ("analysis.load", "runs=DIR csv=FILE", "csv", NO_FOLDER),
    ("analysis.external", "logs=FILE out=NEW", "logs", NO_FOLDER),
    ("analysis.external", "logs=DIR out=FILE", "out", NO_FOLDER),
    ("analysis.calibrate", "runs=FILE out=NEW", "runs", NO_FOLDER),
    ("analysis.calibrate", "runs=DIR out=DIR", "out", NO_FILE),
    ("analysis.calibrate", "runs=DIR out=BELOW", "out", "is a file, and no folder to write in"),
    ("analysis.triage", "old=FILE new=DIR", "old", NO_FOLDER),
    ("analysis.triage", "old=DIR new=MISSING", "new", NOT_THERE),
    ("analysis.triage", "old=DIR new=DIR healthy=FILE", "healthy", NO_FOLDER),
    ("analysis.triage", "old_data=MISSING new_data=FILE", "old_data", NOT_THERE),
    ("analysis.triage", "old_evaluation=FILE new_evaluation=MISSING", "new_evaluation", NOT_THERE),
    ("analysis.triage", "old_weights=DIR new_weights=FILE", "old_weights", NO_FILE),
    ("analysis.triage", "old_data=FILE new_data=FILE out=FILE", "out", NO_FOLDER),
    ("experiments.import_runs", "csv MISSING out=NEW", "FILE", NOT_THERE),
    ("experiments.import_runs", "csv FILE out=FILE", "out", NO_FOLDER),
    ("experiments.import_runs", "csv FILE out=NEW columns=DIR", "columns", NO_FILE),
    ("experiments.runs", "list out=FILE", "out", NO_FOLDER),
    ("experiments.runs", "list out=MISSING", "out", NOT_THERE),
    ("experiments.runs", "list out=", "out", "is not allowed: a path"),
    ("experiments.faults", "markdown=DIR", "markdown", NO_FILE),
    ("experiments.faults", "markdown=BELOW", "markdown", "is a file, and no folder to write in"),
    ("experiments.faults", "markdown=", "markdown", "is not allowed: a path"),
    ("experiments.bench", "out=DIR", "out", NO_FILE),
    ("experiments.bench", "out=BELOW", "out", "is a file, and no folder to write in"),
]
TRAINING = [
    ("experiments.canary", "band=FILE", "band", NO_FOLDER),
    ("experiments.canary", "band=NEW healthy=FILE", "healthy", NO_FOLDER),
    ("experiments.canary", "band=DIR runs=MISSING", "runs", NOT_THERE),
    ("experiments.compare", "monitors=loss fault=bf16_shift bits=1,2 report=FILE", "report", NO_FOLDER),
]
"""Commands that read ``sys.argv``."""


@pytest.fixture
def named(tmp_path):
    """The paths that a row of the tables names."""
    (tmp_path / "file").write_text("step,loss\n0,1\n")
    (tmp_path / "dir").mkdir()
    words = {"FILE": "file", "DIR": "dir", "MISSING": "missing", "NEW": "new", "BELOW": "file/below"}
    return {word: str(tmp_path / name) for word, name in words.items()}


def _filled(line, named):
    return [
        "=".join(named.get(part, part) for part in argument.split("=")) if argument != "csv" else argument
        for argument in line.split()
    ]


def _check_refused(code, said, arguments, field, allowed, tmp_path):
    values = [argument.partition("=")[2] for argument in arguments if argument.startswith(f"{field}=")]
    value = values[0] if values else arguments[1]  # a FILE stands by itself
    assert code == 2 and len(said.splitlines()) == 1
    assert said.startswith(f"error: {field}={value!r} ") and allowed in said
    assert sorted(path.name for path in tmp_path.iterdir()) == ["dir", "file"]


@pytest.mark.parametrize(("command", "line", "field", "allowed"), COMMANDS)
def test_a_wrong_place_is_one_line(command, line, field, allowed, named, tmp_path, capsys):
    arguments = _filled(line, named)
    with pytest.raises(SystemExit) as end:
        importlib.import_module(f"foreshock.{command}").main(arguments)
    _check_refused(end.value.code, capsys.readouterr().err, arguments, field, allowed, tmp_path)


@pytest.mark.parametrize(("command", "line", "field", "allowed"), TRAINING)
def test_a_wrong_place_of_a_command_that_trains_is_one_line(
    command, line, field, allowed, named, tmp_path, capsys, monkeypatch
):
    arguments = _filled(line, named)
    monkeypatch.setattr("sys.argv", [command, *arguments])
    with pytest.raises(SystemExit) as end:
        importlib.import_module(f"foreshock.{command}").main()
    _check_refused(end.value.code, capsys.readouterr().err, arguments, field, allowed, tmp_path)


CHECKS = (
    places.check_path, places.check_no_file, places.check_folder_to_write, places.check_folder_to_read,
    places.check_file_to_read, places.check_there, places.check_file_to_write,
)  # fmt: skip


@pytest.mark.parametrize("check", CHECKS)
@pytest.mark.parametrize("path", ["", "  ", "a\0b", "x" * 5000])
def test_what_no_file_system_can_have_is_named(check, path):
    with pytest.raises(ValueError, match=r"^out=.* is not allowed: ") as error:
        check(path, "out")
    assert len(str(error.value)) < 200 and "\n" not in str(error.value)


def test_what_this_process_may_not_write_or_read_is_named(tmp_path, monkeypatch):
    """As the system says it: of root, under which tests may run, it says that everything is allowed."""
    closed, secret = tmp_path / "closed", tmp_path / "secret"
    closed.mkdir()
    secret.write_text("")
    monkeypatch.setattr(os, "access", lambda path, mode: path not in (closed, secret))
    for check in (places.check_folder_to_write, places.check_file_to_write):
        check(tmp_path / "new", "out")
        with pytest.raises(ValueError, match=r"^out=.*this process may not write in the folder '.*/closed'$"):
            check(closed / "new", "out")
    with pytest.raises(ValueError, match=r"^columns=.*this process may not read it$"):
        places.check_file_to_read(secret, "columns")
    with pytest.raises(ValueError, match=r"^runs=.*this process may not read it$"):
        places.check_folder_to_read(closed, "runs")


def test_a_place_that_cannot_be_reached_is_named(tmp_path, monkeypatch):
    """As the system says it of what lies in a folder that this process may not enter."""

    def closed(path):
        raise PermissionError(13, "Permission denied", path)

    monkeypatch.setattr(os, "lstat", closed)
    for check in CHECKS:
        with pytest.raises(ValueError, match=r"^out='.*/x' is not allowed: this process may not look there$"):
            check(tmp_path / "x", "out")


@pytest.mark.parametrize("check", CHECKS)
def test_a_link_to_nothing_is_no_place(check, tmp_path):
    (tmp_path / "dangling").symlink_to(tmp_path / "nothing")
    with pytest.raises(ValueError, match=r"^out='.*/dangling' is not allowed: this is a link to nothing$"):
        check(tmp_path / "dangling", "out")
    with pytest.raises(ValueError, match=r"^out='.*/below' is not allowed: '.*/dangling' is a link to nothing$"):
        check(tmp_path / "dangling" / "below", "out")


def test_a_missing_place_is_said_with_the_nearest_beside_it(tmp_path):
    (tmp_path / "runs").mkdir()
    with pytest.raises(ValueError, match=r"there is no such folder; the nearest is '.*/runs'"):
        places.check_folder_to_read(tmp_path / "rnus", "runs")


def test_places_that_may_be_pass(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("")
    places.check_folder_to_write("new/deeper", "out")
    places.check_file_to_write("new/file.json", "out")
    places.check_file_to_write("file", "out")
    places.check_folder_to_read(".", "runs")
    assert places.check_file_to_read("file", "columns").name == "file"
