"""Score detectors of loss and gradient norm on public training logs with real failures.

    foreshock external logs=logs out=results/external

logs=DIR  algoperf_series.parquet, algoperf_runs.csv, mx_fp6_series.parquet (from where: docs/elsewhere.md)
out=DIR   detectors.csv (a row a detector), runs.csv (a row a detector and run), rises.csv (other rises as the label),
          factors.csv (the gradient norm over its median in FP6), left_out.csv, figure.png, manifest.json

A minute or two. Every share of detected failures stands beside the false alarms in healthy runs that it costs.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from foreshock.analysis.figures.external import external_figure
from foreshock.analysis.reports.elsewhere import print_findings
from foreshock.analysis.reports.external import External, score_external
from foreshock.experiments.files import write_whole
from foreshock.experiments.places import check_folder_to_read, check_folder_to_write
from foreshock.experiments.trace import TraceError
from foreshock.experiments.usage import fail, misused, show_help

USAGE = "foreshock external logs=DIR out=DIR"


def main(arguments: Sequence[str]) -> None:
    show_help(arguments, __doc__)
    given = dict(argument.split("=", 1) for argument in arguments if "=" in argument)
    if set(given) != {"logs", "out"} or len(given) != len(arguments) or not all(given.values()):
        misused(USAGE)
    try:
        out = check_folder_to_write(given["out"], "out")
        result = score_external(check_folder_to_read(given["logs"], "logs"))
        write(result, out)
    except (ValueError, OSError, TraceError) as error:
        fail(str(error))
    console = Console(width=None if sys.stdout.isatty() else 150)
    for name, findings in result.findings.items():
        console.print(f"\n{name}", style="bold")
        print_findings(findings, console)
    print(f"\nFP6 in E2M3, gradient norm over its median\n{result.factors.to_string(index=False)}")
    print(f"{out}: {', '.join(result.tables)}, figure.png, manifest.json")


def write(result: External, out: Path) -> None:
    """Tables, figure and what they were made from, into a folder."""
    out.mkdir(parents=True, exist_ok=True)
    for name, table in result.tables.items():
        table.to_csv(out / name, index=False, float_format="%.6g")
    external_figure(result.tables["detectors.csv"], out / "figure.png")
    manifest = {"command": USAGE, "logs_sha256": result.logs_sha256, "says": result.says}
    write_whole(out / "manifest.json", f"{json.dumps(manifest, indent=1)}\n".encode())


if __name__ == "__main__":
    main(sys.argv[1:])
