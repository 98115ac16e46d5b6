"""The README's examples, a new fault, a new monitor and a new detector, work as printed."""

import csv
import importlib.util
import re
import sys
from dataclasses import replace
from itertools import count
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from foreshock.analysis.detect.entrants import check_causal, entrant_of
from foreshock.experiments import trace
from foreshock.experiments.build import ROOT, construct
from foreshock.experiments.training.loop import train
from foreshock.faults.base import Fault, LearningRateScale, Sites
from foreshock.monitors.base import Monitor, StepView, due_readings
from foreshock.monitors.cadence import Cadence
from tests.contracts.commands import planned_by

README = (Path(__file__).parents[2] / "README.md").read_text()


def python_block(index: int) -> str:
    return re.findall(r"```python\n(.*?)```", README, re.DOTALL)[index]


def yaml_block(index: int) -> str:
    return re.findall(r"```yaml\n(.*?)```", README, re.DOTALL)[index]


def module_of(name: str, block: int, folder: Path, monkeypatch) -> None:
    """Import a block of the README as the module that its file would be."""
    path = folder / f"{name.rpartition('.')[2]}.py"
    path.write_text(python_block(block))
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, name, module)
    spec.loader.exec_module(module)


@pytest.fixture
def example(tmp_path, monkeypatch):
    module_of("foreshock.faults.lr_flicker", 0, tmp_path, monkeypatch)
    return construct(yaml.safe_load(yaml_block(0)), "fault")


@pytest.fixture
def trend(tmp_path, monkeypatch):
    module_of("foreshock.monitors.loss_trend", 1, tmp_path, monkeypatch)
    return lambda: construct(yaml.safe_load(yaml_block(1)), "monitor.loss_trend")


def test_the_example_fault_is_a_fault(example):
    healthy = Sites(batch_size=16)
    assert isinstance(example, Fault)
    assert example.sites(499, healthy) is healthy
    assert example.sites(500, healthy) == example.sites(520, healthy)
    assert example.sites(500, healthy) == Sites(batch_size=16, lr_scale=LearningRateScale().times(10.0))
    assert example.sites(501, healthy) is healthy
    assert example.sites(600, healthy) is healthy


def losses(*values: float) -> list[StepView]:
    """Views of the first readings, which differ in step and loss alone."""
    due = (step for step in count(1) if Cadence(10, jittered=True).is_due(step))
    return [
        StepView(step=step, tokens=0, loss=torch.tensor(value), grad_norm=torch.ones(()), anatomy=None)
        for step, value in zip(due, values, strict=False)
    ]


def test_the_example_monitor_is_a_monitor(trend):
    monitor = trend()
    assert isinstance(monitor, Monitor)
    assert [due_readings(monitor, view.step, monitor.observe(view)) for view in losses(4.0, 3.0, 5.0)] == [
        {},
        {"loss_trend": pytest.approx(-1.0)},
        {"loss_trend": pytest.approx(5.0 - 3.9)},
    ]


def test_the_example_monitor_reads_on_after_a_resume(trend):
    views, whole, first, resumed = losses(4.0, 3.0, 5.0, 2.0), trend(), trend(), trend()
    expected = [whole.observe(view) for view in views]
    for view in views[:2]:
        first.observe(view)
    resumed.load_state_dict(first.state_dict())
    assert [resumed.observe(view) for view in views[2:]] == expected[2:]


def test_the_example_monitor_watches_a_run(trend, make_run, tmp_path):
    """Its file in conf/monitor stands for its node: the run, its trace and a resume have the monitor."""
    run = make_run("train.steps=40")
    nodes = run.config["monitor"] | {"loss_trend": yaml.safe_load(yaml_block(1))}
    run = replace(run, config=run.config | {"monitor": nodes}, monitors={**run.monitors, "loss_trend": trend()})
    train(run, tmp_path)
    series = trace.read(tmp_path / run.run_id).signals["loss_trend"]
    assert series.steps.tolist() == [26, 37] and np.isfinite(series.values).all()


def test_the_example_monitor_s_places_are_where_the_readme_says(trend):
    assert yaml_block(1).startswith("# @package monitor.loss_trend\n")
    row = next(csv.reader([re.search(r"`(loss_trend,.*?)`", README, re.DOTALL).group(1)]))
    header = next(csv.reader((ROOT / "monitors" / "catalogue.csv").open()))
    assert len(row) == len(header) and row[0] == trend().signals[0].name
    assert (row[3], row[4]) == (trend().signals[0].unit, trend().signals[0].bad)
    assert yaml.safe_load(re.search(r"`(loss trend: .*?)`", README).group(1)) == {"loss trend": ["loss_trend"]}
    assert "  laptop: {steps: 1500, monitors: [" in (ROOT / "conf" / "experiment" / "paper_attention.yaml").read_text()


def test_the_example_experiment_plans_its_runs(tmp_path):
    (tmp_path / "experiment").mkdir()
    (tmp_path / "experiment" / "late_bits.yaml").write_text(yaml_block(2))
    for scale, steps, onset in (("laptop", 600, 300), ("published", 3000, 500)):
        given = [f"hydra.searchpath=[file://{tmp_path}]", "experiment=late_bits", f"scale={scale}"]
        experiment, planned = planned_by(given)
        assert f"train.steps={steps}" in planned[0].overrides and f"fault.onset={onset}" in planned[0].overrides
        assert {*experiment["baseline"]} < {*experiment["detectors"]}


def test_the_example_detector_is_a_detector(tmp_path):
    (tmp_path / "mine.py").write_text(python_block(2))
    x = np.array([2.0, np.nan, 3.0, -9.0, 1.5])
    with entrant_of(tmp_path / "mine.py") as entrant:
        assert entrant.signals == ("grad_global_norm",)
        assert entrant.rule.statistic(x).tolist() == [1.0, 0.0, 2.0, 0.0, 0.5]
        check_causal(entrant.rule, x)
