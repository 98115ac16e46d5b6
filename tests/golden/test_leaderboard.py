"""The published leaderboard is what the published runs give, and the texts say what it says."""

import re

import pandas as pd
import pytest

from analysis.contest import contest, run_scores
from analysis.found import find
from analysis.leaderboard import board
from experiments.build import ROOT

RUNS, TABLE = ROOT / "results" / "reference_set", ROOT / "results" / "leaderboard.csv"
COUNTED = ["runs", "diverged", "calibration_runs", "healthy_alarms", "healthy_runs", "detected", "late", "missed"]
MEASURED = ["threshold", "rmlt_steps", "rmlt_low", "rmlt_high", "relative_lead_steps", "share_of_possible_lead"]
MEASURED += ["size_over_threshold"]


@pytest.mark.parametrize("number", [0, 1])
def test_the_leaderboard_is_what_the_committed_runs_give(number):
    experiment = find(RUNS)[number]
    one = contest(experiment, "reference")
    now = board(one, run_scores(one)).set_index(["fault", "detector"]).sort_index()
    published = pd.read_csv(TABLE)
    published = published[(published["model"] == experiment.model) & (published["track"] == "reference")]
    published = published.set_index(["fault", "detector"]).sort_index().loc[now.index]
    pd.testing.assert_frame_equal(now[COUNTED].astype(float), published[COUNTED].astype(float))
    pd.testing.assert_frame_equal(now[MEASURED].astype(float), published[MEASURED].astype(float), rtol=1e-5)
    chance = (now["p_beats_baseline"] - published["p_beats_baseline"]).abs()
    assert chance.max() < 1e-3  # the published maxima are also over river's entrants, which are not in this contest


def test_every_row_says_what_it_must():
    table = pd.read_csv(TABLE)
    judged = table[table["declined"].isna() & (table["kind"] == "detector") & (table["track"] != "published")]
    stated = ["runs", "alpha", "calibration_runs", "healthy_alarms", "false_alarm_low", "false_alarm_high"]
    stated += ["detected", "cost_share_of_step"]
    assert judged[stated].notna().all().all()
    assert judged.loc[judged["fault"] != "all", "delay_steps"].notna().all()
    pooled = judged[(judged["fault"] == "all") & (judged["track"] == "reference")]
    assert pooled[["rmlt_steps", "share_of_possible_lead", "relative_lead_steps"]].notna().all().all()
    assert (pooled["calibration_runs"] >= 19).all() and (pooled["alpha"] == 0.05).all()
    diverging = judged[judged["fault"].isin(["attention", "ramp"]) & (judged["track"] == "reference")]
    stated = ["rmlt_low", "rmlt_high", "rank", "rank_low", "rank_high", "p_beats_baseline", "size_over_threshold"]
    assert diverging[stated].notna().all().all()


def test_two_faults_are_not_ranked_together():
    table = pd.read_csv(TABLE)
    ranking = ["rank", "rank_low", "rank_high", "possibly_best", "rmlt_low", "rmlt_high", "share_low", "share_high"]
    assert table.loc[table["fault"] == "all", [*ranking, "p_beats_baseline"]].isna().all().all()


def test_the_baselines_are_three_and_held_out_loss_leads_as_the_texts_say():
    table = pd.read_csv(TABLE)
    rows = table[(table["track"] == "reference") & (table["model"] == "mha_nano") & (table["fault"] == "all")]
    leads = rows[rows["kind"] == "baseline"].set_index("detector")["rmlt_steps"].round().to_dict()
    assert leads == {"held-out loss (label's input)": 459, "training loss": 400, "loss or gradient norm": 384}


SAID = {
    "conservation laws of attention": "conservation laws over noise",
    "delta-bias oracle": "delta bias (oracle)",
    "held-out loss (baseline; the label's input)": "held-out loss (label's input)",
    "spectral norm of W_Q, W_K": "spectral norm",
}
SYMBOLS = {"Δ-": "Delta-", "ΔW": "Delta W", "Δ₁": "Delta1", "Δ₂": "Delta2", "Δ₃": "Delta3"}


def detector_of(cell: str) -> str:
    """The board's name of a detector as the texts write it."""
    name = cell.strip("* ")
    name = SAID.get(name, name).removesuffix(" (baseline)")
    for symbol, plain in SYMBOLS.items():
        name = name.replace(symbol, plain)
    return name


