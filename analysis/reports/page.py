"""The page of a report: one self-contained HTML file, with its pictures in it."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd
from jinja2 import Environment, FileSystemLoader, StrictUndefined

from foreshock.analysis.reports.headline import headline
from foreshock.analysis.reports.kinds.base import Kind
from foreshock.analysis.reports.summary import shown_rows, summary
from foreshock.analysis.scores.contest import Contest

TEMPLATES = Environment(
    loader=FileSystemLoader(Path(__file__).with_name("templates")),
    autoescape=True,  # names come out of files
    trim_blocks=True,
    lstrip_blocks=True,
    undefined=StrictUndefined,
)


def page(
    kind: Kind,
    contests: Sequence[Contest],
    tables: Sequence[pd.DataFrame],
    claims: pd.DataFrame,
    figures: Sequence[tuple[str, Path]],
) -> str:
    """The page's HTML.

    kind: of the experiment's report; tables: the lead-time table of each contest; figures: captions and files.
    """
    index = contests[0].experiment.index
    headlines = [headline(contest.experiment, table) for contest, table in zip(contests, tables, strict=True)]
    return TEMPLATES.get_template("report.html.j2").render(
        title=f"{index['experiment']['title']} ({index['scale']['name']})",
        headlines=[line for line in headlines if line],
        figures=[(caption, base64.b64encode(path.read_bytes()).decode()) for caption, path in figures],
        claims=[{**row, "verdict": verdict(row["holds"])} for row in claims.to_dict("records")],
        views=[_view(kind, contest, table) for contest, table in zip(contests, tables, strict=True)],
        provenance=_provenance(contests),
    )


def verdict(holds: bool | None) -> str:
    """Whether a claim holds, in words; a missing value is no verdict."""
    return "no verdict" if pd.isna(holds) else "holds" if holds else "does not hold"


def _view(kind: Kind, contest: Contest, table: pd.DataFrame) -> dict[str, Any]:
    """What one view of an experiment shows: summary, detectors, single signals, what was declined."""
    experiment = contest.experiment
    return {
        "heading": f"{experiment.model}, aligned by {experiment.axis}",
        "summary": summary(contest, kind),
        "baselines": ", ".join(experiment.baselines),
        "declined": list(table["declined"].dropna().drop_duplicates()),
        **{
            kind: [
                (experiment.label(fault), shown_rows(contest, table, fault, kind).to_dict("split"))
                for fault in experiment.faults
            ]
            for kind in ("detector", "signal")
        },
    }


def _provenance(contests: Sequence[Contest]) -> dict[str, str]:
    """What the runs were made from, by name."""
    index, manifest = contests[0].experiment.index, contests[0].experiment.runs[0].trace.manifest
    runs = dict.fromkeys(run.trace.run_id for contest in contests for run in contest.experiment.runs)
    return {
        "config": f"experiment={index['experiment']['name']} scale={index['scale']['name']}",
        "sources (SHA-256)": manifest["source_sha256"],
        "data (SHA-256)": manifest["data_sha256"],
        "commit": f"{manifest['git_commit']}{' with uncommitted changes' if manifest['git_dirty'] else ''}",
        "versions": ", ".join(f"{k} {v}" for k, v in manifest["versions"].items()),
        "device": manifest["device"],
        "sweep": ", ".join(f"{k} {v}" for k, v in (index["sweep"] or {"trained": 0}).items()),
        "runs": ", ".join(runs),
    }
