"""What river's drift detectors may be told: the keys of their files in conf/rule, with ranges that river lacks."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from pydantic import Field

from experiments.validation import Node, check_node


class Adwin(Node):
    delta: float = Field(default=0.002, gt=0, lt=1)
    clock: int = Field(default=32, ge=1)
    max_buckets: int = Field(default=5, ge=1)
    min_window_length: int = Field(default=5, ge=1)
    grace_period: int = Field(default=10, ge=1)


class PageHinkley(Node):
    min_instances: int = Field(default=30, ge=1)
    delta: float = Field(default=0.005, ge=0)
    threshold: float = Field(default=50.0, gt=0)
    alpha: float = Field(default=0.9999, gt=0, le=1)
    mode: Literal["up", "down", "both"] = "both"


class KSWIN(Node):
    alpha: float = Field(default=0.005, gt=0, lt=1)
    window_size: int = Field(default=100, ge=2)
    stat_size: int = Field(default=30, ge=1)
    seed: int | None = Field(default=None, ge=0)


SETTINGS = {"adwin": Adwin, "page_hinkley": PageHinkley, "kswin": KSWIN}


def check_river(name: str, parameters: Mapping[str, Any]) -> None:
    """Raises ValueError, in one line that names the key, where a parameter of ``SETTINGS[name]`` is not allowed."""
    check_node(SETTINGS[name], dict(parameters), "rule")
