"""Runs from elsewhere, from their CSV files to a scored table."""

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest

from foreshock.analysis.reports.elsewhere import score_imported
from foreshock.analysis.runs.discover import find
from foreshock.analysis.runs.elsewhere import Rise, cells_of, imported_runs
from foreshock.analysis.runs.reduced import ReducedTrace
from foreshock.analysis.score import main as score
from foreshock.analysis.scores.contest import contest
from foreshock.analysis.scores.elsewhere import calibrated_scores, judge
from foreshock.analysis.scores.inference import clopper_pearson_interval
from foreshock.experiments import trace
from foreshock.experiments.elsewhere.known_signals import KNOWN
from foreshock.experiments.elsewhere.readings import Readings
from foreshock.experiments.elsewhere.traces import ImportedRun
from foreshock.experiments.import_runs import main as import_runs
from foreshock.experiments.trace import Series, TraceError

READINGS, EVERY = 100, 10


COLUMNS = {"loss": "train_loss_raw", "grad_norm": "grad_global_norm", "eval/loss": "held_out_loss"}


def a_table(seed, failed=False, validated=True, readings=READINGS):
    """A run whose gradient norm triples at reading 60 and whose loss rises at 80, where it fails."""
    generator, step = np.random.default_rng(seed), EVERY * np.arange(readings)
    loss = 2 + np.exp(-np.arange(readings) / 30) + 0.01 * generator.normal(size=readings)
    norm = 1 + 0.05 * generator.normal(size=readings)
    if failed:
        loss[80:] += 1.0
        norm[60:] *= 3
    table = pd.DataFrame({"step": step, "loss": loss, "grad_norm": norm, "lr": 1 / (1 + step)})
    if validated:
        table["eval/loss"] = np.where(np.arange(readings) % 10 == 0, loss, np.nan)
    return table


def write_run(path, seed, **how):
    a_table(seed, **how).to_csv(path, index=False)


@pytest.fixture
def runs(tmp_path):
    """A folder of imported cells: ``runs(cells, twins, failed)``; the first ``failed`` runs of the first cells fail."""

    def make(cells, twins, failed=0, name="runs", options=(), **how):
        for c in range(cells):
            files = []
            for i in range(twins):
                files.append(tmp_path / f"{name}-c{c}s{i}.csv")
                write_run(files[-1], 100 * c + i, failed=c < failed and i == 0, **how)
            import_runs(["csv", *map(str, files), f"out={tmp_path / name}", f"cell=c{c}", *options])
        return tmp_path / name

    return make


def series(values, every=10):
    values = np.asarray(values, float)[:, None, None]
    return Series(every * np.arange(len(values)), np.zeros(len(values), int), values, np.zeros(values.shape, bool))


def test_a_rise_is_counted_from_the_lowest_loss_and_where_it_begins():
    assert Rise("held_out_loss", 0.5).step(series([3, 2, 2.4, 2.5, 2.6])) == 30
    assert Rise("held_out_loss", 0.5, consecutive=2).step(series([3, 2, 2.5, 2.1, 2.5, 2.6])) == 40
    assert Rise("held_out_loss", 0.5).step(series([3, 2, 2.4])) is None
    assert Rise("held_out_loss", 0.5).step(series([3, 2, np.nan, 2])) == 20


def traces_in_memory(cells, twins, failed):
    """The same as ``runs``, without files."""
    traces = []
    for c in range(cells):
        for i in range(twins):
            table = a_table(100 * c + i, failed=c < failed and i == 0)
            readings = {}
            for column, name in COLUMNS.items():
                kept = table[table[column].notna()]
                steps = kept["step"].to_numpy(np.int64)
                readings[name] = Readings(column, steps, 0 * steps, kept[column].to_numpy())
            signals = {name: KNOWN[name] for name in readings}
            run = ImportedRun(f"c{c}s{i}", f"c{c}", i, None, signals, readings, {})
            traces.append(ReducedTrace(run.run_id, None, run.manifest(), run.series()))
    return traces


def test_failures_are_detected_at_equal_false_alarms_and_healthy_runs_are_not():
    scored = score_imported(traces_in_memory(21, 5, failed=4))
    table = scored.detectors.set_index(["scope", "detector"])
    for scope in ("cell", "pooled"):
        row = table.loc[(scope, "gradient norm over its median")]
        assert (row["detected"], row["failures"], row["missed"]) == (4, 4, 0)
        assert row["lead_steps"] == 200  # alarm at 600, the validation shows it at 800
        assert row["beyond_check"] == 4  # the validation before, at 700, was healthy
        assert table.loc[(scope, "training loss over its median"), "late"] == 4  # it rises when the validation does
    # 101 healthy runs; four cells have 4 of them, too few for 1 in 5; in each other one of 5 is the largest
    assert tuple(table.loc[("cell", "gradient norm, self z"), ["healthy_runs", "false_alarms"]]) == (85, 17)
    pooled = table.loc[("pooled", "gradient norm, self z")]
    assert pooled["healthy_runs"] == 101 and pooled["false_alarm_share"] <= 0.05
    low, high = clopper_pearson_interval(pooled["false_alarms"], 101)
    assert (pooled["false_alarm_low"], pooled["false_alarm_high"]) == (low, high)
    assert np.isnan(table.loc[("fixed", "gradient norm above 2x its median"), "alpha"])
    assert "4 of 105 judged runs fail, by validation loss: a rise of 0.5 nats" in scored.says
    assert "thresholds in a cell at 20% false alarms: 89 of 105 runs have enough healthy twins" in scored.says


