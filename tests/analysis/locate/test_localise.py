"""The place of a fault, named from broken laws with a known answer."""

from __future__ import annotations

import json

import numpy as np
import pandas as pd
import pytest

from foreshock.analysis.locate.laws import ATTENTION, RECOMPUTED
from foreshock.analysis.locate.localise import confusion, localise, shares_right
from foreshock.analysis.locate.naming import NO_ALARM, WINDOW, Levels, name_site, nearest_class, rolling_rms
from foreshock.analysis.report import make_report
from foreshock.analysis.runs.align import Aligned
from foreshock.analysis.runs.load import load
from foreshock.analysis.scores.inference import clopper_pearson_interval
from foreshock.monitors.law import DK, DQ, DV, KEY_SHIFT, QK_GAUGE, VALUE_SHIFT, VO_GAUGE, Law
from tests.described import DECLARED, described
from tests.injections import card, of_attention, of_learning_rate, of_modules

KEY, VALUE = "key_shift_residual.over_noise", "value_shift_residual.over_noise"
QK, VO = "qk_gauge_residual.matrix.over_noise", "vo_gauge_residual.matrix.over_noise"
EULER, NORM = "linear_euler_residual.q.over_noise", "norm_orthogonality_residual.final.over_noise"
SIGNALS = {name: described(name) for name in (KEY, VALUE, QK, VO, EULER, NORM, "grad_global_norm")}
COUNTS = {"reference": 4, "calibration": 9, "test": 4, "faulty": 2}
ONSET = {"onset": 301}


def of_one_head(tensor):
    return card(of_attention([tensor], 2, onset=300, layers=[1], heads=[1]))


FAULTS = {
    "o": {"shows": {KEY: 301}, "injection": of_one_head("o"), **ONSET},
    "do": {"shows": {VALUE: 301, VO: 301}, "injection": of_one_head("do"), **ONSET},
    "dk_seen_as_o": {"shows": {KEY: 301}, "injection": of_one_head("dk"), **ONSET},
    "dq_unseen": {"shows": {}, "injection": of_one_head("dq"), **ONSET},
    "q": {"shows": {EULER: 301}, "injection": card(of_modules(["blocks.1.attention.q"], "dw", onset=300)), **ONSET},
    "norm": {"shows": {NORM: 301}, "injection": card(of_modules(["final_norm"], "dx", onset=300)), **ONSET},
    "lr": {"shows": {"grad_global_norm": 301}, "injection": card(of_learning_rate(10.0, onset=300)), **ONSET},
}


@pytest.fixture
def folder(made):
    detectors = {"laws": [KEY, VALUE, QK, VO], "gradient norm": ["grad_global_norm"]}
    return made(COUNTS, SIGNALS, detectors, FAULTS, baseline="gradient norm")


def test_places_are_named_as_they_were_made(folder):
    found = localise(load(folder, folder))
    assert found.declined == {}
    runs = found.table.set_index(["fault", "seed"]).sort_index()
    for fault, named in {"o": "o delta dp ds v", "do": "do dv lse", "q": "linear layer", "norm": "norm"}.items():
        assert (runs.loc[fault, "named_class"] == named).all() and runs.loc[fault, "class_right"].all()
        # two of ten readings raise the root mean square enough; the verdict follows so many readings later
        assert runs.loc[fault, "alarm_step"].between(310, 330).all()
        assert (runs.loc[fault, "verdict_step"] == runs.loc[fault, "alarm_step"] + 10 * WINDOW).all()
    assert (runs.loc["o", ["named_layer", "named_head"]] == 1).all(axis=None)
    assert (runs.loc["do", "broken_laws"] == "VO gauge; value shift").all()
    assert (runs.loc["q", "named_layer"] == 1).all() and runs.loc["q", "named_head"].isna().all()
    assert (runs.loc["q", "named_part"] == "q").all() and runs.loc["q", "part_right"].all()
    assert (
        runs.loc["norm", ["named_layer", "layer_right"]].isna().all(axis=None) and runs.loc["norm", "part_right"].all()
    )
    assert not runs.loc["dk_seen_as_o", "class_right"].any() and runs.loc["dk_seen_as_o", "layer_right"].all()
    assert (runs.loc["dq_unseen", "named_class"] == NO_ALARM).all() and not runs.loc["dq_unseen", "head_right"].any()
    quiet = runs.loc[["lr", "healthy"]]
    assert (quiet["class_right"] == (quiet["named_class"] == NO_ALARM)).all()
    assert quiet["class_right"].mean() > 0.5  # one in ten may be named by chance
    assert quiet[["layer_right", "head_right", "part_right"]].isna().all(axis=None)


