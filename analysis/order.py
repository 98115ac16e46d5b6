"""Which of two detectors alarms first? Seed by seed, in a table of runs that scoring has written.

    python -m analysis.order table=results/paper_attention-desk/runs.csv "detector=Delta2 entropy"
    python -m analysis.order table=report/leaderboard/runs.csv "detector=Delta W entropy" "against=Delta2 entropy"

table=FILE.csv      ``runs.csv`` of a report or of ``analysis.score``
detector=NAME       whose leads are compared
against=A,B         with those of these; of every other detector by default
fault=NAME          ``attention`` by default
model=, track=      where the table has several; the first, ``reference``
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from difflib import get_close_matches
from pathlib import Path

import numpy as np
import pandas as pd

from foreshock.analysis.runs.csv_table import read_table
from foreshock.analysis.scores.inference import bca_interval, max_t_test
from foreshock.experiments.names import check_distinct
from foreshock.experiments.usage import fail, misused, show_help

OPTIONS = {"table", "detector", "against", "fault", "model", "track"}
DEFAULTS = {"fault": "attention", "track": "reference"}
COLUMNS = ("detector", "seed", "fault")
LEADS = ("lead", "restricted_lead_steps")
"""What ``runs.csv`` calls a restricted lead in steps: of ``analysis.score``, of a report."""

CONTROLS = ("control", "oracle")
"""Kinds of rows that know the fault or nothing at all."""


def leads(table: pd.DataFrame, fault: str, model: str | None = None, track: str = "reference") -> pd.DataFrame:
    """(seeds, detectors): restricted leads in steps of the diverging runs of a fault.

    table: with the columns of ``COLUMNS`` and one of ``LEADS``. Raises ValueError where no run of the fault diverges,
    a lead is no number, or a detector has two runs of one seed.
    """
    lead = next((column for column in LEADS if column in table), None)
    if lead is None:
        raise ValueError(f"no column {' or '.join(map(repr, LEADS))}: a runs.csv is needed")
    chosen = {"fault": fault, "track": track, "model": model}
    for column, value in chosen.items():
        if column in table:
            value = table[column].iloc[0] if value is None else value
            if value not in set(table[column]):
                known = ", ".join(map(str, table[column].unique()))
                raise ValueError(f"{column}={value!r} is not allowed: one of {known}")
            table = table[table[column] == value]
    if "kind" in table:
        table = table[~table["kind"].isin(CONTROLS)]
    table = table[table[lead].notna()]
    if table.empty:
        raise ValueError(f"fault={fault!r} is not allowed: none of its runs diverges")
    wrong = table.loc[pd.to_numeric(table[lead], errors="coerce").isna(), lead]
    if len(wrong):
        raise ValueError(f"{lead}={wrong.iloc[0]!r} is not allowed: a number of steps")
    twice = table[table.duplicated(["seed", "detector"])]
    if len(twice):
        raise ValueError(f"seed {twice['seed'].iloc[0]} has two rows of {twice['detector'].iloc[0]!r}: one is needed")
    return table.pivot(index="seed", columns="detector", values=lead).astype(float)


def order_table(leads_SD: pd.DataFrame, detector: str, against: Sequence[str] = ()) -> pd.DataFrame:
    """One row a rival: how the detector's restricted lead compares with its, paired by seed.

    earlier, tied, later: seeds in which the detector leads by more, as much, less; mean_steps: mean difference;
    low, high: its 95 % BCa interval over seeds, NaN under 10; p: one-sided sign-flip test that the detector leads
    (``inference.max_t_test``, each pair by itself), at least smallest_p. Raises ValueError for an unknown detector, for
    one against itself or named twice, and where there is no other.
    """
    for name in (detector, *against):
        if name not in leads_SD:
            near = get_close_matches(name, leads_SD.columns, n=1) or sorted(leads_SD.columns)
            raise ValueError(f"detector {name!r} is not in the table: did you mean {near[0]!r}?")
    if detector in against:
        raise ValueError(f"against={detector!r} is not allowed: no detector is compared with itself")
    check_distinct(against, "against")
    rivals = against or tuple(leads_SD.columns.drop(detector))
    if not rivals:
        raise ValueError(f"detector {detector!r} is alone in the table: there is no other to compare it with")
    rows = []
    for rival in rivals:
        difference = (leads_SD[detector] - leads_SD[rival]).dropna().to_numpy()
        low, high = bca_interval(difference, np.ones(len(difference)))
        test = max_t_test(difference[:, None])
        earlier, later = int((difference > 0).sum()), int((difference < 0).sum())
        counts = {"seeds": len(difference), "earlier": earlier, "tied": len(difference) - earlier - later}
        sizes = {"later": later, "mean_steps": difference.mean(), "low": low, "high": high}
        rows.append(
            {"against": rival, **counts, **sizes, "p": float(test.p_adjusted_D[0]), "smallest_p": test.smallest_p}
        )
    return pd.DataFrame(rows).sort_values("mean_steps", ignore_index=True)


def main(arguments: list[str]) -> None:
    show_help(arguments, __doc__)
    given = dict(argument.split("=", 1) for argument in arguments if "=" in argument)
    if not {"table", "detector"} <= set(given) <= OPTIONS or len(given) != len(arguments):
        misused("python -m analysis.order table=FILE.csv detector=NAME [against=A,B] [fault=] [model=] [track=]")
    chosen, where = DEFAULTS | given, f"table={given['table']}"
    try:
        table = read_table(Path(given["table"]), where, COLUMNS)
    except ValueError as error:
        fail(str(error))
    try:
        table = leads(table, chosen["fault"], chosen.get("model"), chosen["track"])
        comparison = order_table(table, given["detector"], tuple(filter(None, given.get("against", "").split(","))))
    except ValueError as error:
        fail(f"{where}: {error}")
    print(f"{given['detector']} against others, {chosen['fault']}: paired differences of restricted leads")
    print(comparison.to_string(index=False, float_format="{:.4g}".format))


if __name__ == "__main__":
    main(sys.argv[1:])
