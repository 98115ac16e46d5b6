"""The example of the Hugging Face Trainer runs as a script and prints what it reads."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("transformers")
pytest.importorskip("accelerate")
ROOT = Path(__file__).parents[2]


def test_the_trainer_script_trains_and_prints_readings(tmp_path):
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(ROOT / "examples" / "hf_trainer.py"), "40"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stderr
    said = [
        re.fullmatch(r"step (\d+): (\d+) readings, laws at most ([\d.]+) of 4\.26", x) for x in done.stdout.splitlines()
    ]
    lines = [line for line in said if line]
    assert len(lines) >= 2 and all(int(line[2]) > 20 and 0.1 < float(line[3]) < 4.26 for line in lines)
    assert "monitors watch GPT2LMHeadModel" in done.stderr
    assert not list(tmp_path.iterdir())