def test_the_matrix_counts_every_run_once(folder):
    table = localise(load(folder, folder)).table
    counts = confusion(table)
    assert counts.to_numpy().sum() == len(table) == 2 * len(FAULTS) + 4
    assert counts.loc["dk", "o delta dp ds v"] == 2 and counts.loc["dq", NO_ALARM] == 2
    assert counts.columns[-1] == NO_ALARM and counts.index[-1] == "healthy"
    shares = shares_right(table)
    assert shares.loc["o delta dp ds v", ["runs", "class_right", "head_right", "head_runs"]].tolist() == [2] * 4
    assert shares.loc["o delta dp ds v", ["faults", "faults_right"]].tolist() == [1, 1]
    assert shares.loc["o delta dp ds v", "low"] == pytest.approx(0.025)  # of 1 of 1: one fault
    assert shares.loc["dk", ["class_right", "faults", "faults_right"]].tolist() == [0, 1, 0]
    assert shares.loc["healthy", "faults"] == 4  # a healthy run is its own unit


def test_seeds_of_one_fault_are_right_or_wrong_together():
    """Ten faults of 2 or of 20 seeds, one of which is wrong: the interval is that of ten faults."""
    for seeds in (2, 20):
        rows = [("dk", f"dk{fault}", f"{fault}-{seed}", fault > 0) for fault in range(10) for seed in range(seeds)]
        table = pd.DataFrame(rows, columns=["true_class", "fault", "run_id", "class_right"])
        table = table.assign(**dict.fromkeys(("part_right", "layer_right", "head_right"), pd.NA))
        shares = shares_right(table).loc["dk"]
        assert shares[["runs", "class_right", "faults", "faults_right"]].tolist() == [10 * seeds, 9 * seeds, 10, 9]
        assert (shares["low"], shares["high"]) == clopper_pearson_interval(9, 10)
        table.loc[table["run_id"] == "5-1", "class_right"] = False  # right in some seeds is not right
        assert shares_right(table).loc["dk", "faults_right"] == 8


def test_an_alarm_before_onset_is_not_right(made):
    early = {"o": FAULTS["o"] | {"shows": {KEY: 200}}, "later": FAULTS["do"]}
    folder = made(COUNTS, SIGNALS, {"loss": ["grad_global_norm"]}, early, baseline="loss", name="early")
    runs = localise(load(folder, folder)).table.set_index("fault")
    assert (runs.loc["o", "named_class"] == "o delta dp ds v").all() and not runs.loc["o", "class_right"].any()


def test_a_place_needs_a_law(made):
    signals = {"grad_global_norm": SIGNALS["grad_global_norm"]}
    folder = made(COUNTS, signals, {"loss": list(signals)}, {"o": FAULTS["lr"]}, baseline="loss", name="lawless")
    with pytest.raises(ValueError, match="needs a conservation law"):
        localise(load(folder, folder))


def test_the_report_draws_and_says_it(folder, capsys):
    index = json.loads((folder / "experiment.json").read_text())
    index["experiment"]["draw"] = "localise"
    (folder / "experiment.json").write_text(json.dumps(index))
    make_report(folder, folder)
    page = (folder / "index.html").read_text()
    assert "The broken laws name the class of the site in 8 of 12" in page
    assert (folder / "figure.png").stat().st_size > 10_000
    counts = pd.read_csv(folder / "confusion.csv").set_index("true")
    assert counts.loc["do dv lse", "do dv lse"] == counts.loc["do dv lse", "runs"] == 2
    assert len(pd.read_csv(folder / "localisation.csv")) == 2 * len(FAULTS) + 4


def levels(law: Law, values, axes=("layer", "head")) -> Levels:
    """A signal of 40 readings of level 0.5 that stands at ``values`` (layers, heads) from the 20th on."""
    level = np.full((40, *np.shape(values)), 0.5)
    level[20:] = values
    return Levels(law, axes, 10 * np.arange(40), level)


def attention(**values) -> list[Levels]:
    names = {"key": KEY_SHIFT, "value": VALUE_SHIFT, "qk": QK_GAUGE, "vo": VO_GAUGE}
    return [levels(Law("attention", names[name]), found) for name, found in values.items()]


QUIET = [[0.5, 0.5]]


def test_a_single_layer_is_layer_0_and_a_law_broken_in_another_head_is_missed_at_the_named_one():
    signals = attention(key=QUIET, value=[[3.0, 0.5]], qk=QUIET, vo=[[0.5, 4.0]])
    verdict = name_site(signals, 1.0)
    assert (verdict.site_class, verdict.layer, verdict.head, verdict.inexact) == ("do dv lse", 0, 1, True)
    assert (verdict.alarm, verdict.verdict) == (200, 300)


def test_laws_of_another_layer_or_kind_do_not_change_the_name_but_are_listed():
    signals = attention(
        key=[[0.5, 0.5], [9.0, 0.5]], value=[[2.0, 0.5], [0.5, 0.5]], qk=[[0.5] * 2] * 2, vo=[[0.5] * 2] * 2
    )
    signals.append(levels(Law("linear layer", "output"), [[5.0], [0.5]], ("layer",)))
    verdict = name_site(signals, 1.0)
    assert (verdict.site_class, verdict.layer, verdict.head, verdict.inexact) == ("o delta dp ds v", 1, 0, False)
    assert verdict.broken == ("key shift", "linear layer output", "value shift")
    signals.append(levels(Law("loss kernel", "loss kernel"), [[20.0]], ()))
    verdict = name_site(signals, 1.0)
    assert (verdict.site_class, verdict.layer, verdict.head) == ("loss kernel", None, None)


