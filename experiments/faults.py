"""The faults that a run can have: foreshock faults

foreshock faults                        a line for each
foreshock faults family=data            of a family; point=batch: at a point of the step; needs=experts
foreshock faults clip_scope             one fault whole: what breaks, its equation, its report, its keys
foreshock faults markdown=docs/faults.md
"""

from __future__ import annotations

import csv
import inspect
import re
import sys
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, fields
from functools import cache
from pathlib import Path
from typing import Any

import torch
import yaml
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from omegaconf import OmegaConf
from rich.console import Console
from rich.table import Table

from foreshock.experiments.build import ROOT, construct
from foreshock.experiments.cli import CONF, options
from foreshock.experiments.files import write_whole
from foreshock.experiments.places import check_file_to_write
from foreshock.experiments.training.train_config import TrainConfig
from foreshock.experiments.usage import fail, show_help
from foreshock.experiments.validation import check_named
from foreshock.faults.base import Fault, WindowedFault
from foreshock.faults.fit import check_fits
from foreshock.models.transformer import TransformerConfig

NEEDS = {
    "": [],
    "ties": ["model.tie_embeddings=true"],
    "dropout": ["model.dropout=0.1"],
    "experts": ["model=moe_nano"],
    "RoPE": ["model.positions=rope"],
    "grouped heads": ["model=gqa_nano"],
    "micro-batches": ["train.micro_batch=4"],
    "FP16": ["train.precision=fp16"],
}
"""By what a fault needs, the overrides of a run that has it; the first that a fault fits is what it needs."""
WITHOUT_ANY = ["model.tie_embeddings=false"]
"""The overrides of a run that has none of these: a default model has ties."""
STEPS = "train.steps=400"
"""A run in which every fault begins: each of its steps is checked."""
NOTHING = "none"
OUTCOMES = ROOT / "results" / "fault_outcomes" / "outcomes.csv"
"""What ``foreshock campaign campaign=outcomes`` wrote."""
FILTERS = ("family", "point", "needs")
WINDOW = ("_target_", "family", *(field.name for field in fields(WindowedFault)))
"""Keys of a fault that every fault has."""


@dataclass(frozen=True)
class Row:
    """One file of ``conf/fault``. what: its first comment; points: of the step, fields of ``faults.base.Sites``.

    node: its configuration; parameters: its own keys with their values; doses: of those keys, the weakest first; needs:
    of ``NEEDS``; report: the public report that its docstring names.
    """

    name: str
    family: str
    what: str
    points: tuple[str, ...]
    node: Mapping[str, Any]
    parameters: Mapping[str, Any]
    doses: Sequence[Mapping[str, Any]]
    needs: str
    report: str
    text: str

    @property
    def said_parameters(self) -> str:
        return said_keys(self.parameters)

    @property
    def said_doses(self) -> str:
        return "; ".join(said_keys(dose) for dose in self.doses)


def rows() -> list[Row]:
    """Every fault of ``conf/fault`` that does something, by family and name."""
    initialised = GlobalHydra.instance().is_initialized()
    with nullcontext() if initialised else initialize_config_dir(CONF, version_base="1.3"):
        found = [_row(name) for name in options("fault") if name != NOTHING]
    return sorted(found, key=lambda row: (row.family, row.name))


def _row(name: str) -> Row:
    node = _node(name)
    fault: Fault = construct(node, "fault")
    _check_doses(name, node)
    card = fault.describe()
    points = dict.fromkeys(str(injection.where.get("point", "numerics")) for injection in card.injections)
    text = inspect.getdoc(type(fault)) or ""
    return Row(
        name=name,
        family=card.family,
        what=(Path(CONF) / "fault" / f"{name}.yaml").read_text(encoding="utf-8").splitlines()[0].lstrip("# "),
        points=tuple(points),
        node=node,
        parameters={key: value for key, value in node.items() if key not in (*WINDOW, "faults")},
        doses=node.get("doses", ()),
        needs=_needed(fault),
        report=_report(text),
        text=text,
    )


def _check_doses(name: str, node: Mapping[str, Any]) -> None:
    """Raise ValueError for a dose that the fault cannot have."""
    for dose in node.get("doses", ()):
        try:
            construct({**node, **dose}, "fault")
        except ValueError as error:
            raise ValueError(f"conf/fault/{name}.yaml: doses: {said_keys(dose)}: {error}") from None


def _node(name: str) -> dict[str, Any]:
    """The configuration of a fault; Hydra composes those that are made of others, which takes it a while."""
    node: Any = yaml.safe_load((Path(CONF) / "fault" / f"{name}.yaml").read_text(encoding="utf-8"))
    if "defaults" in node:
        node = OmegaConf.to_container(compose("config", [f"fault={name}"]).fault, resolve=True)
    return dict(node)


def _needed(fault: Fault) -> str:
    """The first of ``NEEDS`` whose run can have the fault. Raises ValueError where none can."""
    for needs in NEEDS:
        try:
            check_fits(fault, *_run(needs))
        except ValueError as error:
            last = error
        else:
            return needs
    raise ValueError(f"no run of this list can have the fault: {last}")


