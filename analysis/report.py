"""The report of an experiment: figures, tables and one self-contained page.

python -m analysis.report runs=DIR report=DIR [align=steps|tokens]     # score and draw saved runs again, in seconds

A kind of report of one's own is found as the experiment recorded it, or with --config-dir DIR and plugins=[a,b].
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

import pandas as pd
from rich.console import Console

from foreshock.analysis.figures.leads import lead_figure
from foreshock.analysis.reports.cases import make_case_report
from foreshock.analysis.reports.kinds.base import Kind, one_of_each_model
from foreshock.analysis.reports.kinds.by_name import kind_of
from foreshock.analysis.reports.page import page, verdict
from foreshock.analysis.reports.summary import print_summary
from foreshock.analysis.runs.conf import Conf, own_conf
from foreshock.analysis.runs.experiment import Experiment
from foreshock.analysis.runs.index import read_index
from foreshock.analysis.runs.load import has_cases, load, views
from foreshock.analysis.runs.readings import end_table
from foreshock.analysis.scores.claims import check_claims
from foreshock.analysis.scores.contest import Contest, contest
from foreshock.analysis.scores.outcomes import benign_table, outcome_table
from foreshock.analysis.scores.receipts import write_receipts
from foreshock.analysis.scores.table import in_unit, lead_table, run_table
from foreshock.experiments.places import check_folder_to_read, check_folder_to_write
from foreshock.experiments.trace import TraceError
from foreshock.experiments.usage import fail, misused, show_help

USAGE = (
    "python -m analysis.report runs=DIR report=DIR [align=steps|tokens] [allow_mixed=true] [--config-dir DIR] "
    "[plugins=[a,b]]"
)


def _draw(kind: Kind, contests: Sequence[Contest], report: Path) -> list[tuple[str, Path]]:
    """The pictures of the experiment's kind, and a lead-time figure for each view with one diverging fault."""
    figures = kind.draw(contests, report)
    for view in contests:
        experiment = view.experiment
        if len(experiment.faults) == 1 and any(run.divergence is not None for run in experiment.of("faulty")):
            name = "leadtime" if len(contests) == 1 else f"leadtime-{experiment.model}-{experiment.axis}"
            path = report / f"{name}.png"
            figures.append((lead_figure(view, path), path))
    return figures


def _write_tables(kind: Kind, contests: Sequence[Contest], leads: Sequence[pd.DataFrame], report: Path) -> None:
    """``leadtime.csv``, ``runs.csv``, ``ends.csv`` and ``outcomes.csv`` with all models, once an axis: in tokens

    ``leadtime-tokens.csv`` and so on; ``benign.csv`` where there are benign controls; then those of the kind.
    """
    for axis in dict.fromkeys(view.experiment.axis for view in contests):
        suffix = "" if axis == "steps" else f"-{axis}"
        chosen = [(view, table) for view, table in zip(contests, leads, strict=True) if view.experiment.axis == axis]
        of_axis = in_unit(pd.concat([table for _, table in chosen]), axis)
        of_axis.to_csv(report / f"leadtime{suffix}.csv", index=False, float_format="%.6g")
        runs = in_unit(pd.concat([run_table(view) for view, _ in chosen]), axis)
        runs.to_csv(report / f"runs{suffix}.csv", index=False)
        ends = pd.concat([end_table(view.experiment) for view, _ in chosen])
        ends.to_csv(report / f"ends{suffix}.csv", index=False, float_format="%.6g")
        outcomes = pd.concat([outcome_table(view.experiment) for view, _ in chosen])
        outcomes.to_csv(report / f"outcomes{suffix}.csv", index=False, float_format="%.6g")
        if any(view.experiment.benign_controls for view, _ in chosen):
            benign = pd.concat([benign_table(view) for view, _ in chosen])
            benign.to_csv(report / f"benign{suffix}.csv", index=False, float_format="%.6g")
    parts: dict[str, list[pd.DataFrame]] = {}
    for _, view in one_of_each_model(contests):
        for name, table in kind.model_tables(view).items():
            parts.setdefault(name, []).append(table.assign(model=view.experiment.model))
    for name, tables in parts.items():
        pd.concat(tables).to_csv(report / f"{name}.csv", index=False, float_format="%.6g")


def make_report(
    report: Path, runs: Path, allow_mixed: bool = False, align: str | None = None, conf: Conf | None = None
) -> list[Experiment]:
    """Score the runs that ``report/experiment.json`` lists; write figures, tables, ``index.html`` and receipts there.

    align: ``steps`` or ``tokens``, or None for what the experiment asks for; conf: where its kind of report is, if
    not where its index says. Returns its views, scored; none of an experiment of cases, whose report is that of
    ``reports.cases``.
    """
    if has_cases(report):
        make_case_report(report, runs)
        return []
    kind = kind_of(read_index(report), conf)
    chosen = dict.fromkeys((model, align or axis) for model, axis in views(report))
    experiments = [load(report, runs, allow_mixed, model, axis) for model, axis in chosen]
    contests = [contest(experiment, "reference", singles=True) for experiment in experiments]
    leads = [lead_table(view) for view in contests]
    figures = _draw(kind, contests, report)
    _write_tables(kind, contests, leads, report)
    claims = pd.concat([check_claims(view) for view in contests])
    if len(claims):
        claims.to_csv(report / "claims.csv", index=False)
    for _, view in one_of_each_model(contests):
        write_receipts(view, report / "receipts")
    (report / "index.html").write_text(page(kind, contests, leads, claims, figures), encoding="utf-8")
    console = Console(width=None if sys.stdout.isatty() else 150)
    for view, table in zip(contests, leads, strict=True):
        print_summary(view, kind, table, console)
    of_first = kind.tables(contests[0])
    for name, table in of_first.items():
        table.to_csv(report / f"{name}.csv", index=False)
    for table in list(of_first.values())[-1:]:
        console.print(table.to_string(index=False), markup=False)
    for claim in claims.itertuples():
        said = verdict(claim.holds)
        said = said.upper() if said == "does not hold" else said
        console.print(f"{said}: {claim.claim}. {claim.model}: {claim.measured}", highlight=False, markup=False)
    console.print(f"{report / 'index.html'}", markup=False)
    return experiments


def main(arguments: list[str]) -> None:
    show_help(arguments, __doc__)
    try:
        conf, others = own_conf(arguments)
    except ValueError as error:
        fail(str(error))
    given = dict(argument.split("=", 1) for argument in others if "=" in argument)
    unread = len(given) != len(others)  # no key=value, or a key twice
    mixed, align = given.pop("allow_mixed", "false"), given.pop("align", None)
    if unread or set(given) != {"runs", "report"} or mixed not in ("true", "false"):
        misused(USAGE)
    try:
        report = check_folder_to_write(check_folder_to_read(given["report"], "report"), "report")
        make_report(report, check_folder_to_read(given["runs"], "runs"), mixed == "true", align, conf)
    except (ValueError, OSError, TraceError) as error:
        fail(str(error))


if __name__ == "__main__":
    main(sys.argv[1:])
