"""The README's example of a new fault works as printed."""

import re
import sys
import types
from pathlib import Path

import pytest
import yaml

from experiments.build import construct
from faults.base import Fault, LearningRateScale, Sites

README = (Path(__file__).parents[2] / "README.md").read_text()


@pytest.fixture
def example(monkeypatch):
    module = types.ModuleType("faults.lr_flicker")
    monkeypatch.setitem(sys.modules, "faults.lr_flicker", module)
    exec(re.search(r"```python\n(.*?)```", README, re.DOTALL).group(1), module.__dict__)
    return construct(yaml.safe_load(re.search(r"```yaml\n(.*?)```", README, re.DOTALL).group(1)), "fault")


def test_the_example_fault_is_a_fault(example):
    healthy = Sites(batch_size=16)
    assert isinstance(example, Fault)
    assert example.sites(499, healthy) is healthy
    assert example.sites(500, healthy) == example.sites(520, healthy)
    assert example.sites(500, healthy) == Sites(batch_size=16, lr_scale=LearningRateScale().times(10.0))
    assert example.sites(501, healthy) is healthy
    assert example.sites(600, healthy) is healthy