@cache
def _run(needs: str) -> tuple[TransformerConfig, TrainConfig]:
    config: Any = OmegaConf.to_container(compose("config", [*(NEEDS[needs] or WITHOUT_ANY), STEPS]), resolve=True)
    model: TransformerConfig = construct(config["model"], "model").on(torch.device("cpu"))
    train: TrainConfig = construct(config["train"], "train")
    return model, train


def _report(text: str) -> str:
    """What follows ``Report:`` in a docstring, to the end of its sentence; empty where there is none."""
    flat = " ".join(text.split())
    found = re.search(r"Reports?(?: of [\w ]+)?: (.+?)(?:\.(?= [A-Z`])|\.$|$)", flat)
    return found[1] if found else ""


def said_keys(keys: Mapping[str, Any]) -> str:
    """Keys and values as a command line has them."""
    return ", ".join(f"{key}={said(value)}" for key, value in keys.items())


def said(value: Any) -> str:
    """A value as a command line has it."""
    if isinstance(value, list):
        return f"[{','.join(map(said, value))}]"
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


def known_outcomes() -> dict[str, str]:
    """By fault, what became of its runs in the committed campaign at its largest dose; empty without that table."""
    if not OUTCOMES.exists():
        return {}
    with OUTCOMES.open(encoding="utf-8", newline="") as file:
        return {row["fault"]: _outcome(row) for row in csv.DictReader(file)}


def _outcome(row: Mapping[str, str]) -> str:
    better = f"; better than healthy {row['better']}" if int(row["better"]) else ""
    excess = "not finite" if row["excess"] == "inf" else f"{float(row['excess']):+.2f} nats"
    return f"{row['outcome']}{better} ({excess})"


def markdown(found: Sequence[Row]) -> str:
    """A page of all faults, a table for each family."""
    ends = known_outcomes()
    lines = [
        "# Faults",
        "",
        "What `fault=NAME` does. Made by `foreshock faults markdown=docs/faults.md`; a test compares it.",
        "",
        "Outcomes are those of `foreshock campaign campaign=outcomes` (`results/fault_outcomes`): the largest dose",
        "from step 100 on, or from the onset of the fault's file where it acts at the start alone; 300 steps of a nano",
        "model, 5 seeds against 5 healthy twins; in brackets the median loss above the healthy one.",
        "`analysis/runs/outcomes.py` defines the words. So few steps show what is soon fatal; what is slow has no",
        "effect here.",
    ]
    for family in dict.fromkeys(row.family for row in found):
        members = [row for row in found if row.family == family]
        lines += ["", f"## {family.replace('_', ' ').capitalize()}", ""]
        lines += [
            "| fault | what goes wrong | point of the step | keys and defaults | doses | needs | report | outcome |",
            "|---|---|---|---|---|---|---|---|",
        ]
        lines += [
            f"| `{row.name}` | {row.what} | {', '.join(row.points)} | {_code(row.said_parameters)} | "
            f"{_code(row.said_doses)} | {row.needs} | {row.report} | "
            f"{ends.get(row.name, '')} |"
            for row in members
        ]
    return "\n".join([*lines, ""])


def _code(text: str) -> str:
    return f"`{text}`" if text else ""


def show(found: Sequence[Row], console: Console) -> None:
    table = Table(box=None, pad_edge=False)
    for title in ("family", "fault", "point", "needs", "what goes wrong"):
        table.add_column(title, no_wrap=title != "what goes wrong")
    for row in found:
        table.add_row(row.family, row.name, ", ".join(row.points), row.needs, row.what)
    console.print(table)
    console.print(f"{len(found)} faults; foreshock faults NAME says more of one")


def show_one(row: Row, console: Console) -> None:
    console.print(f"fault={row.name}\n\n{row.text}\n", markup=False)
    console.print((Path(CONF) / "fault" / f"{row.name}.yaml").read_text(encoding="utf-8"), markup=False)


def chosen(found: Sequence[Row], filters: Mapping[str, str]) -> list[Row]:
    """The faults that every filter lets through. Raises ValueError for a value that no fault has."""
    known = {
        "family": {row.family for row in found},
        "point": {point for row in found for point in row.points},
        "needs": {row.needs or NOTHING for row in found},
    }
    for key, value in filters.items():
        check_named([value], sorted(known[key]), key)
    return [
        row
        for row in found
        if filters.get("family", row.family) == row.family
        and filters.get("point", row.points[0]) in row.points
        and filters.get("needs", row.needs or NOTHING) == (row.needs or NOTHING)
    ]


def main(arguments: Sequence[str]) -> None:
    show_help(arguments, __doc__)
    names = [argument for argument in arguments if "=" not in argument]
    given = dict(argument.split("=", 1) for argument in arguments if "=" in argument)
    console = Console(highlight=False, soft_wrap=True)
    try:
        check_named(given, (*FILTERS, "markdown"), "option")
        check_named(names, [name for name in options("fault") if name != NOTHING], "fault")
        table = check_file_to_write(given["markdown"], "markdown") if "markdown" in given else None
        found = rows()
        if table is not None:
            write_whole(table, markdown(found).encode())
            console.print(f"{given['markdown']}: {len(found)} faults")
        elif names:
            for row in found:
                if row.name in names:
                    show_one(row, console)
        else:
            show(chosen(found, given), console)
    except (ValueError, OSError) as error:
        fail(str(error))


if __name__ == "__main__":
    main(sys.argv[1:])
