"""Every conf/experiment file, at every scale, composes, and runs in fast mode from training to report."""

import pytest
import torch
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from experiments import reproduce
from experiments.build import ROOT, build_run
from experiments.plan import plan
from experiments.train import describe
from models.transformer import Transformer

CONF = ROOT / "conf"
EXPERIMENTS = sorted(path.stem for path in (CONF / "experiment").glob("*.yaml"))
SCALES = sorted(path.stem for path in (CONF / "scale").glob("*.yaml"))


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_every_cell_composes_and_builds(experiment, scale, text):
    given = [f"experiment={experiment}", f"scale={scale}", "data=text", f"data.path={text}"]
    with initialize_config_dir(str(CONF), version_base="1.3"):
        if scale == "paper":
            given += ["data.held_out=0.3"]
        settings = OmegaConf.to_container(compose("reproduce", given), resolve=True)
        cells = plan(settings["scale"]["seeds"], settings["experiment"]["faults"])
        one_of_each = list({(cell.fault, cell.role): cell for cell in cells}.values())
        runs = [build_run(compose("reproduce", [*given, *cell.overrides])) for cell in one_of_each]
    bits = settings["scale"]["attention_bits"]
    for cell, run in zip(one_of_each, runs, strict=True):
        assert run.seed == cell.seed
        if cell.fault:
            assert run.fault.bits == bits
    assert len({run.run_id for run in runs}) == len(runs)
    known = {signal.name for monitor in runs[0].monitors.values() for signal in monitor.signals} | {"held_out_loss"}
    shown = [*settings["experiment"]["detectors"].values(), *settings["experiment"]["figure"].values()]
    assert {name for names in shown for name in names} <= known
    with torch.device("meta"):
        Transformer(runs[0].model_config)
    assert "parameters" in describe(runs[0])


@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_it_runs_in_fast_mode_from_training_to_report(experiment, text, tiny, tmp_path, monkeypatch):
    """The real command with its launcher, on the tiny model: two faults at most, few seeds, 60 steps."""
    with initialize_config_dir(str(CONF), version_base="1.3"):
        faults = list(compose("reproduce", [f"experiment={experiment}"]).experiment.faults)
    arguments = [
        f"experiment={experiment}", "data=text", f"data.path={text}", *tiny, "train.steps=60",
        "monitor.qk_increment.every_steps=10", "monitor.delta_w.every_steps=10", "scale.alpha=0.5",
        "scale.seeds={reference: 4, calibration: 1, test: 1, faulty: 1}",
        *(f"~experiment.faults.{name}" for name in faults[2:]),
        f"out={tmp_path / 'runs'}", f"report={tmp_path / 'report'}",
    ]  # fmt: skip
    monkeypatch.setattr("sys.argv", ["reproduce", *arguments])
    reproduce.main()
    report = tmp_path / "report"
    assert {"index.html", "leadtime.csv", "runs.csv", "figure.png", "experiment.json"} <= {
        p.name for p in report.iterdir()
    }
    trained = {path.name for path in (tmp_path / "runs").iterdir()}
    assert len(trained) == 6 + len(faults[:2])
