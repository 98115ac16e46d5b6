"""The published leaderboard is what the published runs give, and the texts say what it says."""

import json
import re

import numpy as np
import pandas as pd
import pytest

from foreshock.analysis.order import leads, order_table
from foreshock.analysis.runs.discover import find
from foreshock.analysis.scores.contest import contest, run_scores
from foreshock.analysis.scores.costs import costs_of, detector_cost
from foreshock.analysis.scores.leaderboard import board
from foreshock.experiments.build import ROOT

RUNS, TABLE = ROOT / "results" / "reference_set", ROOT / "results" / "leaderboard.csv"
COUNTED = ["runs", "diverged", "calibration_runs", "healthy_alarms", "healthy_runs", "detected", "late", "missed"]
MEASURED = ["threshold", "rmlt_steps", "rmlt_low", "rmlt_high", "relative_lead_steps", "share_of_possible_lead"]
MEASURED += ["size_over_threshold"]


@pytest.fixture(scope="module")
def contests():
    """The committed runs on the reference track: the dense set and the mixture of experts."""
    return [contest(experiment, "reference") for experiment in find(RUNS)]


def words(path: str) -> str:
    """A text without its line breaks."""
    return " ".join((ROOT / path).read_text().split())


@pytest.mark.slow
@pytest.mark.parametrize("number", [0, 1])
def test_the_leaderboard_is_what_the_committed_runs_give(number, contests):
    one = contests[number]
    experiment, now = one.experiment, board(one, run_scores(one)).set_index(["fault", "detector"]).sort_index()
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
        cost = cells[-1].strip("*")
        if "%" in cost:
            shown = cost.removesuffix(" %")
            half = 0.5 * 10 ** -len(shown.partition(".")[2])
            assert float(shown) == pytest.approx(100 * pooled["cost_share_of_step"], abs=1.01 * half), name


def test_the_sizes_of_the_faults_are_those_of_the_table():
    table = pd.read_csv(TABLE)
    table = table[table["model"] == "mha_nano"].set_index(["track", "fault", "detector"])["size_over_threshold"]
    assert "7 bits stand 280 times" in words("README.md")
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


def signed(steps: float) -> str:
    return f"{steps:.0f}".replace("-", "\u2212")


def interval(row: pd.Series) -> str:
    return f"{signed(row['low'])} to {signed(row['high'])}"


@pytest.mark.slow
def test_the_papers_order_at_7_bits_is_what_the_committed_runs_give(contests):
    table = leads(run_scores(contests[0]), "attention")
    ours = {name: order_table(table, name).set_index("against") for name in ("Delta2 entropy", "Delta W entropy")}
    texts = {path: words(path) for path in ("README.md", "results/README.md")}
    first = ours["Delta W entropy"].loc["Delta2 entropy"]
    said = f"\u0394W leads \u0394\u2082 by {first['mean_steps']:.0f} steps ({interval(first)}"
    for text in texts.values():
        assert said in text and f"p = {first['p']:.2f}" in text
        assert f"with {first['tied']:.0f} ties and {first['later']:.0f} reversed" in text
    assert f"in {first['earlier']:.0f} seeds" in texts["README.md"]
    assert f"in {first['earlier']:.0f} of {first['seeds']:.0f} seeds" in texts["results/README.md"]
    rivals = ["attention entropy", "max attention logit", "weight norm"]
    over = {name: -found.loc[rivals, "mean_steps"] for name, found in ours.items()}
    by = [" and ".join(f"{steps:.0f}" for steps in (a, b)) for a, b in zip(*(over[n] for n in over), strict=True)]
    assert by == ["340 and 317", "137 and 113", "135 and 112"]
    assert "\u0394\u2082 by 340, 137 and 135 steps and \u0394W by 317, 113 and 112" in texts["README.md"]
    for rival in (*rivals, "weight stable rank"):
        for found in ours.values():
            row = found.loc[rival]
            assert f"{-row['mean_steps']:.0f}" in texts["results/README.md"]
            assert f"({signed(-row['high'])} to {signed(-row['low'])}" in texts["results/README.md"], rival
            assert (row["high"] < 0) == (rival in rivals)  # who leads for certain, and who does not


def test_the_gradient_norm_precedes_the_unsmoothed_loss_alone(contests):
    table = pd.read_csv(ROOT / "results" / "paper_attention-desk" / "leadtime.csv").set_index(["kind", "detector"])
    steps, mean = table["median_alarm_step"], table["rmlt_steps"]
    assert (steps["signal", "train_loss_raw"], mean["signal", "train_loss_raw"].round()) == (6247, 179)
    assert steps["detector", "unsmoothed training loss"] == 6247 and steps["detector", "gradient norm"] == 5601
    assert (steps["signal", "train_loss_ema"], mean["signal", "train_loss_ema"].round()) == (4956, 1686)
    runs = pd.read_csv(ROOT / "results" / "paper_attention-desk" / "runs.csv")
    row = order_table(leads(runs, "attention"), "train_loss_ema", ["gradient norm"]).loc[0]
    assert (row["earlier"], row["seeds"]) == (4, 5)
    row = order_table(leads(run_scores(contests[0]), "attention"), "training loss", ["gradient norm"]).loc[0]
    for path in ("README.md", "results/README.md"):
        assert f"{row['mean_steps']:.0f} steps ({interval(row)}" in words(path)
        assert "| unsmoothed training loss | 6,247 | 179 |" in (ROOT / path).read_text()
    assert f"p = {row['p']:.3f}" in words("results/README.md")


def of_model(name: str, model: str) -> pd.DataFrame:
    table = pd.read_csv(ROOT / "results" / "leaderboard" / f"{name}.csv")
    return table[(table["model"] == model) & (table["track"] == "reference")]


