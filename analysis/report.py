"""The report of an experiment: figures, tables and one self-contained page.

python -m analysis.report runs=DIR report=DIR      # score and draw saved runs again, in seconds
"""

from __future__ import annotations

import base64
import html
import sys
from pathlib import Path

import pandas as pd
from rich.console import Console
from rich.table import Table

from analysis.experiment import Experiment, load
from analysis.figures import central_figure, fault_figure, lead_figure
from analysis.table import lead_table, run_table
from experiments.trace import TraceError

COLUMNS = {
    "detector": "detector",
    "median_alarm_step": "median alarm (step)",
    "median_divergence_step": "median divergence (step)",
    "rmlt_steps": "mean lead (steps)",
    "relative_lead_steps": "lead over baseline (steps)",
    "detected": "detected",
    "late": "late",
    "missed": "missed",
    "false_alarm": "false",
    "healthy": "healthy alarms",
}


def summary(experiment: Experiment) -> str:
    """What the report shows, in a few sentences that hold whatever came out."""
    faulty, healthy = experiment.of("faulty"), experiment.of("reference", "calibration", "test")
    diverged = [run for run in faulty if run.divergence is not None]
    degraded = sum(run.degraded for run in faulty)
    healthy_diverged = sum(run.divergence is not None for run in healthy)
    counts = {role: len(experiment.of(role)) for role in ("reference", "calibration", "test")}
    return (
        f"{len(diverged)} of {len(faulty)} faulty runs diverge by step {experiment.horizon:,}"
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
    )


def _shown(table: pd.DataFrame) -> pd.DataFrame:
    """The columns that a reader wants, as text."""
    table = table[table["declined"].isna()].copy()
    table["healthy"] = table.apply(lambda r: f"{r.healthy_test_alarms:.0f}/{r.healthy_test_runs:.0f}", axis=1)
    table["detected"] = table.apply(lambda r: f"{r.detected * r.runs:.0f}/{r.runs:.0f}", axis=1)
    for column in ("median_alarm_step", "median_divergence_step", "rmlt_steps", "relative_lead_steps"):
        table[column] = table[column].map(lambda value: "–" if pd.isna(value) else f"{value:,.0f}")
    for column in ("late", "missed", "false_alarm"):
        table[column] = table[column].map(lambda value: f"{value:.0f}")
    return table


def print_table(experiment: Experiment, table: pd.DataFrame, console: Console) -> None:
    """The named detectors in the terminal, one table a fault."""
    for fault in experiment.faults:
        shown = _shown(table[(table["fault"] == fault) & (table["kind"] == "detector")])
        grid = Table(title=f"{experiment.index['experiment']['title']}: {fault}", title_justify="left")
        for column, heading in COLUMNS.items():
            grid.add_column(heading, justify="left" if column == "detector" else "right")
        for _, row in shown.iterrows():
            grid.add_row(*(str(row[column]) for column in COLUMNS))
        console.print(grid)
    console.print(summary(experiment))


