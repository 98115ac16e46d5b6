"""The external track on small made-up logs of the documented form, with a known answer."""

import numpy as np
import pandas as pd
import pytest

from foreshock.analysis import external
from foreshock.analysis.figures import external as figure
from foreshock.analysis.reports.external import score_external
from foreshock.experiments.build import ROOT

READINGS = 120


def rows_of(run_id, seed, fails, every, norm_rises_by=3.0, validated=True):
    """A run whose loss rises by a nat at reading 100, and whose gradient norm does at 90, where it fails."""
    generator, reading = np.random.default_rng(seed), np.arange(READINGS)
    loss = 2 + np.exp(-reading / 20) + 0.005 * generator.normal(size=READINGS)
    norm = 1 + 0.02 * generator.normal(size=READINGS)
    if fails:
        loss[100:] += 1.0
        norm[90:] *= norm_rises_by
    table = pd.DataFrame({"run_id": run_id, "step": every * reading, "train_loss": loss, "grad_norm": norm})
    return table.assign(validation_loss=np.where(reading % 5 == 0, loss, np.nan)) if validated else table


@pytest.fixture(scope="module")
def logs(tmp_path_factory):
    """24 cells of 3 runs, one failure in each of the first three; 6 runs in E2M3 that fail, 22 in E3M2 that do not."""
    folder, runs, series = tmp_path_factory.mktemp("logs"), [], []
    for c in range(24):
        for i in range(3):
            run_id = f"run{c}-{i}"
            series.append(rows_of(run_id, 10 * c + i, fails=c < 3 and i == 0, every=100))
            keys = {"workload": "wmt_jax", "submission": f"s{c}", "trial": "trial_1", "hparams": "h"}
            runs.append({"run_id": run_id, "study": f"study_{i}", **keys})
    pd.concat(series).to_parquet(folder / "algoperf_series.parquet")
    pd.DataFrame(runs).to_csv(folder / "algoperf_runs.csv", index=False)
    fp6 = [rows_of(f"fp6_e2m3-{i}", 900 + i, True, 10, norm_rises_by=1.75, validated=False) for i in range(6)]
    fp6 += [rows_of(f"fp6_e3m2-{i}", 950 + i, False, 1, validated=False) for i in range(22)]
    pd.concat(fp6).to_parquet(folder / "mx_fp6_series.parquet")
    return folder


@pytest.fixture(scope="module")
def scored(logs):
    return score_external(logs)


def test_failures_that_the_gradient_norm_leads_are_detected_at_five_percent(scored):
    table = scored.tables["detectors.csv"].set_index(["logs", "scope", "detector"])
    row = table.loc[("AlgoPerf", "pooled", "gradient norm over its median")]
    assert (row["detected"], row["failures"], row["lead_steps"], row["beyond_check"]) == (3, 3, 1000.0, 3)
    assert row["healthy_runs"] == 63 and row["false_alarms"] <= 4  # where one has failed, the others have one twin
    pd.testing.assert_series_equal(
        table.loc[("AlgoPerf WMT", "pooled", "gradient norm over its median")], row, check_names=False
    )
    ours = table.loc[("MX-FP6 E2M3", "cell", "gradient norm over its median")]
    assert (ours["detected"], ours["failures"], ours["healthy_runs"]) == (6, 6, 22)


def test_the_factor_decides_between_lead_and_silence(scored):
    factors = scored.factors.set_index(["rise_nats", "factor"])
    assert tuple(factors.loc[(0.1, 1.5), ["runs", "leads", "late", "missed", "healthy_runs", "healthy_alarms"]]) == (
        6,
        6,
        0,
        0,
        22,
        0,
    )
    assert factors.loc[(0.1, 2.0), "missed"] == 6
    assert set(scored.factors["rise_nats"]) == {0.05, 0.1, 0.2}


def test_other_rises_are_the_protocols_three(scored):
    rises = scored.tables["rises.csv"]
    assert set(rises.loc[rises["logs"] == "AlgoPerf", "rise_nats"]) == {0.25, 0.5, 1.0}
    assert set(rises.loc[rises["logs"] == "MX-FP6", "rise_nats"]) == {0.05, 0.1, 0.2}


