"""The report of an experiment: figures, tables and one self-contained page.

python -m analysis.report runs=DIR report=DIR [align=steps|tokens]     # score and draw saved runs again, in seconds
"""

from __future__ import annotations

import base64
import html
import sys
from collections.abc import Sequence
from pathlib import Path

import pandas as pd
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from analysis.cases import make_case_report
from analysis.claims import check_claims
from analysis.delays import blind_table, smallest_table
from analysis.drawing import pretty
from analysis.early_figures import cost_figure, size_figure
from analysis.experiment import HEALTHY_ROLES, Experiment, has_cases, load, views
from analysis.figures import central_figure, fault_figure, lead_figure
from analysis.headline import headline
from analysis.leaderboard_figure import leads_figure
from analysis.localise import confusion, localise, sentences, shares_right
from analysis.localise_figure import localise_figure
from analysis.paired import drift_table, paired_table
from analysis.paired_figure import paired_figure
from analysis.readings import end_table
from analysis.receipts import write_receipts
from analysis.router_figures import dose_figure, grid_figure, selectivity_figure
from analysis.selectivity import alarm_matrix, off_diagonal
from analysis.smallest_figure import smallest_figure
from analysis.table import in_unit, lead_table, run_table
from analysis.terminal import print_whole
from experiments.trace import TraceError
from experiments.usage import misused, show_help

COLUMNS = {
    "detector": "detector",
    "median_alarm_step": "median alarm",
    "median_divergence_step": "median divergence",
    "rmlt_steps": "mean lead",
    "relative_lead_steps": "mean lead over best baseline",
    "detected": "runs detected",
    "late": "late",
    "missed": "missed",
    "false_alarm": "false",
    "healthy": "healthy runs with an alarm",
}
BY_MODEL = {
    "localise": {"figure": localise_figure},
    "early_warning": {"figure": cost_figure, "sizes": size_figure, "selectivity": selectivity_figure},
    "smallest": {"figure": smallest_figure},
    "paired": {"figure": paired_figure},
}
"""By kind, the figures that every model has, by file name."""

CASES = "cases"
"""The kind of an experiment whose runs are judged each by itself: ``analysis.cases`` makes its report."""

DRAWINGS = ("central", "faults", "doses", "grid", "selectivity", "leads", *BY_MODEL, CASES)
"""Kinds of central figure, the key ``draw`` of an experiment."""


def _headings(axis: str) -> dict[str, str]:
    placed = ("median_alarm_step", "median_divergence_step", "rmlt_steps", "relative_lead_steps")
    return {column: f"{said} ({axis})" if column in placed else said for column, said in COLUMNS.items()}


def summary(experiment: Experiment) -> str:
    """What the report shows, in a few sentences that hold whatever came out."""
    faulty, healthy = experiment.of("faulty"), experiment.of(*HEALTHY_ROLES)
    diverged = [run for run in faulty if run.divergence is not None]
    degraded = sum(run.degraded for run in faulty)
    healthy_diverged = sum(run.divergence is not None for run in healthy)
    counts = {role: len(experiment.of(role)) for role in ("reference", "calibration", "test")}
    return (
        f"{len(diverged)} of {len(faulty)} faulty runs diverge within {experiment.horizon:,} {experiment.axis}"
        f"{f', {degraded} more end degraded' if degraded else ''}; {healthy_diverged} of {len(healthy)} healthy runs do. "
        f"Divergence: the held-out loss stands {experiment.drawup_threshold_nats:.2f} nats above its minimum, "
        f"a margin set by {counts['reference']} reference runs. "
        f"Thresholds: split conformal on {counts['calibration']} healthy calibration runs at "
        f"{experiment.alpha:.0%} false alarms per run; {counts['test']} healthy test runs. Reference track, "
        f"{experiment.index['rule']['chart'].upper()} chart, seeds of all roles disjoint."
        + (f" Mixed on request: {'; '.join(experiment.mixed)}." if experiment.mixed else "")
        + (
            " Fewer than 10 faulty seeds: points without intervals."
            if len(faulty) < 10 * len(experiment.faults)
            else ""
        )
        + (f" {sentences(localise(experiment))}" if experiment.index["experiment"]["draw"] == "localise" else "")
    )


