"""Paired differences and drifting signs on made-up runs with a known answer."""

from __future__ import annotations

import json

import numpy as np
import pandas as pd
import pytest

from foreshock.analysis.report import make_report
from foreshock.analysis.runs.load import load
from foreshock.analysis.runs.readings import at_end
from foreshock.analysis.scores.inference import bca_interval
from foreshock.analysis.scores.paired import differences, drift_table, paired_table
from tests.injections import card, of_learning_rate

HEADS = {"unit": "1", "bad": "both", "axes": ["layer", "head"], "every_steps": 10}
SIGNALS = {"norm": HEADS | {"bad": "up"}, "bias": HEADS}
FAULTS = {
    "control": {"onset": 1, "injection": card(of_learning_rate(1.0))},
    "idle": {"onset": 1, "injection": card(of_learning_rate(2.0))},
    "shifts": {"onset": 1, "shows": {"norm": 1}, "injection": card(of_learning_rate(3.0))},
}


def folder_of(made, seeds: int, **changes):
    counts = {"reference": 4, "calibration": 9, "test": 0, "faulty": seeds}
    folder = made(counts, SIGNALS, {"norm": ["norm"], "bias of delta": ["bias"]}, FAULTS, baseline="norm")
    index = json.loads((folder / "experiment.json").read_text())
    panels = {"held-out loss": {"signals": ["held_out_loss"]}, "norm": {"signals": ["norm"]}}
    index["experiment"] |= {"draw": "paired", "control": "control", "drift": ["bias"], "figure": panels, **changes}
    (folder / "experiment.json").write_text(json.dumps(index))
    return folder


def test_differences_are_of_one_seed_and_have_the_interval_of_their_mean(made):
    experiment = load(folder := folder_of(made, 10), folder)
    found = differences(experiment, "norm")
    of_fault, of_control = (at_end(experiment, f, experiment.panels["norm"], 1000) for f in ("shifts", "control"))
    assert list(found) == ["idle", "shifts"] and np.array_equal(found["shifts"], of_fault - of_control)
    assert found["shifts"] == pytest.approx(5 - 0.15, abs=0.2)  # from the highest of four heads to the last by far
    table = paired_table(experiment).set_index(["panel", "fault"])
    assert (table["seeds"] == 10).all() and len(table) == 4
    for (name, fault), row in table.iterrows():
        values = differences(experiment, name)[fault]
        assert row["mean_difference"] == values.mean()
        assert (row["low"], row["high"]) == bca_interval(values, np.ones(10))
    assert table.loc[("norm", "shifts"), "low"] > 4 and abs(table.loc[("norm", "idle"), "mean_difference"]) < 0.1
    assert table.loc[("held-out loss", "idle"), "control_mean"] == pytest.approx(1.009, abs=0.002)


def test_few_seeds_have_no_interval(made):
    table = paired_table(load(folder := folder_of(made, 3), folder))
    assert table[["low", "high"]].isna().all(axis=None) and table["mean_difference"].notna().all()


def test_a_reading_that_is_not_finite_is_no_difference(made):
    folder = folder_of(made, 3)
    part = next((folder / "idle3001" / "trace").iterdir())
    rows = pd.read_parquet(part)
    rows.loc[(rows["signal"] == "norm") & (rows["step"] > 900), "value"] = np.inf
    rows.to_parquet(part)
    with np.errstate(invalid="ignore"):
        table = paired_table(load(folder, folder)).set_index(["panel", "fault"])
    assert table.loc[("norm", "idle"), ["mean_difference", "low", "high"]].isna().all()
    assert np.isfinite(table.loc[("norm", "shifts"), "mean_difference"])


