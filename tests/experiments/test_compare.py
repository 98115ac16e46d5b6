"""A comparison of monitors is composed in full before a run is trained, and is scored as any experiment."""

from __future__ import annotations

import json
import sys

import pandas as pd
import pytest
import yaml
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from foreshock.analysis.runs.load import load
from foreshock.analysis.runs.simulated import simulate_experiment
from foreshock.analysis.scores.contest import contest
from foreshock.analysis.scores.lead_by_dose import lead_by_dose
from foreshock.experiments import compare
from foreshock.experiments.build import ROOT
from foreshock.experiments.compare import Comparison, detectors_of
from foreshock.experiments.reproduce import build_all, chosen_experiment, planned_runs
from foreshock.experiments.scoring import check_runs, check_settings
from tests.analysis.made_up_board import DETECTORS, EARLY, LATE, SIGNALS

ISSUE = ["monitors=[delta_w,loss]", "fault=bf16_shift", "bits=8,5,6,7", "seeds=5"]


def test_the_line_of_the_readme_is_an_experiment_of_these_monitors_and_doses(text, tiny):
    comparison = Comparison.of([*ISSUE, "onset=3", "data=text", f"data.path={text}", *tiny, "scale.alpha=0.2"])
    experiment = comparison.experiment()
    assert experiment["detectors"] == {
        "Delta W entropy": ["delta_w_spectral_entropy.q.w50", "delta_w_spectral_entropy.k.w50"],
        "training loss": ["train_loss_ema"],
        "unsmoothed training loss": ["train_loss_raw"],
        "held-out loss (label's input)": ["held_out_loss"],
    }
    assert [fault["dose"] for fault in experiment["faults"].values()] == [5, 6, 7, 8]
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        given = ["scale=laptop", *comparison.passed]
        settings = OmegaConf.to_container(compose("reproduce", given), resolve=False)
        settings = OmegaConf.create({**settings, "experiment": experiment})
        settings = OmegaConf.to_container(settings, resolve=True)
        chosen = chosen_experiment(settings, given)
        check_settings(settings, chosen, given)
        planned = planned_runs(chosen, settings["scale"])
        one_of_each = list({(cell.role, cell.fault): cell for cell in planned}.values())
        runs = build_all([[*given, *cell.overrides] for cell in one_of_each])
        check_runs(settings, chosen, one_of_each, runs)
    assert len(planned) == 4 * 5 + 4 + 9 + 3
    bits = [run.fault.bits for run in runs if run.fault.onset is not None]
    assert bits == [5, 6, 7, 8] and all(run.fault.onset in (3, None) for run in runs)
    assert {name for run in runs for name in run.nodes["monitor"]} == {"delta_w", "loss"}


def test_a_monitor_without_a_detector_enters_by_its_own_name(monkeypatch):
    assert detectors_of(["gradient_norm"]) == {"gradient norm": ["grad_global_norm"]}
    monkeypatch.setattr(compare, "options", lambda group: [])
    assert detectors_of(["loss"]) == {"loss": ["train_loss_raw", "train_loss_ema"]}


def test_without_a_dose_the_fault_s_file_gives_them():
    comparison = Comparison.of(["monitors=[loss]", "fault=bf16_shift", "onset=3"])
    assert (comparison.dose, comparison.values, comparison.fixed) == ("bits", (3, 5, 7), {"onset": "3"})
    assert Comparison.of(["monitors=[loss]", "fault=bf16_shift", "bits=1,2"]).values == (1, 2)


@pytest.mark.parametrize("fault", ["clip_off", "kv_group_swap", "clip_scope"])  # a dose null, one dose alone, words
def test_doses_of_a_file_that_make_no_axis_are_not_taken(fault):
    with pytest.raises(ValueError, match=f"fault={fault}: no key of the fault has several values"):
        Comparison.of(["monitors=[loss]", f"fault={fault}"])


