"""Made-up runs on disk, with a known answer, as many as a test asks for."""

from __future__ import annotations

from pathlib import Path

import pytest

from foreshock.analysis.runs.simulated import simulate_experiment
from tests.analysis.made_up_board import COUNTS, DETECTORS, FAULTS, SIGNALS


@pytest.fixture
def made(tmp_path):
    """``simulate_experiment`` into a folder of its own: ``made(counts, signals, detectors, faults, ...)``."""

    def make(*what, name: str = "made", **options):
        return simulate_experiment(tmp_path / name, *what, **options)

    return make


@pytest.fixture
def folder(made) -> Path:
    """The runs of ``tests.analysis.made_up_board``."""
    return made(COUNTS, SIGNALS, DETECTORS, FAULTS, baseline="late")