def _shown(table: pd.DataFrame) -> pd.DataFrame:
    """The columns that a reader wants, as text."""
    table = table[table["declined"].isna()].copy()
    table["healthy"] = table.apply(lambda r: f"{r.healthy_test_alarms:.0f}/{r.healthy_test_runs:.0f}", axis=1)
    table["detected"] = table.apply(lambda r: f"{r.detected * r.runs:.0f}/{r.runs:.0f}", axis=1)
    for column in ("median_alarm_step", "median_divergence_step", "rmlt_steps", "relative_lead_steps"):
        table[column] = table[column].map(lambda value: "–" if pd.isna(value) else f"{value:,.0f}")
    table["detector"] = table["detector"].map(pretty)
    for column in ("late", "missed", "false_alarm"):
        table[column] = table[column].map(lambda value: f"{value:.0f}")
    return table


def print_table(experiment: Experiment, table: pd.DataFrame, console: Console) -> None:
    """The named detectors in the terminal, one table a fault."""
    view = f"{experiment.model}, " if len(experiment.index["experiment"]["models"]) > 1 else ""
    for fault in experiment.faults:
        shown = _shown(table[(table["fault"] == fault) & (table["kind"] == "detector")])
        title = f"{experiment.index['experiment']['title']}: {view}{experiment.label(fault)}"
        grid = Table(title=escape(title), title_justify="left")
        for column, heading in _headings(experiment.axis).items():
            named = column == "detector"
            grid.add_column(heading, justify="left" if named else "right", no_wrap=named)
        for _, row in shown.iterrows():
            grid.add_row(*(escape(str(row[column])) for column in COLUMNS))
        print_whole(console, lambda grid=grid: [grid])
    console.print(summary(experiment), markup=False)
    said = headline(experiment, table)
    if said:
        console.print(said, style="bold", highlight=False, markup=False)


def _picture(caption: str, path: Path) -> str:
    data = base64.b64encode(path.read_bytes()).decode()
    return (
        f'<figure><img alt="{html.escape(caption)}" src="data:image/png;base64,{data}">'
        f"<figcaption>{html.escape(caption)}</figcaption></figure>"
    )


def _tables(experiment: Experiment, table: pd.DataFrame) -> str:
    """One view's part of the page: summary, detectors, single signals, what was declined."""

    def grid(kind: str) -> str:
        parts = []
        for fault in experiment.faults:
            shown = _shown(table[(table["fault"] == fault) & (table["kind"] == kind)])
            shown = shown[list(COLUMNS)].rename(columns=_headings(experiment.axis))
            parts.append(f"<h3>{html.escape(experiment.label(fault))}</h3>" + shown.to_html(index=False))
        return "".join(parts)

    reasons = table["declined"].dropna().drop_duplicates()
    declined = "".join(f"<li>{html.escape(reason)}</li>" for reason in reasons)
    return f"""<h2>{html.escape(experiment.model)}, aligned by {experiment.axis}</h2><p>{html.escape(summary(experiment))}</p>
<h3>Detectors</h3>{grid("detector")}
<p>Alarm and divergence: medians over runs. Leads: means over runs, in which a missed or late alarm counts as 0. Baselines:
{html.escape(", ".join(experiment.baselines))}; the lead over them is over the one that leads most under the fault, in runs
that diverge. A dash: the median run raises no alarm, or does not diverge.</p>
<details><summary><b>Every signal by itself</b></summary>{grid("signal")}</details>
{f"<details><summary><b>Declined signals</b> ({len(reasons)})</summary><ul>{declined}</ul></details>" if declined else ""}"""


def _verdict(holds: bool | None) -> str:
    return "no verdict" if pd.isna(holds) else "holds" if holds else "<b>does not hold</b>"


def _claims(claims: pd.DataFrame) -> str:
    if claims.empty:
        return ""
    rows = "".join(
        f"<tr><td>{html.escape(row.claim)}</td><td>{_verdict(row.holds)}</td>"
        f"<td>{html.escape(row.measured)} ({html.escape(row.model)})</td></tr>"
        for row in claims.itertuples()
    )
    return f"<h2>The paper's claims</h2><table class=claims><tr><th>claim</th><th>here</th><th>measured</th></tr>{rows}</table>"