def _page(experiment: Experiment, table: pd.DataFrame, figures: dict[str, Path]) -> str:
    def picture(caption: str, path: Path) -> str:
        data = base64.b64encode(path.read_bytes()).decode()
        return (
            f'<figure><img alt="{html.escape(caption)}" src="data:image/png;base64,{data}">'
            f"<figcaption>{html.escape(caption)}</figcaption></figure>"
        )

    def grid(kind: str) -> str:
        parts = []
        for fault in experiment.faults:
            shown = _shown(table[(table["fault"] == fault) & (table["kind"] == kind)])
            parts.append(
                f"<h3>{html.escape(fault)}</h3>" + shown[list(COLUMNS)].rename(columns=COLUMNS).to_html(index=False)
            )
        return "".join(parts)

    declined = table[table["declined"].notna()].drop_duplicates("detector")
    manifest = experiment.runs[0].trace.manifest
    provenance = {
        "config": f"experiment={experiment.index['experiment']['name']} scale={experiment.index['scale']['name']}",
        "sources (SHA-256)": manifest["source_sha256"],
        "data (SHA-256)": manifest["data_sha256"],
        "commit": f"{manifest['git_commit']}{' with uncommitted changes' if manifest['git_dirty'] else ''}",
        "versions": ", ".join(f"{k} {v}" for k, v in manifest["versions"].items()),
        "device": manifest["device"],
        "sweep": ", ".join(f"{k} {v}" for k, v in (experiment.index["sweep"] or {"trained": 0}).items()),
        "runs": ", ".join(run.trace.run_id for run in experiment.runs),
    }
    title = f"{experiment.index['experiment']['title']} ({experiment.index['scale']['name']})"
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{html.escape(title)}</title><style>
body {{ font: 16px/1.5 system-ui, sans-serif; max-width: 68rem; margin: 2rem auto; padding: 0 1rem; color: #222; }}
img {{ width: 100%; }} figure {{ margin: 2rem 0; }} figcaption {{ color: #555; }}
table {{ border-collapse: collapse; font-size: 14px; font-variant-numeric: tabular-nums; }}
th, td {{ border: 0; border-bottom: 1px solid #ddd; padding: .3rem .6rem; text-align: right; }}
th:first-child, td:first-child {{ text-align: left; }} dt {{ font-weight: 600; }} dd {{ overflow-wrap: anywhere; }}
</style></head><body>
<h1>{html.escape(title)}</h1><p>{html.escape(summary(experiment))}</p>
{"".join(picture(caption, path) for caption, path in figures.items())}
<h2>Detectors</h2>{grid("detector")}
<p>Mean lead counts a missed or late alarm as 0 steps. Baseline: {html.escape(experiment.index["experiment"]["baseline"])}, one detector
calibrated jointly. A dash: the median run raises no alarm, or does not diverge.</p>
<details><summary><b>Every signal by itself</b></summary>{grid("signal")}</details>
{f"<h2>Declined</h2><ul>{''.join(f'<li>{html.escape(reason)}</li>' for reason in declined['declined'])}</ul>" if len(declined) else ""}
<h2>Provenance</h2><dl>{"".join(f"<dt>{html.escape(k)}</dt><dd>{html.escape(str(v))}</dd>" for k, v in provenance.items())}</dl>
</body></html>
"""


def make_report(report: Path, runs: Path, allow_mixed: bool = False) -> Experiment:
    """Score the runs that ``report/experiment.json`` lists and write figures, CSV files and ``index.html`` there."""
    experiment = load(report, runs, allow_mixed)
    table = lead_table(experiment)
    table.to_csv(report / "leadtime.csv", index=False, float_format="%.6g")
    run_table(experiment).to_csv(report / "runs.csv", index=False)
    figures = {}
    if len(experiment.faults) == 1:
        figures[central_figure(experiment, report / "figure.png")] = report / "figure.png"
        if any(run.divergence is not None for run in experiment.of("faulty")):
            figures[lead_figure(experiment, report / "leadtime.png")] = report / "leadtime.png"
    else:
        figures[fault_figure(experiment, report / "figure.png")] = report / "figure.png"
    (report / "index.html").write_text(_page(experiment, table, figures), encoding="utf-8")
    console = Console(width=None if sys.stdout.isatty() else 150)
    print_table(experiment, table, console)
    console.print(f"{report / 'index.html'}")
    return experiment


def main(arguments: list[str]) -> None:
    given = dict(argument.split("=", 1) for argument in arguments if "=" in argument)
    mixed = given.pop("allow_mixed", "false")
    if set(given) != {"runs", "report"} or mixed not in ("true", "false"):
        sys.exit("usage: python -m analysis.report runs=DIR report=DIR [allow_mixed=true]")
    try:
        make_report(Path(given["report"]), Path(given["runs"]), allow_mixed=mixed == "true")
    except (ValueError, OSError, TraceError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main(sys.argv[1:])
