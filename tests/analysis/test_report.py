"""The whole way from traces on disk to tables and page, on traces made here, with a known answer."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from analysis.experiment import load
from analysis.report import make_report
from analysis.table import lead_table, median_step, run_table
from experiments import trace

STEPS, EVERY = 1000, 10
SIGNALS = {
    "early": {"unit": "nats", "bad": "down", "axes": ["layer", "head"], "every_steps": 50},
    "late": {"unit": "1", "bad": "up", "axes": [], "every_steps": 10},
    "blind": {"unit": "1", "bad": "both", "axes": ["layer"], "every_steps": 50},
    "flat": {"unit": "count", "bad": "up", "axes": [], "every_steps": 50},
    "held_out_loss": {"unit": "nats/token", "bad": "up", "axes": [], "every_steps": EVERY},
}
SHAPES = {"early": (2, 2), "late": (1, 1), "blind": (2, 1), "flat": (1, 1), "held_out_loss": (1, 1)}
FAULT_SHOWS = {"early": 400, "late": 700}
DIVERGES = 800


def write_run(folder: Path, seed: int, faulty: bool, **manifest) -> None:
    generator = np.random.default_rng(seed)
    columns = {name: [] for name in trace.SCHEMA.names}
    for name, meta in SIGNALS.items():
        steps = np.arange(meta["every_steps"], STEPS + 1, meta["every_steps"])
        layers, heads = SHAPES[name]
        values = 2.0 + 0.1 * generator.normal(size=(len(steps), layers, heads))
        if name == "flat":
            values[:] = 0.0
        if name == "held_out_loss":
            values = 1.0 + np.exp(-steps / 200.0)[:, None, None]
            values[steps >= DIVERGES] += 2.0 * faulty
        if faulty and name in FAULT_SHOWS:
            # one head of one layer goes wrong; a mean would dilute it
            values[steps >= FAULT_SHOWS[name], -1, -1] += 5.0 if meta["bad"] == "up" else -1.9
        for (i, layer, head), value in np.ndenumerate(values):
            row = (steps[i], name, layer if "layer" in meta["axes"] else -1, head if "head" in meta["axes"] else -1)
            for column, cell in zip(trace.SCHEMA.names, (*row, value, False), strict=True):
                columns[column].append(cell)
    folder.mkdir(parents=True)
    trace.write_part(folder, 0, STEPS, columns)
    trace.write_manifest(
        folder,
        {
            "schema": trace.SCHEMA_VERSION,
            "run_id": folder.name,
            "config": {"train": {"steps": STEPS}},
            "onset_step": 1 if faulty else None,
            "signals": SIGNALS,
            "end_reason": "completed",
            "source_sha256": "s" * 64,
            "data_sha256": "d" * 64,
            "torch": "2",
            "git_commit": None,
            "git_dirty": None,
            "versions": {"python": "3"},
            "device": "cpu",
            **manifest,
        },
    )


@pytest.fixture
def experiment_folders(tmp_path) -> tuple[Path, Path]:
    runs, report = tmp_path / "runs", tmp_path / "report"
    cells = []
    for role, count, first in (("reference", 4, 0), ("calibration", 9, 1000), ("test", 2, 2000), ("faulty", 3, 3000)):
        for seed in range(first, first + count):
            faulty = role == "faulty"
            write_run(runs / f"{role}{seed}", seed, faulty)
            cells.append(
                {
                    "role": role,
                    "fault": "broken" if faulty else None,
                    "seed": seed,
                    "overrides": [],
                    "run_id": f"{role}{seed}",
                }
            )
    report.mkdir()
    (report / "experiment.json").write_text(
        json.dumps(
            {
                "experiment": {
                    "name": "made",
                    "title": "A made-up fault",
                    "faults": {"broken": {"overrides": []}},
                    "detectors": {
                        "early warning": ["early"],
                        "late warning": ["late"],
                        "either": ["early", "late"],
                        "blind": ["blind"],
                        "flat": ["flat"],
                    },
                    "baseline": "late warning",
                    "figure": {"held-out loss": ["held_out_loss"], "early warning": ["early"]},
                },
                "scale": {"name": "tiny", "alpha": 0.10, "seeds": {}},
                "label": {"ema_span": 5, "min_drawup_nats": 0.10, "healthy_factor": 1.5, "consecutive": 5},
                "rule": {"chart": "ewma", "weight": 0.2},
                "sweep": None,
                "runs": cells,
            }
        )
    )
    return report, runs


def test_the_table_says_what_was_put_in(experiment_folders):
    table = lead_table(load(*experiment_folders)).set_index("detector")
    assert set(table["median_divergence_step"].dropna()) == {DIVERGES}
    early, late, blind = (table.loc[name] for name in ("early warning", "late warning", "blind"))
    assert FAULT_SHOWS["early"] <= early["median_alarm_step"] <= FAULT_SHOWS["early"] + 50
    assert FAULT_SHOWS["late"] <= late["median_alarm_step"] <= FAULT_SHOWS["late"] + 20
    assert early["rmlt_steps"] == DIVERGES - early["median_alarm_step"]
    assert early["lead"] == 3
    assert late["relative_lead_steps"] == 0
    assert early["relative_lead_steps"] > 0
    assert blind["missed"] + blind["false_alarm"] + blind["lead"] + blind["late"] == 3
    assert table.loc["either", "median_alarm_step"] >= early["median_alarm_step"]
    assert "zero spread" in table.loc["flat", "declined"]


def test_the_report_is_whole_and_self_contained(experiment_folders, capsys):
    report, runs = experiment_folders
    make_report(report, runs)
    page = (report / "index.html").read_text()
    assert page.count("data:image/png;base64,") == 2
    assert 'src="http' not in page
    assert "zero spread" in page
    leadtime = pd.read_csv(report / "leadtime.csv")
    assert set(leadtime["kind"]) == {"detector", "signal"}
    by_run = pd.read_csv(report / "runs.csv")
    assert set(by_run["fault"]) == {"broken", "healthy"}
    assert (report / "figure.png").stat().st_size > 10_000
    assert "early warning" in capsys.readouterr().out


def test_the_report_needs_no_torch(experiment_folders):
    report, runs = experiment_folders
    code = (
        "import sys\n"
        "from analysis.report import main\n"
        f"main(['runs={runs}', 'report={report}'])\n"
        "assert 'torch' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=Path(__file__).parents[2])
    assert done.returncode == 0, done.stderr


def test_mixed_sources_are_refused(experiment_folders):
    report, runs = experiment_folders
    folder = runs / "faulty3000"
    trace.write_manifest(folder, {**trace.read_manifest(folder), "source_sha256": "x" * 64})
    with pytest.raises(trace.TraceError, match="differ in source_sha256"):
        load(report, runs)
    assert load(report, runs, allow_mixed=True).mixed == ("source_sha256 ssssssssssss, xxxxxxxxxxxx",)


def test_a_run_that_ends_before_a_signals_first_sample_is_scored(experiment_folders):
    report, runs = experiment_folders
    folder = runs / "faulty3000"
    short = [row for row in pd.read_parquet(folder / "trace").itertuples(index=False) if row.step <= 30]
    for part in (folder / "trace").iterdir():
        part.unlink()
    trace.write_part(folder, 0, 30, {name: [getattr(row, name) for row in short] for name in trace.SCHEMA.names})
    trace.write_manifest(folder, {**trace.read_manifest(folder), "end_reason": "non_finite"})
    table = run_table(load(report, runs)).set_index(["detector", "run_id"])
    assert pd.isna(table.loc[("early warning", "faulty3000"), "alarm_step"])
    make_report(report, runs)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (lambda runs: [r for r in runs if r["role"] != "calibration"], ValueError, "calibration=0"),
        (
            lambda runs: [r for r in runs if r["seed"] != 1008],
            ValueError,
            "8 calibration runs cannot support alpha=0.1",
        ),
        (lambda runs: [{**r, "seed": 1} for r in runs], ValueError, "two roles"),
        (lambda runs: [*runs, {**runs[-1], "run_id": "nowhere"}], trace.TraceError, "nowhere"),
    ],
)
def test_impossible_run_sets_are_errors(experiment_folders, change, error, message):
    report, runs = experiment_folders
    index = json.loads((report / "experiment.json").read_text())
    (report / "experiment.json").write_text(json.dumps({**index, "runs": change(index["runs"])}))
    with pytest.raises(error, match=message):
        _ = load(report, runs).detectors


def test_a_median_of_alarms_counts_never_as_late():
    assert median_step([100, None, 300]) == 300
    assert np.isnan(median_step([100, None, None]))
    assert median_step([100, 200]) == 150
