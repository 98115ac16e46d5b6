"""Early warning's tables and pictures on made-up runs with known delays."""

from __future__ import annotations

import json
from itertools import combinations

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest

from foreshock.analysis.figures import costs, sizes
from foreshock.analysis.figures.costs import cost_faults, cost_figure, pareto_front
from foreshock.analysis.figures.point_names import label_points
from foreshock.analysis.figures.sizes import size_figure
from foreshock.analysis.locate.fault_truth import broken_kernels
from foreshock.analysis.report import make_report
from foreshock.analysis.runs.load import load
from foreshock.analysis.scores.contest import contest, run_scores
from foreshock.analysis.scores.delays import Size, blind_table, delays, oracles, size, smallest_table
from foreshock.analysis.scores.inference import chance_of_alarms
from foreshock.analysis.scores.leaderboard import board
from foreshock.faults.card import InjectionCard
from tests.described import described
from tests.injections import card, of_attention, of_learning_rate, of_modules

EARLY, SLOW, NORM = "key_shift_residual.over_noise", "qk_delta2_spectrum.entropy.w50", "grad_global_norm"
ORACLE = "delta_bias_oracle"
META = {"unit": "1", "bad": "up", "axes": [], "every_steps": 10}
SIGNALS = {name: described(name, bad="up", axes=()) for name in (EARLY, SLOW, NORM, "weight_norm.q", ORACLE)}
SIGNALS["unmeasured"] = META
DETECTORS = {
    "told": [ORACLE],
    "laws": [EARLY],
    "Delta2 entropy": [SLOW],
    "gradient norm": [NORM],
    "weight norm": ["weight_norm.q"],
    "homemade": ["unmeasured"],
}
FAULTS = {
    "o1": {"shows": {EARLY: 200}, "onset": 1, "injection": card(of_attention(["o"], 1))},
    "o5": {"shows": {EARLY: 50, SLOW: 400}, "onset": 1, "diverges": 700, "injection": card(of_attention(["o"], 5))},
    "late5": {"shows": {EARLY: 301, SLOW: 701}, "onset": 301, "injection": card(of_attention(["o"], 5, onset=300))},
    "lr": {"shows": {NORM: 301, ORACLE: 301}, "onset": 301, "injection": card(of_learning_rate(10.0))},
}


@pytest.fixture
def folder(made):
    counts = {"reference": 4, "calibration": 9, "test": 3, "faulty": 3}
    folder = made(counts, SIGNALS, DETECTORS, FAULTS, baseline="gradient norm")
    index = json.loads((folder / "experiment.json").read_text())
    index["experiment"] |= {"draw": "early_warning", "family": "laws"}
    (folder / "experiment.json").write_text(json.dumps(index))
    return folder


def test_delays_are_from_onset_and_never_before(folder):
    experiment = load(folder, folder)
    found = delays(contest(experiment, "reference")).set_index(["detector", "fault"])["delay_steps"]
    assert found.loc["laws", "late5"].median() == 9
    assert found.loc["Delta2 entropy", "late5"].median() == pytest.approx(409, abs=20)
    assert (found.dropna() >= 0).all()


def test_the_smallest_fault_that_is_felt(folder):
    table = smallest_table(contest(load(folder, folder), "reference")).set_index(["detector", "fault"])
    assert set(table.index.get_level_values("fault")) == {"o1", "o5", "late5"}
    assert table.loc[("laws", "o1"), ["within_10", "within_100", "smallest"]].tolist() == [0, 0, False]
    assert table.loc[("laws", "o5"), ["within_10", "within_100", "smallest"]].tolist() == [0, 1, True]
    assert table.loc[("laws", "late5"), ["within_10", "smallest", "reads_every_steps"]].tolist() == [1, True, 10]
    assert table.loc[("laws", "o1"), "median_delay_steps"] == pytest.approx(199, abs=11)
    assert not table.loc["weight norm", "smallest"].any()


def test_what_the_family_does_not_detect(folder):
    table = blind_table(contest(load(folder, folder), "reference")).set_index("fault")
    assert list(table.index) == ["lr"]
    assert table.loc["lr", "soonest"] == "gradient norm" and table.loc["lr", "median_delay_steps"] == pytest.approx(9)
    alarms = round(table.loc["lr", "family_alarms"] * table.loc["lr", "runs"])
    assert table.loc["lr", "by_chance"] == chance_of_alarms(alarms, table.loc["lr", "runs"], 9, 0.1)


def test_a_control_is_no_blind_spot(folder):
    experiment = load(folder, folder)
    experiment.index["experiment"]["controls"] = ["lr"]
    assert blind_table(contest(experiment, "reference")).empty


def test_an_oracle_bounds_and_does_not_compete(folder):
    """It feels the learning rate as soon as the gradient norm does, and is not called the soonest."""
    experiment = load(folder, folder)
    assert oracles(experiment) == ["told"]
    one = contest(experiment, "reference")
    assert one.kinds["told"] == "oracle" and "told" in set(board(one, run_scores(one))["detector"])
    ranks = board(one, run_scores(one)).set_index("detector")["rank"]
    assert ranks.loc["told"].isna().all() and ranks.loc["laws"].notna().any()


def test_a_model_without_measured_costs_still_has_its_figure(folder, drawn, tmp_path, monkeypatch):
    monkeypatch.setattr(costs, "monitor_costs", lambda model: {})
    cost_figure(contest(load(folder, folder), "reference"), tmp_path / "figure.png")
    assert "no cost was measured" in drawn["figure.png"][0]


