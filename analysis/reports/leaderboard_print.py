"""The leaderboard in the terminal: a column for each fault, and overall numbers where there are faults enough."""

from __future__ import annotations

import re
from collections.abc import Callable

import numpy as np
import pandas as pd
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from foreshock.analysis.reports.terminal import print_whole
from foreshock.analysis.scores.contest import ALL_FAULTS
from foreshock.analysis.scores.overall import MIN_FAULTS

SURE = 0.05
"""A p-value below it is marked."""
USUAL_ALPHA = 0.05
"""The false-alarm rate of the published boards; one whose calibration runs cannot support it says so."""


def print_board(leaderboard: pd.DataFrame, console: Console) -> None:
    """Each model and track: detectors by their share of the possible lead, what the columns mean, who was declined."""
    for (name, model, track), rows in leaderboard.groupby(["experiment", "model", "track"], sort=False):
        known = rows[rows["declined"].isna()]
        overall = known[known["fault"] == ALL_FAULTS].set_index("detector")
        by_fault = dict(tuple(known[known["fault"] != ALL_FAULTS].groupby("fault", sort=False)))
        by_fault = {fault: of_fault.set_index("detector") for fault, of_fault in by_fault.items()}
        print_whole(console, *_forms(escape(f"{name}: {model}, {track} track"), overall, by_fault))
        for line in _legend(overall, by_fault):
            console.print(line, highlight=False, markup=False)
        declined = rows[rows["declined"].notna()]
        if len(declined):
            without_signal = (re.sub(r"^[\w.]+: ", "", reason) for reason in declined["declined"])
            said = "; ".join(dict.fromkeys(without_signal))
            names = ", ".join(declined["detector"])
            console.print(f"not on this track: {names} ({said})", highlight=False, markup=False)
        console.print()


def _forms(title: str, overall: pd.DataFrame, by_fault: dict[str, pd.DataFrame]) -> list[Callable[[], list[Table]]]:
    """For narrower and narrower terminals: the whole table, without its intervals, and then a table a fault."""
    diverging = _diverging(by_fault)
    shown = {} if len(diverging) >= MIN_FAULTS else by_fault
    plain, plain_shown = _without_intervals(overall), {f: _without_intervals(rows) for f, rows in shown.items()}
    return [
        lambda: [_grid(title, overall, shown, diverging)],
        lambda: [_grid(title, plain, plain_shown, diverging)],
        lambda: [_grid(title, plain, part, diverging) for part in [{f: plain_shown[f]} for f in plain_shown] or [{}]],
    ]


def _grid(title: str, overall: pd.DataFrame, shown: dict[str, pd.DataFrame], diverging: list[str]) -> Table:
    """Few faults: leads in steps, and how much over the best baseline, a column each; many: overall numbers alone."""
    ranked = len(diverging) >= MIN_FAULTS
    grid = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD)
    grid.add_column("\n\ndetector", no_wrap=True)
    headings = ["\nfalse\nalarms"]
    for fault in shown:
        headings += (
            [f"{fault}\nlead\n(steps)", "over\nbest\nbaseline"] if fault in diverging else [f"{fault}\n\nalarms"]
        )
    headings += ["share of\npossible\nlead", *(["\n\nrank"] if ranked else []), "cost\nof a\nstep"]
    for heading in headings:
        grid.add_column(escape(heading), justify="right", no_wrap=True)
    for detector, row in overall.sort_values("share_of_possible_lead", ascending=False, kind="stable").iterrows():
        kind = "" if row["kind"] == "detector" else f" [{row['kind']}]"
        cells = [f"{row['healthy_alarms']:.0f}/{row['healthy_runs']:.0f}"]
        for fault, rows in shown.items():
            cells += _cells(rows, detector, fault in diverging)
        share = _with_interval(row["share_of_possible_lead"], row["share_low"], row["share_high"], ".2f")
        rank = [_with_interval(row["rank"], row["rank_low"], row["rank_high"], "g")] if ranked else []
        cost = row["cost_share_of_step"]
        cells += [share, *rank, "–" if pd.isna(cost) else f"{cost:.2%}"]
        grid.add_row(escape(f"{detector}{kind}"), *cells)
    return grid


