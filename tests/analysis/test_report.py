"""The whole way from traces on disk to tables and page, on traces made here, with a known answer."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from matplotlib.text import Annotation

from foreshock.analysis.figures import leads
from foreshock.analysis.locate.selectivity import alarm_matrix, off_diagonal
from foreshock.analysis.report import make_report
from foreshock.analysis.runs.experiment import HEALTHY_ROLES
from foreshock.analysis.runs.load import load
from foreshock.analysis.runs.readings import curve
from foreshock.analysis.scores.table import lead_table, median_step, run_table
from foreshock.experiments import trace
from tests.analysis.made_up_board import with_singles

STEPS, EVERY, TOKENS = 1000, 10, 64
SIGNALS = {
    "early": {"unit": "nats", "bad": "down", "axes": ["layer", "head"], "every_steps": 50},
    "late": {"unit": "1", "bad": "up", "axes": [], "every_steps": 10},
    "blind": {"unit": "1", "bad": "both", "axes": ["layer"], "every_steps": 50},
    "flat": {"unit": "count", "bad": "up", "axes": [], "every_steps": 50},
    "held_out_loss": {"unit": "nats/token", "bad": "up", "axes": [], "every_steps": EVERY},
}
SHAPES = {"early": (2, 2), "late": (1, 1), "blind": (2, 1), "flat": (1, 1), "held_out_loss": (1, 1)}
CLAIMS = [
    {"says": "early falls", "falls": ["healthy", "broken"], "panel": {"signals": ["early"]}},
    {"says": "early rises", "rises": ["healthy", "broken"], "panel": {"signals": ["early"], "reduce": "mean"}},
    {"says": "early alarms", "alarms": {"detector": "early warning", "fault": "broken", "should": True}},
    {"says": "early is quiet", "alarms": {"detector": "early warning", "fault": "broken", "should": False}},
    {"says": "of tokens", "align": "tokens", "alarms": {"detector": "blind", "fault": "broken", "should": False}},
    {"says": "flat alarms", "alarms": {"detector": "flat", "fault": "broken", "should": True}},
]
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
            row = (
                steps[i],
                TOKENS * steps[i],
                name,
                layer if "layer" in meta["axes"] else -1,
                head if "head" in meta["axes"] else -1,
            )
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
            "steps_done": STEPS,
            "tokens_done": TOKENS * STEPS,
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
                    "model": "mha_nano",
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
                    "models": ["mha_nano"],
                    "align": ["steps"],
                    "draw": "central",
                    "faults": {"broken": {"label": "broken kernel", "overrides": ["fault=bf16_shift"]}},
                    "detectors": {
                        "early warning": ["early"],
                        "late warning": ["late"],
                        "either": ["early", "late"],
                        "blind": ["blind"],
                        "flat": ["flat"],
                        "of another model": ["absent"],
                    },
                    "baseline": "late warning",
                    "headline": ["early warning", "late warning"],
                    "figure": {
                        "held-out loss": {"signals": ["held_out_loss"]},
                        "loss above healthy": {"signals": ["held_out_loss"], "above_healthy": True},
                        "early warning": {"signals": ["early"], "reduce": "mean"},
                        "of another model": {"signals": ["absent"]},
                    },
                    "claims": CLAIMS,
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
    table = lead_table(with_singles(load(*experiment_folders))).set_index("detector")
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
    ends = pd.read_csv(report / "ends.csv").groupby(["panel", "fault"])["value"].median()
    assert ends["held-out loss", "broken"] - ends["held-out loss", "healthy"] == pytest.approx(2.0, abs=0.01)
    assert ends["early warning", "healthy"] - ends["early warning", "broken"] == pytest.approx(1.9 / 4, abs=0.1)
    claims = pd.read_csv(report / "claims.csv").set_index("claim")["holds"]
    assert pd.isna(claims.pop("flat alarms"))
    assert claims.to_dict() == {
        "early falls": True,
        "early rises": False,
        "early alarms": True,
        "early is quiet": False,
    }
    assert "does not hold" in page


def test_names_out_of_a_file_are_text_and_no_markup(experiment_folders, capsys):
    """Title, labels, detectors, panels and claims that are HTML, console markup or a table's border."""
    report, runs = experiment_folders
    bad = "<script>alert(1)</script> [/bold] [red] | x"
    index = json.loads((report / "experiment.json").read_text())
    experiment = index["experiment"]
    experiment["title"] = experiment["faults"]["broken"]["label"] = bad
    experiment["detectors"][bad] = experiment["detectors"].pop("late warning")
    experiment["baseline"] = bad
    experiment["figure"] = {bad: experiment["figure"]["held-out loss"]}
    experiment["claims"] = [{**CLAIMS[0], "says": bad}]
    (report / "experiment.json").write_text(json.dumps(index))
    make_report(report, runs)
    assert "[/bold]" in capsys.readouterr().out
    page = (report / "index.html").read_text()
    assert "<script" not in page and "&lt;script&gt;" in page
    receipts = [path.read_text() for path in (report / "receipts").glob("*.md")]
    assert receipts and not any("<script" in text for text in receipts)
    rows = [line for line in receipts[0].splitlines() if line.startswith("| ")]
    assert {line.replace("\\|", "").count("|") for line in rows} == {8}


