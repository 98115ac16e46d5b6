"""What an experiment says of its scoring, and its index ``experiment.json``, with every key held against its range."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, ConfigDict, Field

from foreshock.analysis.runs import reduced
from foreshock.analysis.runs.align import Axis
from foreshock.experiments import trace
from foreshock.experiments.files import unsealed
from foreshock.experiments.names import check_index_names
from foreshock.experiments.targets import check_plugins
from foreshock.experiments.validation import (
    Distinct,
    Node,
    OneOrSeveral,
    check_mapping,
    check_named,
    check_node,
    distinct,
)

Name = Field(min_length=1)
Names = list[str]
Several = Annotated[Distinct, Field(min_length=1)]
Axes = Annotated[list[Axis], AfterValidator(distinct), Field(min_length=1)]


class Label(Node):
    """Divergence from the held-out loss: the keys of ``conf/label`` (``analysis.runs.labels``)."""

    ema_span: int = Field(ge=1)
    min_drawup_nats: float = Field(gt=0)
    healthy_factor: float = Field(ge=0)
    consecutive: int = Field(ge=1)


class Rule(Node):
    """The keys of ``conf/rule``; a chart's own are checked where it is made (``analysis.detect.rules.make_rule``)."""

    model_config = ConfigDict(strict=True, extra="allow")
    chart: str = Name


class Seeds(Node):
    """How many runs each role has."""

    reference: int = Field(default=0, ge=0, le=1000)
    calibration: int = Field(default=0, ge=0, le=1000)
    test: int = Field(default=0, ge=0, le=1000)
    faulty: int = Field(default=0, ge=0, le=1000)


class Scale(Node):
    """The keys of ``conf/scale`` that scoring reads. The others are sizes that runs' overrides take up."""

    model_config = ConfigDict(strict=True, allow_inf_nan=False, extra="allow")
    name: str = Name
    alpha: float = Field(gt=0, lt=1)
    seeds: Seeds | None = None
    moe_seeds: Seeds | None = None


class Fault(Node):
    """A fault of an experiment: its name for people, the overrides that switch it on, its cell in a grid, its dose."""

    label: str = Field(default="its name", min_length=1)
    overrides: Names | None = Field(default=None, min_length=1)
    cell: list[float] | None = Field(default=None, min_length=2, max_length=2)
    dose: float | None = None


class Panel(Node):
    """A panel of a figure: signals and how they become one curve."""

    signals: Several
    reduce: Literal["worst", "mean"] = "worst"
    log: bool = False
    above_healthy: bool = False


class Alarms(Node):
    detector: str
    fault: str
    should: bool


class Claim(Node):
    """One sentence of a paper and its test (``analysis.scores.claims``)."""

    says: str
    alarms: Alarms | None = None
    falls: Distinct | None = None
    rises: Distinct | None = None
    panel: Panel | None = None
    align: Axis | None = None
    model: str | None = None


class Settings(Node):
    """The keys of ``conf/experiment``."""

    name: str = Name
    title: str = Name
    models: Several
    align: Axes
    faults: dict[str, Fault]
    detectors: dict[str, Several] = Field(min_length=1)
    baseline: OneOrSeveral
    figure: dict[str, Panel]
    draw: str | None = None
    overrides: Names = Field(default_factory=list)
    claims: list[Claim] = Field(default_factory=list)
    seeds: Seeds | None = None
    monitors: Several | None = None
    headline: Distinct = Field(default_factory=list)
    score_every: int = Field(default=1, ge=1)
    family: str | None = None
    groups: Distinct = Field(default_factory=list)
    should_ignore: dict[str, Distinct] = Field(default_factory=dict)
    cost_faults: Distinct = Field(default_factory=list)
    controls: Distinct = Field(default_factory=list)
    control: str | None = None
    drift: Distinct = Field(default_factory=list)
    doses: bool = False
    dose: str | None = None
    healthy_cell: list[float] | None = Field(default=None, min_length=2, max_length=2)


class Case(Node):
    """A case of an experiment whose runs are judged each by itself."""

    label: str = Name
    model: str | None = None
    seeds: int | None = Field(default=None, ge=0, le=1000)
    overrides: Names = Field(default_factory=list)


class CaseSettings(Node):
    """The keys of a ``conf/experiment`` with cases (``analysis.scores.cases``)."""

    name: str = Name
    title: str = Name
    models: Annotated[Distinct, Field(min_length=1, max_length=1)]  # a case may name another
    align: Axes
    draw: Literal["cases"]
    overrides: Names = Field(default_factory=list)
    seeds: int = Field(ge=1, le=1000)
    cases: dict[str, Case] = Field(min_length=1)
    laws: dict[str, str] = Field(min_length=1)


class Cell(Node):
    """A run of an index."""

    model_config = ConfigDict(strict=True, extra="allow")
    run_id: str = Name
    model: str
    role: Literal["reference", "calibration", "test", "faulty", "case"]
    fault: str | None
    seed: int = Field(ge=0)


def check_parts(index: Mapping[str, Any]) -> None:
    """Raises ValueError, in one line that names the key, where a part is not as its schema has it."""
    experiment: Any = index.get("experiment")
    check_mapping(experiment, "experiment")
    parts: dict[str, type[Node]] = {"experiment": CaseSettings if "cases" in experiment else Settings}
    for part, schema in (parts | {"scale": Scale, "label": Label, "rule": Rule}).items():
        check_node(schema, index.get(part), part)


def read_index(folder: Path) -> dict[str, Any]:
    """The content of a folder's ``experiment.json``. Raises TraceError, in one line, where it is missing or none."""
    path = folder / reduced.INDEX
    if not path.exists():
        raise trace.TraceError(f"{path} does not exist: run experiments.reproduce first")
    try:
        index = unsealed(reduced.content(folder, reduced.INDEX))
    except ValueError as error:
        raise trace.TraceError(f"{path} is damaged ({error}): the command that made it writes it again") from None
    try:
        check_parts(index)
        faults = index["experiment"].get("cases") or index["experiment"]["faults"]
        if not isinstance(index.get("runs"), list):
            raise ValueError("runs is no list")
        for number, cell in enumerate(index["runs"]):
            check_node(Cell, cell, f"runs.{number}")
            check_named([cell["fault"]], (None, *faults), f"runs.{number}.fault")
        if "report_kind" in index:
            check_mapping(index["report_kind"], "report_kind")
            check_plugins(index.get("plugins"))
        check_index_names(index)
    except ValueError as error:
        raise trace.TraceError(f"{path} is no index of an experiment: {error}") from None
    return index