def _without_intervals(rows: pd.DataFrame) -> pd.DataFrame:
    """For a terminal that is too narrow for them."""
    return rows.assign(**dict.fromkeys(("rmlt_low", "share_low", "rank_low"), np.nan))


def _diverging(by_fault: dict[str, pd.DataFrame]) -> list[str]:
    return [fault for fault, rows in by_fault.items() if rows["diverged"].max() > 0]


def _cells(rows: pd.DataFrame, detector: str, diverges: bool) -> list[str]:
    if detector not in rows.index:
        return ["–"] * (1 + diverges)
    row = rows.loc[detector]
    if not diverges:
        return [f"{row['detected'] * row['runs']:.0f}/{row['runs']:.0f}"]
    lead = _with_interval(row["rmlt_steps"], row["rmlt_low"], row["rmlt_high"], ",.0f")
    over = "–" if pd.isna(row["relative_lead_steps"]) else f"{row['relative_lead_steps']:+,.0f}"
    return [lead, over + ("*" if row["p_beats_baseline"] < SURE else "")]


def _with_interval(value: float, low: float, high: float, form: str) -> str:
    if pd.isna(value):
        return "–"
    return f"{value:{form}}" + ("" if pd.isna(low) else f" ({low:{form}}–{high:{form}})")


def _legend(overall: pd.DataFrame, by_fault: dict[str, pd.DataFrame]) -> list[str]:
    """What the columns mean, the best baseline of each fault, and how large the fault is."""
    said = [
        "Lead: optimizer steps from alarm to divergence, mean over the runs that diverge, a miss counts 0; "
        "95 % interval over seeds."
    ]
    diverging = _diverging(by_fault)
    best = {fault: by_fault[fault]["baseline"].dropna().unique() for fault in diverging}
    best = {fault: names[0] for fault, names in best.items() if len(names)}
    if best:
        said.append(
            "Over best baseline: how many steps earlier the alarm is than that baseline's, "
            + ", ".join(f"under {fault} {name}" for fault, name in best.items())
            + "; a run without alarm counts to the horizon. *: a difference of leads, the column lead less that of the "
            f"baseline, is above 0 by max-T, p < {SURE}."
        )
    said += [
        f"Share of possible lead: lead / (divergence - onset), faults weighted equally within and between families; "
        f"an overall rank or interval needs {MIN_FAULTS} faults that diverge, here are {len(diverging)}."
        if len(diverging) < MIN_FAULTS
        else f"Share of possible lead and rank: over {len(diverging)} faults, 95 % intervals over faults and seeds."
    ]
    for fault in diverging:
        size = by_fault[fault]["size_over_threshold"].where(by_fault[fault]["kind"].isin(("detector", "baseline")))
        if size.notna().any():
            said.append(f"Size of {fault}: {_size(size)} (largest reading before divergence, median over runs).")
    alpha, supported = overall["alpha"].max(), overall["alpha_supported"].max()
    if supported > USUAL_ALPHA:
        said.append(
            f"At {alpha:.0%} false alarms per run. Calibration runs: {1 / supported - 1:.0f}, which support "
            f"{supported:.1%} and more; {USUAL_ALPHA:.0%} needs {1 / USUAL_ALPHA - 1:.0f}."
        )
    if overall["exploratory"].any():
        said.append("Exploratory: under 10 faulty seeds, or no healthy test run.")
    return said


def _size(size_over_threshold: pd.Series) -> str:
    """How far a fault stands above a threshold. By detector; some may be NaN."""
    largest = size_over_threshold.max()
    if largest <= 1:
        return "stays below every threshold"
    times = f"{largest:,.0f}" if largest >= 10 else f"{largest:.1f}"
    return f"{times} times the threshold of {size_over_threshold.idxmax()}, which it exceeds most"
