import importlib
from importlib.util import find_spec

import pytest

from foreshock.__main__ import COMMANDS as INSTALLED
from foreshock.analysis import score
from foreshock.experiments import bench_stack

COMMANDS = (
    "analysis.order", "analysis.reduced", "analysis.score", "analysis.report", "analysis.threshold_source",
    "experiments.bench", "experiments.bench_gpt2", "experiments.runs",
    "analysis.external", "analysis.load", "experiments.import_runs",
    "experiments.bench_stack", "experiments.gpu_check", "experiments.gpu_tiles", "experiments.natural_rounding",
)  # fmt: skip


@pytest.mark.parametrize("command", COMMANDS)
def test_help_says_what_a_command_is_for(command, capsys):
    with pytest.raises(SystemExit) as done:
        importlib.import_module(command).main(["--help"])
    assert done.value.code == 0
    said = capsys.readouterr().out
    assert ("python" in said and "DIR" in said) or "make" in said or "=" in said


@pytest.mark.parametrize("command", [name for name in COMMANDS if "bench_gpt2" not in name and "gpu" not in name])
def test_wrong_arguments_end_a_command_with_one_line_and_code_2(command, capsys):
    with pytest.raises(SystemExit) as done:
        importlib.import_module(command).main(["nonsense"])
    said = capsys.readouterr().err
    begins = ("usage: python -m ", "usage: foreshock ", "error: ")
    assert done.value.code == 2 and said.startswith(begins) and said.count("\n") == 1


@pytest.mark.parametrize("command", INSTALLED)
def test_every_installed_command_has_a_module(command):
    assert find_spec(f"foreshock.{INSTALLED[command][0]}") is not None


def test_help_names_every_option_of_scoring(capsys):
    with pytest.raises(SystemExit):
        score.main(["--help"])
    options = {line.split("=")[0] for line in capsys.readouterr().out.splitlines() if "=" in line.split(" ")[0]}
    with pytest.raises(ValueError, match="is not an option") as refused:
        score._request(["nonsense=1"])
    assert options == set(str(refused.value).split(": ")[1].split(", "))


@pytest.mark.parametrize(
    ("argument", "message"),
    [("device=cuda", "device='cuda' is not allowed here"), ("device=tpu", "cpu or cuda"), ("sizes=0", "from 1 to")],
)
def test_a_benchmark_that_cannot_run_is_one_line(argument, message, monkeypatch, capsys):
    monkeypatch.setattr(bench_stack.torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit) as done:
        bench_stack.main([argument])
    said = capsys.readouterr().err
    assert done.value.code == 2 and message in said and len(said.splitlines()) == 1