def test_the_page_says_what_came_out_before_it_shows_it(experiment_folders, capsys):
    report, runs = experiment_folders
    make_report(report, runs)
    page, shown = (report / "index.html").read_text(), " ".join(capsys.readouterr().out.split())
    table = pd.read_csv(report / "leadtime.csv").set_index("detector")
    early, late, diverged = (
        f"{table.loc[name, column]:,.0f}"
        for name, column in (
            ("early warning", "median_alarm_step"),
            ("late warning", "median_alarm_step"),
            ("early warning", "median_divergence_step"),
        )
    )
    said = f"First alarms: early warning at step {early} and late warning at {late}, before the loss diverges at "
    said += diverged
    assert said in shown
    assert page.count(said) == 1 and page.index(said) < page.index("<img")
    assert page.split("</head>")[1].count("A made-up fault") == 1  # the title
    assert "<details><summary><b>Declined signals</b> (1)</summary>" in page
    assert "mean lead (steps)" in page and "median alarm (steps)" in page


def test_the_lead_that_is_drawn_is_the_lead_of_the_table(experiment_folders, monkeypatch, tmp_path):
    experiment = load(*experiment_folders)
    held = with_singles(experiment)
    table = lead_table(held).set_index("detector")["rmlt_steps"]
    monkeypatch.setattr(leads, "save", lambda figure, path: drawn.append(figure))
    drawn: list = []
    leads.lead_figure(held, tmp_path / "x.png")
    (axis,) = drawn[0].axes
    names = [label.get_text() for label in axis.get_yticklabels()]
    bars = {name: bar.get_width() for name, bar in zip(names, axis.patches, strict=True)}
    written = {text.xy[1]: text.get_text() for text in axis.texts if isinstance(text, Annotation)}
    assert set(names) == {"early warning", "late warning", "either", "blind"}
    for y, name in enumerate(names):
        assert bars[name] == pytest.approx(table[name])
        assert written[y] == f"{table[name]:,.0f}"


def test_the_loss_above_healthy_is_the_loss_less_the_healthy_median(experiment_folders):
    experiment = load(*experiment_folders)
    raw, above = (experiment.panels[name] for name in ("held-out loss", "loss above healthy"))
    for run in (experiment.of("faulty")[0], experiment.of("reference")[0]):
        healthy = pd.concat([curve(experiment, one, raw) for one in experiment.of(*HEALTHY_ROLES)], axis=1)
        expected = curve(experiment, run, raw) - healthy.median(axis=1)
        pd.testing.assert_series_equal(curve(experiment, run, above), expected, check_names=False)
    faulty = curve(experiment, experiment.of("faulty")[0], above)
    assert faulty[faulty.index >= DIVERGES].min() == pytest.approx(2.0)


def test_positions_in_tokens_are_steps_times_tokens_where_all_batches_are_equal(experiment_folders):
    """The same runs on the other axis: every position scales, nothing else changes."""
    report, runs = experiment_folders
    make_report(report, runs)
    make_report(report, runs, align="tokens")
    steps, tokens = pd.read_csv(report / "leadtime.csv"), pd.read_csv(report / "leadtime-tokens.csv")
    pd.testing.assert_series_equal(
        TOKENS * steps["median_alarm_step"], tokens["median_alarm_tokens"], check_names=False, check_dtype=False
    )
    pd.testing.assert_series_equal(
        TOKENS * steps["rmlt_steps"], tokens["rmlt_tokens"], check_names=False, check_dtype=False
    )
    pd.testing.assert_series_equal(steps["threshold"], tokens["threshold"])
    assert (report / "runs-tokens.csv").exists() and (report / "ends-tokens.csv").exists()
    assert "of tokens" in set(pd.read_csv(report / "claims.csv")["claim"])


