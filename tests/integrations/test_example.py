"""The examples of the Hugging Face Trainer run as scripts and print what they read, and what alarms."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("transformers")
pytest.importorskip("accelerate")
from foreshock.experiments.plain_config import read
from foreshock.monitors.cadence import Cadence

ROOT = Path(__file__).parents[2]


def run(script: str, folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(ROOT / "examples" / script), *arguments]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stderr
    return done


def test_the_trainer_script_trains_and_prints_readings(tmp_path):
    done = run("hf_trainer.py", tmp_path, "40")
    said = [
        re.fullmatch(r"step (\d+): (\d+) readings, laws at most ([\d.]+) of 4\.26", x) for x in done.stdout.splitlines()
    ]
    lines = [line for line in said if line]
    assert len(lines) >= 2 and all(int(line[2]) > 20 and 0.1 < float(line[3]) < 4.26 for line in lines)
    assert "monitors watch GPT2LMHeadModel" in done.stderr
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_two_bits_of_a_backward_from_step_100_alarm_at_the_first_reading_by_layer_and_head(tmp_path):
    lines = run("hf_trainer_alarm.py", tmp_path, "200", "100").stdout.splitlines()
    alarms = [json.loads(line) for line in lines if line.startswith('{"run"')]
    first = next(alarm for alarm in alarms if alarm["signal"] == "value_shift_residual.over_noise")
    cadence = Cadence(read("monitor", "attention_laws")["every_steps"], jittered=True)
    assert first["step"] == next(step for step in range(100, 201) if cadence.is_due(step))
    assert min(alarm["step"] for alarm in alarms) == first["step"]  # 99 healthy steps are silent
    assert (first["rule"], first["severity"], first["law"], first["head"]) == ("universal", "SEV1", "value shift", 1)
    assert first["value"] > first["threshold"] > 4
    published = (ROOT / "docs" / "integrations.md").read_text()
    assert published.count(f'"step": {first["step"]},') == 1 and set(first) <= set(re.findall(r'"(\w+)":', published))
    assert not list(tmp_path.iterdir())