def test_agreements_and_accuracies_are_those_of_their_tables():
    text, tau = words("results/README.md"), {m: of_model("halves", m)["tau"].iloc[0] for m in ("mha_nano", "moe_nano")}
    assert f"is {tau['mha_nano']:.2f} between these halves over all detectors ({tau['moe_nano']:.2f} on" in text
    labels = of_model("labels", "mha_nano").groupby("label")["tau_to_primary"].first()
    assert f"{labels['delta x0.5']:.2f} and {labels['delta x2']:.2f} at half and twice the margin" in text
    assert f"the margin, {labels['training loss']:.2f} by the training loss" in text
    for model, where in (("mha_nano", "dense runs"), ("moe_nano", "runs of the mixture")):
        found = of_model("diagnosis", model).iloc[0]
        right = round(found["accuracy"] * found["runs"])
        assert f"{right} of {found['runs']} {where} (chance {100 * found['null_accuracy']:.0f} %)" in text
    river = pd.read_csv(TABLE)
    drifts = river.loc[river["detector"].str.startswith("river"), "threshold"]
    assert f"{drifts.min():.0f} to {drifts.max():.0f} drifts in a healthy run" in text


def test_how_far_the_healthy_loss_falls_is_that_of_the_reference_set(contests):
    falls, runs = [], contests[1].experiment.of("reference", "calibration", "test")
    for start, end in ((300, 1590), (1050, 1545)):
        levels = []
        for step in (start, end):
            held_out = [run.signal("held_out_loss") for run in runs]
            levels.append(np.median([s.values[s.steps <= step][-1].item() for s in held_out]))
        falls.append(levels[0] - levels[1])
        if start == 300:
            assert f"({levels[0]:.2f} to {levels[1]:.2f}: the median" in words("results/README.md")
    text = words("results/README.md")
    assert f"falls by {falls[0]:.2f} nats" in text and f"falls by {falls[1]:.2f} until 1,545" in text


def share(value: float) -> str:
    """Two digits, in percent."""
    return f"{100 * value:#.2g}".rstrip(".") + " %"


def test_costs_are_those_of_the_bench():
    bench = json.loads((ROOT / "results" / "bench-cpu.json").read_text())
    results, readme = words("results/README.md"), words("README.md")
    dense, experts, laws = ("mha_nano", "mha_small"), ("moe_nano", "moe_small"), bench["conservation laws, mha_small"]
    costs = {model: bench["monitors"][model] for model in (*dense, *experts)}

    def row(what: str, cells) -> None:
        assert " ".join(f"| {what} | {' | '.join(cells)} |".split()) in results

    def of(model: str, *names: str) -> float:
        chosen = {name: costs[model][name] for name in names}
        return detector_cost([one["signals"][0] for one in chosen.values()], costs_of(chosen))

    def ratios(key: str, models=dense) -> list[str]:
        return [f"{bench[model][key]:.2f}" for model in models]

    idle, everything = ratios("step_over_bare_sdpa"), [share(bench[m]["monitors_share_of_step"]) for m in dense]
    attention = [share(of(m, "attention_laws")) for m in dense]
    row("step with idle fault sites / bare loop on `scaled_dot_product_attention`", idle)
    row("all monitors at default cadence and their taps / step", everything)
    row("of these, attention laws every 10 steps", attention)
    outside = [share(of(m, "linear_laws", "logit_laws", "norm_laws")) for m in dense]
    row("laws outside attention every 30 steps", outside)
    row("attention computed again, one row every 10 steps", [share(of(m, "attention_recomputed")) for m in dense])
    row("curvature every 500 steps", [share(of(m, "gradient_curvature")) for m in dense])
    row("step with attention, linear layers and norms tapped / step", ratios("tapped_step_over_step"))
    both = [share(laws[f"conservation_share_of_step{every}"]) for every in ("", "_every_1")]
    row("the conservation family and its taps at its cadences; read at every step", ["", "; ".join(both)])
    row("step / dense step with as many active parameters", ratios("step_over_dense", experts))
    router = [share(bench[model]["router_monitors_share_of_step"]) for model in experts]
    row("router monitors and the router's law, with its taps / step", router)
    assert f"take {everything[1]} of a step of `mha_small` and {everything[0]} of a nano one" in readme
    assert f"the laws of attention {attention[1]} and {attention[0]}; a step with idle" in readme
    assert f"takes {idle[1]} and {idle[0]} times a bare loop" in readme
    again = [share(10 * costs[model]["attention_recomputed"]["share_of_step"]) for model in dense]
    assert f"one row a reading costs {again[1]} of a step of `mha_small`, {again[0]} of a nano one" in results
    taps = {place: share(cost) for place, cost in costs["mha_nano"]["linear_laws"]["taps"].items()}
    said = f"{taps['dot_product']} to a nano step, every linear layer {taps['linear']}, every norm {taps['norm']}, each"
    assert f"Tapping attention's dot product adds {said}" in results
    cores = [bench[f"qk core, d={size}"]["dense_over_core"] for size in ("768, 12 heads of 64", "2048, 4 heads of 64")]
    assert f"are {cores[0]:.0f} times faster at d = 768 with 12 heads of 64, and {cores[1]:.0f} times at" in results


def test_the_catalogue_s_cadence_of_the_oracle_is_that_of_its_monitor():
    catalogue = pd.read_csv(ROOT / "monitors" / "catalogue.csv").set_index("id")
    assert catalogue.loc["delta_bias_oracle", "cadence"] == "10 steps"
    assert "every_steps: 10" in (ROOT / "conf" / "monitor" / "delta_bias_oracle.yaml").read_text()