def test_the_figure_draws_the_numbers_of_the_table(scored, tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(figure, "save", lambda figure, path: drawn.append(figure))
    figure.external_figure(scored.tables["detectors.csv"], tmp_path / "figure.png")
    table = scored.tables["detectors.csv"]
    for axis, name, scope in zip(drawn[0].axes, ("AlgoPerf", "MX-FP6 E2M3"), ("pooled", "cell"), strict=True):
        labels = [label.get_text().removesuffix(" *") for label in axis.get_yticklabels()]
        texts = [text.get_text() for text in axis.texts]
        own = table[(table["logs"] == name) & (table["scope"].isin([scope, "fixed"]))]
        own = own[(own["scope"] == "fixed") | np.isclose(own["alpha"].astype(float), 0.05)]
        assert sorted(own["detector"]) == sorted(label for label in labels if label not in figure.HEADINGS)
        marks = {(round(x, 9), round(y)) for line in axis.lines for x, y in zip(*line.get_data(), strict=True)}
        for row in own.to_dict("records"):
            y = labels.index(row["detector"])
            assert f"{row['detected']}/{row['failures']}" in texts
            assert f"{row['false_alarms']}/{row['healthy_runs']}" in texts
            for column in ("detected_share", "detected_low", "detected_high", "false_alarm_share", "false_alarm_high"):
                assert (round(row[column], 9), y) in marks


def test_the_command_writes_tables_figure_and_manifest_and_no_data(scored, logs, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(external, "score_external", lambda folder: scored)
    external.main([f"logs={logs}", f"out={tmp_path}"])
    assert {path.name for path in tmp_path.iterdir()} == {
        "detectors.csv", "runs.csv", "rises.csv", "factors.csv", "left_out.csv", "figure.png", "manifest.json",
    }  # fmt: skip
    runs = pd.read_csv(tmp_path / "runs.csv")
    assert ((runs["fault"] != "healthy") | runs["alarm"].notna()).all() and "train_loss" not in runs
    said = capsys.readouterr().out
    assert "false alarms" in said and "E2M3" in said


def cells_of_row(name):
    """The cells of the rows of the findings' section that begin with a detector's name."""
    findings = (
        (ROOT / "results" / "README.md").read_text().split("## Real failures in public logs")[1].split("\n## ")[0]
    )
    rows = [[cell.strip(" *") for cell in line.split("|")[1:-1]] for line in findings.splitlines() if line[:1] == "|"]
    return [row[1:] for row in rows if row[0].removeprefix("a fixed number**: ") == name]


def percent(low, high):
    """An interval as the findings write it, to the digits that they keep."""
    return [f"{100 * low:.{digits}f}–{100 * high:.{digits}f} %" for digits in (0, 1)]


@pytest.mark.parametrize(
    ("scope", "name"),
    [
        *(
            ("pooled", f"{what}{how}")
            for what in ("gradient norm", "training loss")
            for how in (", self z", " over its median")
        ),
        ("pooled", "random timer"),
        *(("fixed", f"gradient norm above {factor}x its median") for factor in ("1.5", "2")),
        ("fixed", "training loss 7 sigma above its mean (OLMo)"),
        ("fixed", "training loss twice its mean (LLM-Foundry)"),
    ],
)
def test_the_findings_say_what_the_committed_table_says(scope, name):
    table = pd.read_csv(ROOT / "results" / "external" / "detectors.csv")
    (row,) = table[(table["logs"] == "AlgoPerf") & (table["scope"] == scope) & (table["detector"] == name)].to_dict(
        "records"
    )
    detected, beyond, lead, alarms = cells_of_row(name)[0]
    share, interval = detected.rstrip(")").split(" (")
    assert share == f"{row['detected']}/{row['failures']}"
    assert interval in percent(row["detected_low"], row["detected_high"])
    assert (int(beyond), lead) == (row["beyond_check"], f"{row['lead_steps']:,.0f}")
    share, interval = alarms.rstrip(")").split(" (")
    assert share == f"{row['false_alarms']}/{row['healthy_runs']}"
    assert interval in percent(row["false_alarm_low"], row["false_alarm_high"])


@pytest.mark.parametrize(
    ("rise", "factor", "name"),
    [
        (0.1, 1.5, "gradient norm above 1.5x its median"),
        (0.1, 2.0, "gradient norm above 2x its median"),
        (0.2, 1.5, "the same, label at 0.2 nats: above 1.5x"),
        (0.2, 2.0, "the same, label at 0.2 nats: above 2x"),
        (0.05, 1.5, "the same, label at 0.05 nats: above 1.5x"),
    ],
)
def test_the_findings_on_fp6_are_those_of_the_committed_factors(rise, factor, name):
    table = pd.read_csv(ROOT / "results" / "external" / "factors.csv").set_index(["rise_nats", "factor"])
    row = table.loc[(rise, factor)]
    leads, late, missed, lead, alarms = cells_of_row(name)[-1]
    assert [int(leads), int(late), int(missed)] == row[["leads", "late", "missed"]].tolist()
    assert lead == f"{row['mean_lead_steps']:,.0f}"
    assert alarms.split(" (")[0] == f"{row['healthy_alarms']:.0f}/{row['healthy_runs']:.0f}"


def test_logs_that_are_not_there_or_not_what_is_documented(logs, tmp_path, capsys):
    with pytest.raises(SystemExit):
        external.main([f"logs={tmp_path}", f"out={tmp_path}"])
    assert "has no algoperf_series.parquet: docs/elsewhere.md says where" in capsys.readouterr().err
    for path in logs.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    series = pd.read_parquet(logs / "mx_fp6_series.parquet")
    series.iloc[::-1].to_parquet(tmp_path / "mx_fp6_series.parquet")
    with pytest.raises(ValueError, match="run fp6_e3m2-21 has unsorted or repeated steps of train_loss"):
        score_external(tmp_path)
    series.drop(columns="grad_norm").to_parquet(tmp_path / "mx_fp6_series.parquet")
    with pytest.raises(ValueError, match=r"mx_fp6_series.parquet cannot be read: .*grad_norm"):
        score_external(tmp_path)
    pd.read_csv(logs / "algoperf_runs.csv").iloc[1:].to_csv(tmp_path / "algoperf_runs.csv", index=False)
    with pytest.raises(ValueError, match="has no row for run run0-0 of"):
        score_external(tmp_path)
