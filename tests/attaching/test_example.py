"""The example runs as a script, in a process of its own, and prints what it reads."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_the_nanogpt_style_script_trains_and_prints_readings(tmp_path):
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(ROOT / "examples" / "nanogpt_style.py"), "30"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    said = [re.fullmatch(r"step (\d+): loss ([\d.]+), (\d+) readings, laws up to ([\d.]+) of 4\.26", x) for x in lines]
    assert [int(line[1]) for line in said] == [11, 26]  # jittered
    assert float(said[1][2]) < float(said[0][2]) < 5
    assert all(int(line[3]) > 20 and 0.2 < float(line[4]) < 4.26 for line in said)
    assert done.stderr.startswith("foreshock: 22 monitors watch GPT, 6 decline:\n")
    assert not list(tmp_path.iterdir())
