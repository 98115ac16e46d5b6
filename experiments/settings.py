"""The settings of a command itself: where its files go, and what it does besides training."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import ConfigDict, Field, field_validator
from pydantic_core import PydanticCustomError

from foreshock.experiments.validation import Distinct, Node, check_node


class TrainCommand(Node):
    """The keys of ``conf/config.yaml`` beside its groups."""

    model_config = ConfigDict(strict=True, extra="allow")
    out: str
    dry_run: bool
    quiet: bool

    @field_validator("out", "report", check_fields=False)
    @classmethod
    def _names_a_folder(cls, folder: str) -> str:
        if not folder.strip():
            raise PydanticCustomError("no_folder", "a folder, '.' for the working directory")
        return folder


Steps = Annotated[int, Field(ge=1)]
Onset = Annotated[int, Field(ge=0)]
Model = Annotated[str, Field(min_length=1)]


class Ramp(Node):
    """A ramped fault; with the length of its runs where they have one of their own."""

    steps: Steps = 1
    onset: Onset
    ramp_steps: Onset


class Delayed(Node):
    """The length of runs, and when their fault begins."""

    steps: Steps
    onset: Onset


class ReferenceSet(Node):
    steps: Steps
    ramp: Ramp


class Localise(Delayed):
    every_steps: Steps
    rows: Annotated[int, Field(ge=0)]


class Length(Node):
    steps: Steps


class Zoo(Length):
    seeds: Annotated[int, Field(ge=1, le=1000)]
    slow_seeds: Annotated[int, Field(ge=0, le=1000)]
    fault_seeds: Annotated[int, Field(ge=0, le=1000)]


class Sizes(Node):
    """The keys of ``conf/scale`` that experiments take up in their overrides."""

    model_config = ConfigDict(strict=True, extra="allow", allow_inf_nan=False)
    dense: Model
    moe: Model
    untied: Model
    attention_steps: Steps
    attention_monitors: Annotated[Distinct, Field(min_length=1)] | None
    attention_bits: Annotated[int, Field(ge=0, le=8)]
    router_steps: Steps
    combined_steps: Steps
    router_ramp: Ramp
    ramp: Ramp
    batch_steps: dict[str, Steps]
    grid_steps: dict[str, Steps]
    reference_set: ReferenceSet
    early_warning: Delayed
    localise: Localise
    smallest_fault: Delayed
    natural_bf16: Length
    healthy_zoo: Zoo


class ReproduceCommand(TrainCommand):
    """The keys of ``conf/reproduce.yaml`` beside its groups, and the sizes of its scale."""

    report: str
    align: str | None
    score_only: bool
    at_once: int
    scale: Sizes

    @field_validator("at_once")
    @classmethod
    def _some_run_at_a_time(cls, count: int) -> int:
        if count == 0:
            raise PydanticCustomError("no_run", "at least 1, or -1 for a run on every core")
        return count


def check_command(schema: type[TrainCommand], settings: Mapping[str, Any]) -> None:
    """Raises ValueError, in one line that names the key. settings: the composed configuration, resolved."""
    own = {key: settings[key] for key in schema.model_fields if key in settings}
    check_node(schema, own, "")