def test_trace_and_matrix_form_are_one_law():
    assert DECLARED["qk_gauge_residual.over_noise"].law == DECLARED[QK].law
    trace = levels(DECLARED[QK].law, [[0.5, 0.5]])
    verdict = name_site([*attention(key=QUIET, value=QUIET, qk=[[0.5, 3.0]], vo=QUIET), trace], 1.0)
    assert (verdict.site_class, verdict.head, verdict.inexact) == ("dq", 1, False)


@pytest.mark.parametrize(("name", "laws"), ATTENTION.items())
def test_every_class_is_named_by_its_own_laws(name, laws):
    every = (KEY_SHIFT, VALUE_SHIFT, QK_GAUGE, VO_GAUGE)
    assert nearest_class({law: 3.0 if law in laws else 0.7 for law in every}) == (name, False)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({VO_GAUGE: 5.0, VALUE_SHIFT: 0.9}, "do dv lse"),  # the other law of its class is nearly there
        ({QK_GAUGE: 1.1, VALUE_SHIFT: 4.0, VO_GAUGE: 5.0}, "do dv lse"),  # QK by chance
        ({KEY_SHIFT: 9.0, VO_GAUGE: 1.05}, "o delta dp ds v"),
        ({KEY_SHIFT: 9.0, VALUE_SHIFT: np.inf, VO_GAUGE: 0.95}, "p s"),
    ],
)
def test_an_inexact_pattern_is_the_nearest_class_and_says_so(change, named):
    quiet = dict.fromkeys((KEY_SHIFT, VALUE_SHIFT, QK_GAUGE, VO_GAUGE), 0.4)
    assert nearest_class(quiet | change) == (named, True)


@pytest.mark.parametrize("name", ATTENTION)
def test_gradients_computed_again_name_a_class_whose_fainter_law_is_below_noise(name):
    loudest = {KEY_SHIFT: 0.9} | {law: 3.0 for law in ATTENTION[name] - {KEY_SHIFT}}
    again = {law: 4.0 if law in RECOMPUTED[name] else 0.5 for law in (DQ, DK, DV)}
    quiet = dict.fromkeys((KEY_SHIFT, VALUE_SHIFT, QK_GAUGE, VO_GAUGE), 0.4)
    named, _ = nearest_class(quiet | loudest | again)
    assert named == {"p s": "do dv lse"}.get(name, name)  # all gradients are wrong in both: only the key shift tells


@pytest.mark.parametrize("wrong", [{DV}, {DQ, DK, DV}])
def test_a_class_may_leave_open_which_gradients_are_wrong(wrong):
    levels = {VALUE_SHIFT: 3.0, VO_GAUGE: 3.0, KEY_SHIFT: 0.1, QK_GAUGE: 0.1}
    assert nearest_class(levels | {law: 5.0 if law in wrong else 0.0 for law in (DQ, DK, DV)}) == ("do dv lse", False)


def test_laws_that_are_not_watched_cannot_be_broken():
    assert nearest_class({KEY_SHIFT: 3.0}) == ("o delta dp ds v", False)


def test_the_window_is_a_root_mean_square_of_what_is_there():
    x = np.arange(1.0, 31.0)
    undefined = np.zeros(30, bool)
    undefined[12] = True
    values = np.where(np.arange(30) == 25, np.nan, x)  # broken from there on
    rms = rolling_rms(Aligned(np.arange(30), values.reshape(-1, 1, 1), undefined.reshape(-1, 1, 1))).ravel()
    assert np.isnan(rms[: WINDOW // 2]).all() and np.isfinite(rms[WINDOW // 2 : 25]).all()
    assert rms[9] == pytest.approx(np.sqrt(np.mean(x[:10] ** 2)))
    assert rms[15] == pytest.approx(np.sqrt(np.mean(np.delete(x[6:16], 6) ** 2)))
    assert np.isposinf(rms[25:]).all()
    assert rolling_rms(Aligned(np.arange(0), np.empty((0, 2, 1)), np.empty((0, 2, 1), bool))).shape == (0, 2, 1)


@pytest.mark.parametrize(
    ("signal", "law"),
    [
        (KEY, Law("attention", KEY_SHIFT)),
        ("attention_recomputed.dq.over_noise", Law("attention", DQ)),
        ("attention_recomputed.o.over_noise", None),
        ("key_shift_residual", None),
        ("linear_euler_residual.experts_gate.over_noise", Law("linear layer", "gate")),
        ("linear_euler_residual.router.over_noise", Law("router", "router")),
        ("linear_input_residual.qkv.over_noise", Law("linear layer", "qkv")),
        ("router_shift_residual.over_noise", Law("router", "router")),
        ("logit_shift_residual.head.over_noise", Law("loss kernel", "loss kernel")),
        ("norm_orthogonality_residual.shift.mlp.over_noise", Law("norm", "mlp")),
    ],
)
def test_signals_belong_to_laws(signal, law):
    assert DECLARED[signal].law == law
