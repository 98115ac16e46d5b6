"""Made-up runs on disk, with a known answer, as many as a test asks for."""

from __future__ import annotations

import pytest

from analysis.simulated import simulate_experiment


@pytest.fixture
def made(tmp_path):
    """``simulate_experiment`` into a folder of its own: ``made(counts, signals, detectors, faults, ...)``."""

    def make(*what, name: str = "made", **options):
        return simulate_experiment(tmp_path / name, *what, **options)

    return make
