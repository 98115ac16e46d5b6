"""One class has one name in a clone, and the wheel has all that the commands need."""

import importlib
import json
import os
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

import foreshock.faults.base
from foreshock.experiments.build import ROOT
from foreshock.names import FOLDERS

SETTINGS = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
TINY = [
    "model.d_model=16", "model.n_heads=2", "model.d_ff=32", "model.context_length=16", "train.batch_size=8",
    "train.steps=20", "train.held_out_every_steps=5", "train.warmup_steps=5", "fault=bf16_shift", "data=text",
]  # fmt: skip


def test_a_class_of_a_clone_is_one_class_under_both_names():
    short = importlib.import_module("faults.base")
    assert short is foreshock.faults.base and short.Sites is foreshock.faults.base.Sites
    assert short.__spec__.name == "foreshock.faults.base"


@pytest.mark.parametrize(
    "statement",
    [
        "import models.bits, monitors.spectra, monitors.conservation, monitors.router",
        "from analysis.alarms import conformal_threshold",
        "from analysis.score import score",
        "from experiments.trace import read",
    ],
)
def test_these_names_stay_importable(statement):
    subprocess.run([sys.executable, "-c", statement], cwd=ROOT, check=True)


def test_every_folder_of_code_is_a_package_of_the_wheel():
    folders = {path.parent.relative_to(ROOT) for name in FOLDERS for path in (ROOT / name).rglob("__init__.py")}
    wanted = {f"foreshock.{'.'.join(folder.parts)}" for folder in folders}
    own = {"foreshock", *(f"foreshock.{path.parent.name}" for path in (ROOT / "foreshock").glob("*/__init__.py"))}
    assert wanted | own | {"foreshock.conf", "foreshock.results"} == set(SETTINGS["packages"])


@pytest.fixture
def wheel(once):
    def build(out):
        command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "-w", out]
        subprocess.run([*command, ROOT], check=True, capture_output=True, cwd=out)

    (path,) = once("wheel", build).glob("*.whl")
    return path


@pytest.mark.slow
def test_the_wheel_has_every_configuration_and_nothing_at_the_top_level(wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    assert {name.split("/")[0] for name in names if not name.startswith("foreshock-")} == {"foreshock"}
    assert {f"foreshock/conf/{p.relative_to(ROOT / 'conf').as_posix()}" for p in ROOT.glob("conf/**/*.yaml")} <= names
    assert "foreshock/monitors/catalogue.csv" in names and "foreshock/py.typed" in names


@pytest.mark.e2e
@pytest.mark.slow
def test_installed_commands_train_the_runs_of_a_clone_beside_a_folder_named_models(wheel, text, tmp_path):
    site, mine = tmp_path / "site", tmp_path / "mine"
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(site)
    (mine / "models").mkdir(parents=True)
    (mine / "models" / "__init__.py").write_text("raise RuntimeError('not ours')\n")
    environment = os.environ | {"PYTHONPATH": str(site)}

    def run(*command: str, cwd: Path = mine, env: dict = environment) -> str:
        done = subprocess.run([sys.executable, "-m", *command], cwd=cwd, env=env, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done.stdout

    given = [*TINY, f"data.path={text}", "quiet=true"]
    run("foreshock", "train", *given)
    (folder,) = (mine / "runs").iterdir()
    assert run("experiments.train", *given, "dry_run=true", cwd=ROOT, env=dict(os.environ)).startswith(folder.name)
    assert json.loads((folder / "manifest.json").read_text())["end_reason"] == "completed"
    assert "current" in run("foreshock", "runs", env=environment | {"COLUMNS": "200"})


def test_an_unknown_command_names_the_nearest():
    done = subprocess.run([sys.executable, "-m", "foreshock", "trian"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.endswith("did you mean 'train'?\n") and done.stderr.count("\n") == 1