def shrink(folder: Path, factor: int) -> None:
    """Make a run one that saw ``factor`` times fewer tokens at every step."""
    rows = pd.read_parquet(folder / "trace")
    for part in (folder / "trace").iterdir():
        part.unlink()
    rows["signal"], rows["tokens"] = rows["signal"].astype(str), rows["tokens"] // factor
    trace.write_part(folder, 0, STEPS, {name: rows[name].to_numpy() for name in trace.SCHEMA.names})
    trace.write_manifest(folder, {**trace.read_manifest(folder), "tokens_done": TOKENS * STEPS // factor})


def test_a_smaller_batch_is_judged_at_equal_tokens(experiment_folders):
    """At a quarter of the tokens a step, what shows at step 400 shows at the tokens of healthy step 100."""
    report, runs = experiment_folders
    for seed in range(3000, 3003):
        shrink(runs / f"faulty{seed}", 4)
    experiment = load(report, runs, axis="tokens")
    held = with_singles(experiment)
    assert experiment.horizon == STEPS * TOKENS
    for run in experiment.of("faulty"):
        assert run.horizon == STEPS * TOKENS // 4
        assert run.divergence == pytest.approx(DIVERGES * TOKENS / 4, abs=EVERY * TOKENS)
        alarm = held.detectors["early warning"].alarms[run.trace.run_id]
        assert FAULT_SHOWS["early"] * TOKENS / 4 <= alarm <= 200 * TOKENS
    assert {run.horizon for run in experiment.of("calibration")} == {STEPS * TOKENS}
    table = lead_table(held).set_index("detector")
    alarms = [held.detectors["early warning"].alarms[run.trace.run_id] for run in experiment.of("faulty")]
    late = [held.detectors["late warning"].alarms[run.trace.run_id] for run in experiment.of("faulty")]
    reach = STEPS * TOKENS // 4
    expected = np.mean([min(b or reach, reach) - min(a, reach) for a, b in zip(alarms, late, strict=True)])
    assert table.loc["early warning", "relative_lead_steps"] == pytest.approx(expected)
    by_steps = load(report, runs, axis="steps")
    assert {run.divergence for run in by_steps.of("faulty")} == {DIVERGES}


def test_healthy_runs_of_different_lengths_are_refused_and_faulty_ones_are_not(experiment_folders):
    report, runs = experiment_folders
    for name, refused in (("faulty3000", False), ("calibration1003", True)):
        manifest = trace.read_manifest(runs / name)
        trace.write_manifest(runs / name, {**manifest, "config": {"train": {"steps": STEPS + 5}}})
        if refused:
            with pytest.raises(trace.TraceError, match=r"healthy runs .* differ in train.steps"):
                load(report, runs)
        else:
            assert load(report, runs).horizon == STEPS


def test_the_share_of_alarms_is_the_matrix_of_selectivity(experiment_folders):
    report, runs = experiment_folders
    experiment = load(report, runs)
    held = with_singles(experiment)
    matrix = alarm_matrix(held)
    assert list(matrix.columns) == ["healthy", "broken"]
    assert matrix.loc["early warning", "broken"] == 1.0
    assert "flat" not in matrix.index and "of another model" not in matrix.index
    counted = [
        held.score(held.detectors["blind"], run).outcome in ("lead", "benign_alarm") for run in experiment.of("faulty")
    ]
    assert matrix.loc["blind", "broken"] == np.mean(counted)
    index = {"should_ignore": {"blind": ["broken"], "nobody": ["broken"]}}
    confined = replace(
        experiment, index={**experiment.index, "experiment": {**experiment.index["experiment"], **index}}
    )
    ignored = off_diagonal(confined, matrix)
    assert ignored.to_numpy().tolist() == [["blind", "broken", np.mean(counted), 3, 0.10]]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"draw": "pie"}, "experiment.draw='pie' is not allowed: one of central"),
        ({"figure": {"a": {"signals": ["early"], "reduce": "max"}}}, "reduce='max' is not allowed: one of worst, mean"),
        ({"align": ["time"]}, "align='time' is not allowed"),
    ],
)
def test_impossible_report_settings_are_errors_by_name(experiment_folders, settings, message):
    report, runs = experiment_folders
    index = json.loads((report / "experiment.json").read_text())
    index["experiment"] |= settings
    (report / "experiment.json").write_text(json.dumps(index))
    with pytest.raises((ValueError, trace.TraceError), match=message):
        make_report(report, runs)


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
    trace.write_manifest(folder, {**trace.read_manifest(folder), "end_reason": "non_finite", "steps_done": 30})
    table = run_table(with_singles(load(report, runs))).set_index(["detector", "run_id"])
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
        with_singles(load(report, runs))


def test_a_median_of_alarms_counts_never_as_late():
    assert median_step([100, None, 300]) == 300
    assert np.isnan(median_step([100, None, None]))
    assert median_step([100, 200]) == 150