def test_drift_is_a_mean_in_units_of_its_error_after_warm_up(made):
    """Every made-up reading is about 2 with deviation 0.1, all positive; without its mean it drifts nowhere."""
    folder = folder_of(made, 3)
    table = drift_table(load(folder, folder))
    assert len(table) == 3 * 3 * 4 and (table["readings"] == 80).all() and (table["same_sign"] == 1).all()
    assert table["mean"].to_numpy() == pytest.approx(2.0, abs=0.06)
    assert table["t"].median() == pytest.approx(2 * np.sqrt(80) / np.sqrt(0.1**2 + 0.05**2), rel=0.06)
    for part in folder.glob("*/trace/*.parquet"):
        rows = pd.read_parquet(part)
        rows.loc[rows["signal"] == "bias", "value"] -= 2.0
        rows.loc[(rows["signal"] == "bias") & (rows["step"] <= 200), "value"] += 100.0
        rows.to_parquet(part)
    still = drift_table(load(folder, folder))
    assert 0.6 < np.sqrt((still["t"] ** 2).mean()) < 2.2
    assert still["same_sign"].min() >= 0.5 and still["same_sign"].max() < 0.8


def test_too_few_readings_have_no_drift(made):
    folder = folder_of(made, 3)
    rows = pd.read_parquet(part := next((folder / "idle3001" / "trace").iterdir()))
    rows.loc[(rows["signal"] == "bias") & (rows["head"] == 1) & (rows["step"] < 1000), "undefined"] = True
    rows.to_parquet(part)
    experiment = load(folder, folder)
    table = drift_table(experiment).set_index(["fault", "seed", "layer", "head"])
    assert table.loc[("idle", 3001, 0, 1), "readings"] == 1 and np.isnan(table.loc[("idle", 3001, 0, 1), "t"])
    assert table.loc[("idle", 3001, 0, 0), "readings"] == 80


def test_the_report_has_tables_and_figure(made):
    folder = folder_of(made, 3)
    make_report(folder, folder)
    assert {"paired.csv", "drift.csv", "figure.png"} <= {path.name for path in folder.iterdir()}
    assert len(pd.read_csv(folder / "paired.csv")) == 4
    assert "keep one sign" in (folder / "index.html").read_text()


def test_a_control_that_was_not_run_is_refused_by_name(made):
    folder = folder_of(made, 1, control="fp32")
    with pytest.raises(ValueError, match="control='fp32' is not allowed: one of control, idle, shifts"):
        paired_table(load(folder, folder))


def test_a_control_with_other_seeds_is_refused_by_name(made):
    folder = folder_of(made, 2)
    index = json.loads((folder / "experiment.json").read_text())
    index["runs"] = [cell for cell in index["runs"] if cell["run_id"] != "idle3001"]
    (folder / "experiment.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match="'control' is not allowed: 'idle' has other seeds"):
        paired_table(load(folder, folder))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"drift": ["held_out_loss"]}, "experiment.drift='held_out_loss' is not allowed: a signal of layers and heads"),
        ({"drift": ["norms"]}, "experiment.drift='norms' is not allowed: a signal of layers and heads"),
    ],
)
def test_a_drift_without_heads_is_refused_by_name(made, changes, message):
    folder = folder_of(made, 1, **changes)
    with pytest.raises(ValueError, match=message):
        drift_table(load(folder, folder))


@pytest.mark.parametrize("key", ["control", "drift"])
def test_a_paired_experiment_without_its_keys_says_which(made, key):
    folder = folder_of(made, 1)
    index = json.loads((folder / "experiment.json").read_text())
    del index["experiment"][key]
    (folder / "experiment.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match=f"experiment.{key} is missing: experiment.draw=paired needs it"):
        (paired_table if key == "control" else drift_table)(load(folder, folder))


def test_drift_at_equal_tokens_is_that_at_equal_steps(made):
    """Where every step has the same tokens; a horizon in tokens is no number of steps."""
    folder = folder_of(made, 3)
    by_steps, by_tokens = (drift_table(load(folder, folder, axis=axis)) for axis in ("steps", "tokens"))
    assert (by_tokens["readings"] == by_steps["readings"]).all()
