"""A monitor inside the clone is one Python file and one YAML: runs have it, and no list is edited."""

import json
import os
import shutil
import subprocess
import sys

import pytest

from foreshock.experiments.build import ROOT
from tests.contracts.added import MONITOR

YAML = "# @package monitor.last_loss\n_target_: monitors.my_monitor.LastLoss\nevery_steps: 10\n"
FOLDERS = ("analysis", "conf", "experiments", "faults", "foreshock", "models", "monitors", "results")


@pytest.mark.e2e
def test_it_is_one_python_file_and_one_yaml(text, tiny, tmp_path):
    clone = tmp_path / "clone"
    for folder in FOLDERS:
        ignored = shutil.ignore_patterns("__pycache__", "*.csv.gz", "*.parquet", "*.png", "reference_set")
        shutil.copytree(ROOT / folder, clone / folder, ignore=ignored)
    shutil.copy(ROOT / "pyproject.toml", clone)
    (clone / "monitors" / "my_monitor.py").write_text(MONITOR)
    (clone / "conf" / "monitor" / "last_loss.yaml").write_text(YAML)
    given = ["data=text", f"data.path={text}", *tiny, "train.steps=40", "~monitor.loss", f"out={tmp_path / 'runs'}"]
    command = [sys.executable, "-m", "experiments.train", *given, "quiet=true"]
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    done = subprocess.run(command, cwd=clone, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (manifest,) = (tmp_path / "runs").glob("*/manifest.json")
    written = json.loads(manifest.read_text())
    assert "last_loss" in written["config"]["monitor"] and "loss" not in written["config"]["monitor"]
    assert "last_loss" in written["signals"]