@pytest.mark.parametrize(
    ("text", "heading", "model", "faults", "rows"),
    [
        ("README.md", "7 bits: lead, steps | LR ramp: lead, steps | share", "mha_nano", ["attention", "ramp"], 17),
        (
            "results/README.md",
            "7 bits: lead, steps | LR ramp: lead, steps | share",
            "mha_nano",
            ["attention", "ramp"],
            33,
        ),
        ("results/README.md", "LR ramp: lead, steps | both", "moe_nano", ["attention", "ramp", "both"], 20),
    ],
)
def test_the_tables_of_the_texts_are_the_leaderboard(text, heading, model, faults, rows):
    lines = (ROOT / text).read_text().splitlines()
    start = next(i for i, line in enumerate(lines) if heading in line) + 2
    end = next(i for i, line in enumerate(lines[start:], start) if not line.startswith("|"))
    board_rows = pd.read_csv(TABLE)
    board_rows = board_rows[(board_rows["model"] == model) & (board_rows["track"] == "reference")]
    board_rows = board_rows.set_index(["fault", "detector"]).sort_index()
    assert end - start == rows
    for line in lines[start:end]:
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        name = detector_of(cells[0])
        for fault, cell in zip(faults, cells[1:], strict=False):
            row = board_rows.loc[(fault, name)]
            beats, lead = "\\*" in cell, cell.replace("\\*", "").replace("*", "")
            told = re.fullmatch(r"([\d,]+)(?: \(([\d,]+)–([\d,]+)\))?", lead)
            numbers = [float(number.replace(",", "")) for number in told.groups() if number]
            expected = [row["rmlt_steps"], row["rmlt_low"], row["rmlt_high"]][: len(numbers)]
            assert numbers == pytest.approx(expected, abs=0.501), (name, fault)
            assert beats == (row["p_beats_baseline"] < 0.05), (name, fault)
            assert ("**" in cell) == (str(row["possibly_best"]) == "True"), (name, fault)
        share, alarms = (cell.strip("*") for cell in cells[1 + len(faults) : 3 + len(faults)])
        pooled = board_rows.loc[("all", name)]
        assert float(share) == pytest.approx(pooled["share_of_possible_lead"], abs=0.00501), name
        assert alarms in ("", f"{pooled['healthy_alarms']:.0f}/{pooled['healthy_runs']:.0f}"), name


def test_the_sizes_of_the_faults_are_those_of_the_table():
    table = pd.read_csv(TABLE)
    table = table[table["model"] == "mha_nano"].set_index(["track", "fault", "detector"])["size_over_threshold"]
    assert "7 bits stand 280 times" in " ".join((ROOT / "README.md").read_text().split())
    assert table["universal", "attention", "conservation laws over noise"] == pytest.approx(280, abs=5)
    assert "the ramp 46 times" in (ROOT / "README.md").read_text()
    assert table["reference", "ramp", "update to weight"] == pytest.approx(46, abs=0.5)


def test_the_table_of_small_faults_is_that_of_its_runs():
    table = pd.read_csv(ROOT / "results" / "early_warning-desk" / "leaderboard.csv").set_index(
        ["track", "fault", "detector"]
    )
    text = (ROOT / "README.md").read_text()
    for words, track, name in (
        ("**conservation laws of attention**", "reference", "conservation laws over noise"),
        ("**the same without healthy runs** (`universal`)", "universal", "conservation laws over noise"),
        ("key shift alone, not over predicted noise", "reference", "key shift"),
        ("gradient norm", "reference", "gradient norm"),
    ):
        cells = []
        for fault in ("o1", "o2", "head2", "do2"):
            row = table.loc[(track, fault, name)]
            found = f"{row['detected'] * row['runs']:.0f}/{row['runs']:.0f}"
            cells.append(found + (f", {row['delay_steps']:.0f}" if row["detected"] else ""))
        healthy = table.loc[(track, "o1", name)]
        cells.append(f"{healthy['healthy_alarms']:.0f}/{healthy['healthy_runs']:.0f}")
        assert f"| {words} | {' | '.join(cells)} |" in text