def test_a_label_of_a_fault_is_no_dose():
    with pytest.raises(ValueError, match="doses=1,2 is not allowed: a key of fault=bf16_shift is one of sites, bits"):
        Comparison.of(["monitors=[loss]", "fault=bf16_shift", "doses=1,2"])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({0: "monitors=[delta_v]"}, r"monitors='delta_v' is not allowed: one of .*nearest are 'delta_w'"),
        ({0: "monitors=[]"}, r'monitors is missing: such as "monitors=\[delta_w,loss\]"'),
        ({0: "monitors=[loss,loss]"}, r"monitors=loss,loss is not allowed: loss stands there twice"),
        ({1: "fault=bf16shift"}, r"fault='bf16shift' is not allowed: .*nearest are 'bf16_shift'"),
        (
            {2: "bit=5,6"},
            r"bit=5,6 is not allowed: a key of fault=bf16_shift is one of sites, bits.*nearest are 'bits'",
        ),
        ({2: "bits=5"}, r"fault=bf16_shift: no key of the fault has several values: .* such as bits=6,7$"),
        ({2: "bits=5,6", 3: "onset=0,10"}, r"bits and onset have several values"),
        ({2: "phase=backward,both"}, r"phase=backward,both is not allowed: 'backward' is no number, and a dose is"),
        ({2: "bits=5,5"}, r"bits.*5"),
        ({3: "seeds=none"}, r"seeds=none is not allowed: a whole number from 1"),
        ({3: "scale=huge"}, r"scale='huge' is not allowed: one of desk"),
        ({3: "model=mha_nan"}, r"model='mha_nan' is not allowed: .*nearest are 'mha_nano'"),
        ({3: "loud"}, r"'loud' is not allowed: key=value"),
    ],
)
def test_a_mistake_is_named_before_anything_is_written(changes, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=message):
        Comparison.of([changes.get(i, argument) for i, argument in enumerate(ISSUE)])
    assert not list(tmp_path.iterdir())


def arguments(tmp_path, text, tiny):
    sizes = [line for line in tiny if not line.startswith("train.steps=")]
    return [
        "compare", *ISSUE[:2], "bits=2,8", "seeds=1", "data=text", f"data.path={text}", *sizes, "steps=60",
        "monitor.delta_w.every_steps=10", "experiment.seeds={reference: 4, calibration: 1, test: 1, faulty: 1}",
        "at_once=1", f"out={tmp_path / 'runs'}", f"report={tmp_path / 'report'}",
    ]  # fmt: skip


def test_too_few_healthy_runs_for_the_rate_are_told_before_training(tmp_path, text, tiny, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [*arguments(tmp_path, text, tiny), "scale.alpha=0.05"])
    with pytest.raises(SystemExit):
        compare.main()
    assert "experiment.seeds.calibration=1 is not allowed" in capsys.readouterr().err
    assert not (tmp_path / "runs").exists()


@pytest.mark.slow
def test_one_line_trains_scores_and_draws(tmp_path, text, tiny, monkeypatch):
    monkeypatch.setattr(sys, "argv", [*arguments(tmp_path, text, tiny), "scale.alpha=0.5"])
    compare.main()
    report = tmp_path / "report"
    assert {"index.html", "figure.png", "lead_by_dose.csv", "leadtime.csv"} <= {path.name for path in report.iterdir()}
    table = pd.read_csv(report / "lead_by_dose.csv")
    assert set(table["dose"]) == {2, 8}
    assert set(table["detector"]) == {
        "Delta W entropy", "training loss", "unsmoothed training loss", "held-out loss (label's input)", "onset oracle",
    }  # fmt: skip
    written = yaml.safe_load((report / "conf" / "experiment" / "compare_bf16_shift_bits.yaml").read_text())
    assert written["experiment"]["dose"] == "bits"
    assert len(list((tmp_path / "runs").iterdir())) == 2 + 6


def test_the_table_has_the_leads_of_every_dose(tmp_path):
    faults = {
        "bits_5": {"shows": {EARLY: 600}, "diverges": None, "onset": 301},
        "bits_7": {"shows": {EARLY: 400, LATE: 700}, "diverges": 800, "onset": 301},
    }
    counts = {"reference": 5, "calibration": 9, "test": 6, "faulty": 12}
    index = simulated(tmp_path, counts, faults)
    table = lead_by_dose(contest(index, "reference")).set_index(["detector", "dose"])
    assert table.loc[("onset oracle", 7.0), "lead_steps"] == pytest.approx(499, abs=20)
    early, late = (table.loc[(name, 7.0)] for name in ("early", "late"))
    assert early["diverged"] == late["diverged"] == 12
    assert early["lead_steps"] > 300 > 150 > late["lead_steps"] > 0
    assert early["lead_low"] <= early["lead_steps"] <= early["lead_high"]
    assert pd.isna(table.loc[("early", 5.0), "lead_steps"]) and table.loc[("early", 5.0), "diverged"] == 0
    assert table.loc[("early", 5.0), "detected"] > 0.9 > 0.5 > table.loc[("late", 5.0), "detected"]


def simulated(folder, counts, faults):
    """Made-up runs whose faults have doses."""
    detectors = {name: DETECTORS[name] for name in ("early", "late")}
    simulate_experiment(folder / "made", counts, SIGNALS, detectors, faults, baseline="late")
    index = json.loads((folder / "made" / "experiment.json").read_text())
    for name, fault in index["experiment"]["faults"].items():
        fault["dose"] = float(name.removeprefix("bits_"))
    index["experiment"] |= {"draw": "lead_by_dose", "dose": "bits"}
    (folder / "made" / "experiment.json").write_text(json.dumps(index))
    return load(folder / "made", folder / "made")