def _page(
    experiments: Sequence[Experiment], tables: Sequence[pd.DataFrame], claims: pd.DataFrame, figures: dict[str, Path]
) -> str:
    index, runs = experiments[0].index, {run.trace.run_id: run for e in experiments for run in e.runs}
    manifest = experiments[0].runs[0].trace.manifest
    provenance = {
        "config": f"experiment={index['experiment']['name']} scale={index['scale']['name']}",
        "sources (SHA-256)": manifest["source_sha256"],
        "data (SHA-256)": manifest["data_sha256"],
        "commit": f"{manifest['git_commit']}{' with uncommitted changes' if manifest['git_dirty'] else ''}",
        "versions": ", ".join(f"{k} {v}" for k, v in manifest["versions"].items()),
        "device": manifest["device"],
        "sweep": ", ".join(f"{k} {v}" for k, v in (index["sweep"] or {"trained": 0}).items()),
        "runs": ", ".join(runs),
    }
    title = f"{index['experiment']['title']} ({index['scale']['name']})"
    said_first = [headline(experiment, table) for experiment, table in zip(experiments, tables, strict=True)]
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{html.escape(title)}</title><style>
body {{ font: 16px/1.5 system-ui, sans-serif; max-width: 68rem; margin: 2rem auto; padding: 0 1rem; color: #222; }}
img {{ width: 100%; }} figure {{ margin: 2rem 0; }} figcaption {{ color: #555; }}
table {{ border-collapse: collapse; font-size: 14px; font-variant-numeric: tabular-nums; }}
th, td {{ border: 0; border-bottom: 1px solid #ddd; padding: .3rem .6rem; text-align: right; }}
th:first-child, td:first-child, .claims th, .claims td {{ text-align: left; }}
.headline {{ font-size: 1.25rem; }} summary {{ cursor: pointer; margin: 1rem 0; }}
dt {{ font-weight: 600; }} dd {{ overflow-wrap: anywhere; }}
</style></head><body>
<h1>{html.escape(title)}</h1>
{"".join(f"<p class=headline>{html.escape(said)}</p>" for said in said_first if said)}
{"".join(_picture(caption, path) for caption, path in figures.items())}
{_claims(claims)}
{"".join(_tables(experiment, table) for experiment, table in zip(experiments, tables, strict=True))}
<h2>Provenance</h2><dl>{"".join(f"<dt>{html.escape(k)}</dt><dd>{html.escape(str(v))}</dd>" for k, v in provenance.items())}</dl>
</body></html>
"""


def _draw(experiments: Sequence[Experiment], report: Path) -> dict[str, Path]:
    """The central figure of the experiment's kind, and a lead-time figure for each view with one diverging fault."""
    kind, path = experiments[0].index["experiment"]["draw"], report / "figure.png"
    if kind not in DRAWINGS:
        raise ValueError(f"experiment.draw={kind!r} is not allowed: one of {', '.join(DRAWINGS)}")
    if kind == "doses":
        figures = {dose_figure(experiments, path): path}
    elif kind == "leads":
        figures = {leads_figure(experiments[0], path): path}
    elif kind in BY_MODEL:
        figures = {
            draw_one(e, report / f"{name}{suffix}.png"): report / f"{name}{suffix}.png"
            for suffix, e in _models(experiments)
            for name, draw_one in BY_MODEL[kind].items()
        }
    else:
        draw = {
            "central": central_figure,
            "faults": fault_figure,
            "grid": grid_figure,
            "selectivity": selectivity_figure,
        }
        figures = {draw[kind](experiments[0], path): path}
    for experiment in experiments:
        if len(experiment.faults) == 1 and any(run.divergence is not None for run in experiment.of("faulty")):
            name = "leadtime" if len(experiments) == 1 else f"leadtime-{experiment.model}-{experiment.axis}"
            figures[lead_figure(experiment, report / f"{name}.png")] = report / f"{name}.png"
    return figures


def _models(experiments: Sequence[Experiment]) -> list[tuple[str, Experiment]]:
    """One view of each model, with what its files' names end in: nothing for the first model."""
    first = {e.model: e for e in reversed(experiments)}
    models = dict.fromkeys(e.model for e in experiments)
    return [(f"-{model}" if i else "", first[model]) for i, model in enumerate(models)]


def _write_kind(experiments: Sequence[Experiment], report: Path) -> None:
    """The tables that go with the kind of central figure, each with a column ``model``."""
    kind = experiments[0].index["experiment"]["draw"]
    parts: dict[str, list[pd.DataFrame]] = {}
    for _, one in _models(experiments):
        found: dict[str, pd.DataFrame] = {}
        if kind == "localise":
            runs = localise(one).table
            found = {"localisation": runs, "confusion": confusion(runs).join(shares_right(runs)).reset_index()}
        elif kind == "smallest":
            found = {"smallest": smallest_table(one)}
        elif kind == "paired":
            found = {"paired": paired_table(one), "drift": drift_table(one)}
        elif kind == "early_warning":
            found = {"smallest": smallest_table(one), "blind": blind_table(one)}
        for name, table in found.items():
            parts.setdefault(name, []).append(table.assign(model=one.model))
    for name, tables in parts.items():
        pd.concat(tables).to_csv(report / f"{name}.csv", index=False, float_format="%.6g")


def _write_csv(experiments: Sequence[Experiment], tables: Sequence[pd.DataFrame], report: Path) -> None:
    """``leadtime.csv`` and ``runs.csv`` with all models, once an axis: in tokens they are ``leadtime-tokens.csv`` ..."""
    for axis in dict.fromkeys(experiment.axis for experiment in experiments):
        suffix = "" if axis == "steps" else f"-{axis}"
        of_axis = [(e, t) for e, t in zip(experiments, tables, strict=True) if e.axis == axis]
        leads = in_unit(pd.concat([t for _, t in of_axis]), axis)
        leads.to_csv(report / f"leadtime{suffix}.csv", index=False, float_format="%.6g")
        in_unit(pd.concat([run_table(e) for e, _ in of_axis]), axis).to_csv(report / f"runs{suffix}.csv", index=False)
        ends = pd.concat([end_table(e) for e, _ in of_axis])
        ends.to_csv(report / f"ends{suffix}.csv", index=False, float_format="%.6g")


def make_report(report: Path, runs: Path, allow_mixed: bool = False, align: str | None = None) -> list[Experiment]:
    """Score the runs that ``report/experiment.json`` lists and write figures, CSV files, ``index.html`` and receipts there.

    align: ``steps`` or ``tokens``, or None for what the experiment asks for. Returns its views, scored; none of an
    experiment of cases, whose report is that of ``analysis.cases``.
    """
    if has_cases(report):
        make_case_report(report, runs)
        return []
    chosen = dict.fromkeys((model, align or axis) for model, axis in views(report))
    experiments = [load(report, runs, allow_mixed, model, axis) for model, axis in chosen]
    tables = [lead_table(experiment) for experiment in experiments]
    _write_csv(experiments, tables, report)
    claims = pd.concat([check_claims(experiment) for experiment in experiments])
    if len(claims):
        claims.to_csv(report / "claims.csv", index=False)
    figures = _draw(experiments, report)
    _write_kind(experiments, report)
    for model in dict.fromkeys(experiment.model for experiment in experiments):
        write_receipts(next(e for e in experiments if e.model == model), report / "receipts")
    (report / "index.html").write_text(_page(experiments, tables, claims, figures), encoding="utf-8")
    console = Console(width=None if sys.stdout.isatty() else 150)
    for experiment, table in zip(experiments, tables, strict=True):
        print_table(experiment, table, console)
    if experiments[0].index["experiment"]["draw"] in ("selectivity", "early_warning"):
        matrix = alarm_matrix(experiments[0])
        matrix.to_csv(report / "selectivity.csv", index_label="detector")
        ignored = off_diagonal(experiments[0], matrix)
        ignored.to_csv(report / "off_diagonal.csv", index=False)
        console.print(ignored.to_string(index=False), markup=False)
    for claim in claims.itertuples():
        verdict = "no verdict" if pd.isna(claim.holds) else "holds" if claim.holds else "DOES NOT HOLD"
        console.print(f"{verdict}: {claim.claim}. {claim.model}: {claim.measured}", highlight=False, markup=False)
    console.print(f"{report / 'index.html'}", markup=False)
    return experiments


def main(arguments: list[str]) -> None:
    show_help(arguments, __doc__)
    given = dict(argument.split("=", 1) for argument in arguments if "=" in argument)
    unread = len(given) != len(arguments)  # no key=value, or a key twice
    mixed, align = given.pop("allow_mixed", "false"), given.pop("align", None)
    if unread or set(given) != {"runs", "report"} or mixed not in ("true", "false"):
        misused("python -m analysis.report runs=DIR report=DIR [align=steps|tokens] [allow_mixed=true]")
    try:
        make_report(Path(given["report"]), Path(given["runs"]), allow_mixed=mixed == "true", align=align)
    except (ValueError, OSError, TraceError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main(sys.argv[1:])
