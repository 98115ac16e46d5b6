"""What analysis reads of conf/, in a process of its own: as a command that imports analysis alone."""

import json
import subprocess
import sys

from foreshock.experiments.build import ROOT


def test_an_experiment_is_read_without_what_trains():
    code = """
import json, sys
from foreshock.analysis.runs.conf import experiment_named
detectors = experiment_named("paper_attention")["detectors"]
print(json.dumps([len(detectors), "torch" in sys.modules]))
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    count, has_torch = json.loads(done.stdout)
    assert count > 10 and not has_torch