def test_failures_that_are_permuted_among_healthy_runs_are_detected_as_often_as_false_alarms_are_raised():
    """Labels that say nothing: of runs that are called failures, a share alpha has an alarm and no more."""
    traces = traces_in_memory(21, 6, failed=0)
    generator, shares, cells = np.random.default_rng(0), [], cells_of(traces)
    judged = judge(cells)
    for _ in range(5):
        called = []
        for cell in cells:
            runs, chosen = list(cell.experiment.runs), generator.integers(6)
            runs[chosen] = replace(runs[chosen], role="faulty", fault="failure", onset=0, divergence=900)
            called.append(replace(cell, experiment=replace(cell.experiment, runs=tuple(runs), horizon=10**6)))
        scores = calibrated_scores(judged.labelled(called), 0.05, pooled=True)
        own = scores[scores["kind"] != "control"]
        shares.append(own[own["fault"] == "failure"].groupby("detector")["alarmed"].mean().to_numpy())
    share, runs = np.mean(shares), 5 * 21
    assert share <= 0.05 + 3 * np.sqrt(0.05 * 0.95 / runs)


def test_a_cell_of_five_supports_one_in_five_at_best(runs, tmp_path, capsys):
    score([f"runs={runs(1, 5)}", f"out={tmp_path / 'out'}", "alpha=0.1"])
    said = " ".join(capsys.readouterr().out.split())
    assert "no threshold in a cell at 10% false alarms: no run has enough healthy twins" in said
    assert "0 other cells cannot support alpha=0.1: the smallest is 1" in said


def test_a_single_run_has_the_self_track_and_published_limits_alone_and_it_says_so(runs, tmp_path, capsys):
    score([f"runs={runs(1, 1, failed=1, validated=False)}", f"out={tmp_path / 'out'}"])
    said = " ".join(capsys.readouterr().out.split())
    assert "run c0 has no seed twin: only the self track at its bound, and published limits" in said
    assert "by training loss, as there is no validation loss: a rise of 0.1 nats" in said
    table = pd.read_csv(tmp_path / "out" / "detectors.csv").set_index("detector")
    assert set(table["scope"]) == {"fixed"} and table.loc["gradient norm above 2x its median", "detected"] == 1
    assert table.loc["grad_global_norm, self z above its bound", "detected"] == 1


def test_the_label_and_the_plan_are_no_detectors(runs):
    (cell,) = cells_of(imported_runs(runs(1, 2)))
    assert cell.signals == ("train_loss_raw", "grad_global_norm")
    assert cell.label.signal == "held_out_loss"


def test_runs_that_are_too_short_are_left_out_by_name(runs, tmp_path, capsys):
    runs(1, 3)
    short = tmp_path / "short.csv"
    write_run(short, 9, readings=50)
    import_runs(["csv", str(short), f"out={tmp_path / 'runs'}", "cell=c0"])
    score([f"runs={tmp_path / 'runs'}", f"out={tmp_path / 'out'}"])
    left_out = pd.read_csv(tmp_path / "out" / "left_out.csv")
    assert left_out["run_id"].tolist() == ["short"]
    assert left_out["reason"][0] == "train_loss_raw has 50 readings, at least 51 are needed"
    assert "1 runs are not judged, such as short" in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize("option", ["tracks=self", "singles=true", "rule=cusum"])
def test_options_that_are_not_theirs(runs, tmp_path, capsys, option):
    folder = runs(1, 2)
    with pytest.raises(SystemExit):
        score([f"runs={folder}", f"out={tmp_path / 'out'}", option])
    assert "is not an option for runs from elsewhere: runs, out, alpha" in capsys.readouterr().err


def test_with_roles_they_are_an_experiment_as_runs_of_ours_are(tmp_path):
    seeds = {"reference": 0, "calibration": 100, "test": 200, "faulty": 300}
    for (role, seed), count in zip(seeds.items(), (4, 4, 1, 2), strict=True):
        for i in range(count):
            path = tmp_path / f"{role}{i}.csv"
            write_run(path, seed + i, failed=role == "faulty")
            import_runs(["csv", str(path), f"out={tmp_path / 'own'}", "cell=mine", f"seed={seed + i}", f"role={role}"])
    assert imported_runs(tmp_path / "own") is None
    (experiment,) = find(tmp_path / "own")
    assert experiment.model == "mine" and experiment.faults == ["Failure"]
    assert {role: len(experiment.of(role)) for role in seeds} == {
        "reference": 4,
        "calibration": 4,
        "test": 1,
        "faulty": 2,
    }
    held = contest(experiment, "reference", alpha=0.2)
    assert all(alarm == 600 for run, alarm in held.detectors["gradient norm"].alarms.items() if "faulty" in run)


def test_roles_for_some_and_runs_of_ours_are_refused_by_name(runs, tmp_path):
    folder = runs(1, 2)
    write_run(tmp_path / "other.csv", 5)
    import_runs(["csv", str(tmp_path / "other.csv"), f"out={folder}", "role=test"])
    with pytest.raises(TraceError, match="run other has a role and runs-c0s0 has none"):
        imported_runs(folder)
    manifest = trace.manifest_of(folder / "other")
    del manifest["elsewhere"]
    trace.write_manifest(folder / "other", manifest)
    with pytest.raises(TraceError, match="other was trained here: score them apart"):
        imported_runs(folder)


def test_a_cell_without_a_loss_is_refused_by_name(tmp_path):
    path = tmp_path / "norm.csv"
    path.write_text("step,grad_norm\n0,1\n1,1\n")
    import_runs(["csv", str(path), f"out={tmp_path / 'runs'}"])
    with pytest.raises(TraceError, match="run norm has neither held_out_loss nor train_loss_raw"):
        cells_of(imported_runs(tmp_path / "runs"))
