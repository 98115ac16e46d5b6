"""The README's examples, a new fault and a new detector, work as printed."""

import re
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import yaml

from analysis.entrants import check_causal, entrant_of
from experiments.build import construct
from faults.base import Fault, LearningRateScale, Sites

README = (Path(__file__).parents[2] / "README.md").read_text()


def python_block(index: int) -> str:
    return re.findall(r"```python\n(.*?)```", README, re.DOTALL)[index]


@pytest.fixture
def example(monkeypatch):
    module = types.ModuleType("faults.lr_flicker")
    monkeypatch.setitem(sys.modules, "faults.lr_flicker", module)
    exec(python_block(0), module.__dict__)
    return construct(yaml.safe_load(re.search(r"```yaml\n(.*?)```", README, re.DOTALL).group(1)), "fault")


def test_the_example_fault_is_a_fault(example):
    healthy = Sites(batch_size=16)
    assert isinstance(example, Fault)
    assert example.sites(499, healthy) is healthy
    assert example.sites(500, healthy) == example.sites(520, healthy)
    assert example.sites(500, healthy) == Sites(batch_size=16, lr_scale=LearningRateScale().times(10.0))
    assert example.sites(501, healthy) is healthy
    assert example.sites(600, healthy) is healthy


def test_the_example_detector_is_a_detector(tmp_path):
    (tmp_path / "mine.py").write_text(python_block(1))
    x = np.array([2.0, np.nan, 3.0, -9.0, 1.5])
    with entrant_of(tmp_path / "mine.py") as entrant:
        assert entrant.signals == ("grad_global_norm",)
        assert entrant.rule.statistic(x).tolist() == [1.0, 0.0, 2.0, 0.0, 0.5]
        check_causal(entrant.rule, x)
