"""One run a dose of one fault, from a table of readings: what alarms when, as a table and a figure.

    python -m analysis.doses readings=results/gpt2_124m-doses/readings.parquet out=report/gpt2_124m-doses

readings=FILE.parquet   columns bits (0: healthy), step, signal, and max, min, mean over layers and heads
out=DIR                 gets doses.csv and figure.png
steps=N                 the length that the runs were planned for, 1,600 by default: it sets the universal threshold
heads=N                 attention heads of the model, 144 by default (GPT-2 124M: 12 layers of 12)
title=TEXT              above the figure
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pandas as pd

from foreshock.analysis.figures.doses import dose_readings_figure
from foreshock.analysis.scores.doses import dose_table, doses_of, laws_threshold
from foreshock.experiments.usage import fail, misused, show_help

OPTIONS = {"readings", "out", "steps", "heads", "title"}


def main(arguments: list[str]) -> None:
    show_help(arguments, __doc__)
    given = dict(argument.split("=", 1) for argument in arguments if "=" in argument)
    if not {"readings", "out"} <= set(given) <= OPTIONS or len(given) != len(arguments):
        misused("python -m analysis.doses readings=FILE.parquet out=DIR [steps=N] [heads=N] [title=TEXT]")
    sizes = {name: given.get(name, default) for name, default in (("steps", "1600"), ("heads", "144"))}
    for name, value in sizes.items():
        if not value.isdecimal() or not int(value):
            fail(f"{name}={value} is not allowed: a whole number from 1 on")
    try:
        doses = doses_of(pd.read_parquet(given["readings"]))
        every_steps = int(np.diff(doses[0].worst_law.index).min())
        limit = laws_threshold(int(sizes["steps"]), every_steps, int(sizes["heads"]))
    except (ValueError, OSError) as error:
        fail(f"readings={given['readings']}: {error}")
    table, out = dose_table(doses, limit), Path(given["out"])
    out.mkdir(parents=True, exist_ok=True)
    table.to_csv(out / "doses.csv", index=False, float_format="%.4g")
    dose_readings_figure(doses, table, out / "figure.png", given.get("title", ""))
    print(table.to_string(index=False, float_format="{:.4g}".format))


if __name__ == "__main__":
    main(sys.argv[1:])
