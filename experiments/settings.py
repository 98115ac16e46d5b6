"""The settings of a command itself: where its files go, and what it does besides training."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import ConfigDict, field_validator
from pydantic_core import PydanticCustomError

from experiments.validation import Node, check_node


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


class ReproduceCommand(TrainCommand):
    """The keys of ``conf/reproduce.yaml`` beside its groups."""

    report: str
    align: str | None
    score_only: bool
    at_once: int


def check_command(schema: type[TrainCommand], settings: Mapping[str, Any]) -> None:
    """Raises ValueError, in one line that names the key. settings: the composed configuration, resolved."""
    own = {key: settings[key] for key in schema.model_fields if key in settings}
    check_node(schema, own, "")