def test_a_family_that_is_no_detector_is_an_error(folder):
    experiment = load(folder, folder)
    experiment.index["experiment"]["family"] = "lores"
    with pytest.raises(ValueError, match=r"experiment\.family='lores' is not allowed"):
        blind_table(contest(experiment, "reference"))


@pytest.fixture
def drawn(monkeypatch):
    """Figures as they are saved, by file name, and every text in them."""
    figures = {}

    def keep(figure, path):
        figure.savefig(path)
        legends = [text.get_text() for legend in figure.legends for text in legend.get_texts()]
        figures[path.name] = "\n".join([*legends, *(t.get_text() for t in figure.findobj(plt.Text))]), figure

    monkeypatch.setattr(costs, "save", keep)
    monkeypatch.setattr(sizes, "save", keep)
    yield figures
    plt.close("all")


def test_figures_are_written_and_hold_all_detectors(folder, drawn, tmp_path):
    experiment = load(folder, folder)
    assert cost_faults(experiment) == broken_kernels(experiment) == ["o1", "o5", "late5"]
    cost_figure(contest(experiment, "reference"), tmp_path / "cost.png")
    caption = size_figure(contest(experiment, "reference"), tmp_path / "size.png")
    for name in ("cost.png", "size.png"):
        said = drawn[name][0] + (caption if name == "size.png" else "")
        assert (tmp_path / name).stat().st_size > 10_000
        for detector in ("laws", "Δ₂ entropy", "gradient norm", "weight norm", "homemade"):
            assert detector in said, (name, detector)
    assert "cost not measured: homemade" in drawn["cost.png"][0]
    assert "loss diverges" in drawn["size.png"][0] and "loss diverges" in caption
    dashed = [line for line in drawn["size.png"][1].axes[0].lines if line.get_linestyle() == "--"]
    assert np.nanmedian(dashed[0].get_ydata()) == pytest.approx(699)  # of five bits from the start


def test_the_cost_figure_takes_the_faults_that_it_is_told(folder, drawn, tmp_path):
    experiment = load(folder, folder)
    experiment.index["experiment"]["cost_faults"] = ["lr"]
    assert "Faults: lr." in cost_figure(contest(experiment, "reference"), tmp_path / "cost.png")


def test_the_report_has_them_all(folder, capsys):
    make_report(folder, folder)
    for name in ("figure.png", "sizes.png", "selectivity.png"):
        assert (folder / name).stat().st_size > 10_000
    assert (folder / "index.html").read_text().count("<figure>") == 3
    assert set(pd.read_csv(folder / "blind.csv")["fault"]) == {"lr"}
    assert pd.read_csv(folder / "smallest.csv")["model"].unique() == ["mha_nano"]
    assert (folder / "selectivity.csv").exists()


@pytest.mark.parametrize(
    ("injections", "expected", "where"),
    [
        ([of_attention(["o"], 2)], Size("o", "backward", "truncate", 2, 1.0, "all", "all", 0), "o"),
        (
            [of_attention(["o"], 9, "flip", onset=5, share=0.0, layers=[1], heads=[0, 1])],
            Size("o", "backward", "flip", 9, 0.0, "1", "0+1", 5),
            "o, flip, layer 1, head 0+1, one element",
        ),
        (
            [of_modules(["head"], "dy", 3, "round_half_up", share=0.5)],
            Size("head dy", "", "round_half_up", 3, 0.5, "all", "all", 0),
            "head dy, round half up, 0.5 of elements",
        ),
        (
            [of_attention(["o"], 1, phase="forward")],
            Size("o", "forward", "truncate", 1, 1.0, "all", "all", 0),
            "o, forward",
        ),
        ([of_attention(["o"], 0)], None, None),
        ([of_learning_rate(10.0)], None, None),
        ([of_attention(["o"], 2), of_attention(["do"], 2)], None, None),
    ],
)
def test_the_size_of_a_fault_is_its_card_s(injections, expected, where):
    assert size(InjectionCard("other", tuple(injections))) == expected
    assert expected is None or expected.where == where


def test_the_pareto_front_has_no_dominated_point():
    points = [(1.0, 50.0), (0.1, 90.0), (1.0, 40.0), (2.0, 40.0), (3.0, 7.0), (0.2, 95.0)]
    assert pareto_front(points) == [1, 2, 4]


def test_names_cover_neither_each_other_nor_points():
    figure, axis = plt.subplots(figsize=(6, 4))
    points = [(x, y) for x in (0.3, 0.32, 0.34) for y in (0.5, 0.52)]
    names = [f"a detector, {i}" for i in range(6)]
    axis.set(xlim=(0, 1), ylim=(0, 1))
    label_points(axis, points, names, lines=[0.51], fontsize=9)
    boxes = [text.get_window_extent() for text in axis.texts]
    assert len(boxes) == 6
    assert not any(a.overlaps(b) for a, b in combinations(boxes, 2))
    x, y = axis.transData.transform(points).T
    assert not any(box.contains(px, py) for box in boxes for px, py in zip(x, y, strict=True))
    line = axis.transData.transform((0, 0.51))[1]
    assert not any(box.y0 < line < box.y1 for box in boxes)
    plt.close(figure)
