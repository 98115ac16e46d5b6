"""The settings of a command itself: where its files go, and what it does besides training."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import InterpolationResolutionError
from pydantic import AfterValidator, ConfigDict, Field, field_validator
from pydantic_core import PydanticCustomError

from foreshock.experiments.places import check_no_file
from foreshock.experiments.validation import Distinct, Node, check_node, check_value, nearest


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

BY_NAME: dict[str, Any] = {
    "onset": Onset,
    "ramp_steps": Onset,
    "rows": Annotated[int, Field(ge=0)],
    "seeds": Annotated[int, Field(ge=1, le=1000)],
    "batch_steps": dict[str, Steps],
    "grid_steps": dict[str, Steps],
}
"""What a size of this name may be, in any experiment."""

BY_ENDING: dict[str, Any] = {
    "steps": Steps,
    "seeds": Annotated[int, Field(ge=0, le=1000)],
    "monitors": Annotated[Distinct, Field(min_length=1)] | None,
}
"""What a size may be whose name is none of these but ends so."""


def check_sizes(sizes: Mapping[str, Any], where: str) -> None:
    """Judge an experiment's sizes by the names of their keys, at any depth; a size of another name may be anything.

    Raises ValueError, in one line that names the key.
    """
    for key, value in sizes.items():
        place = f"{where}.{key}"
        kind = BY_NAME.get(key) or next((kind for ending, kind in BY_ENDING.items() if key.endswith(ending)), None)
        if kind is not None:
            check_value(kind, value, place)
        elif isinstance(value, Mapping):
            check_sizes(value, place)


class Scale(Node):
    """The keys of ``conf/scale`` that all experiments share; beside them stand the sizes of the experiment at hand."""

    model_config = ConfigDict(strict=True, extra="allow", allow_inf_nan=False)
    sizes: Annotated[str, Field(min_length=1)]
    dense: Model
    moe: Model
    untied: Model
    attention_bits: Annotated[int, Field(ge=0, le=8)]


JUDGED_BY_SCORING = ("name", "alpha", "seeds", "moe_seeds")
"""Keys of a scale that ``analysis.runs.index`` judges."""


def _some_run_at_a_time(count: int) -> int:
    if count == 0 or count < -1:
        raise PydanticCustomError("no_run", "at least 1, or -1 for a run on every core")
    return count


AtOnce = Annotated[int, AfterValidator(_some_run_at_a_time)]
"""How many runs a machine trains at a time."""


class ReproduceCommand(TrainCommand):
    """The keys of ``conf/reproduce.yaml`` beside its groups, and its scale."""

    report: str
    align: str | None
    score_only: bool
    at_once: AtOnce
    scale: Scale


class CampaignCommand(TrainCommand):
    """The keys of ``conf/campaign.yaml`` beside its groups."""

    report: str
    at_once: AtOnce
    n: Annotated[int, Field(ge=1, le=10_000)]


def check_command(schema: type[TrainCommand], settings: Mapping[str, Any]) -> None:
    """Raises ValueError, in one line that names the key. settings: the composed configuration, resolved."""
    own = {key: settings[key] for key in schema.model_fields if key in settings}
    check_node(schema, own, "")
    for key in ("out", "report"):
        if key in own:
            check_no_file(own[key], key)
    if "scale" not in own:
        return
    scale, shared = settings["scale"], (*Scale.model_fields, *JUDGED_BY_SCORING)
    check_sizes({key: value for key, value in scale.items() if key not in shared}, "scale")
    check_sizes(settings["sizes"] or {}, f"sizes_by_scale.{scale['sizes']}")


def resolved(config: DictConfig) -> dict[str, Any]:
    """A composed configuration of an experiment as plain values.

    Raises ValueError, in one line, where the experiment has no sizes for its scale.
    """
    try:
        settings: Any = OmegaConf.to_container(config, resolve=True)
    except InterpolationResolutionError:
        _check_row(config)
        raise
    return settings


def _check_row(config: DictConfig) -> None:
    """Raises ValueError where the experiment's table has no row for the scale, or the row lacks what another has."""
    rows, name, experiment = config.sizes_by_scale, config.scale.sizes, config.experiment.name
    keys = list(dict.fromkeys(str(key) for row in rows.values() for key in row))
    if rows and name not in rows:
        example = ", ".join(f"{key}: ..." for key in keys)
        raise ValueError(
            f"scale.sizes={name!r} is not allowed: {experiment} has sizes for {', '.join(rows)}{nearest(name, rows)}; "
            f"name one of these, or add '+sizes_by_scale.{name}={{{example}}}'"
        )
    lacking = next((key for key in keys if key not in rows[name]), None)
    if lacking is not None:
        raise ValueError(f"sizes_by_scale.{name}.{lacking} is missing: {experiment} needs it at every scale")
