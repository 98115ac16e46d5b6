"""Objects of ``conf/`` without Hydra, for machines that have PyTorch and PyYAML alone.

A file's ``_target_`` is called with its other keys, lists as tuples. Keys and types are checked where a run is built
(``experiments.build``), not here.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from foreshock.experiments.targets import check_targets, target_class

CONF = Path(__file__).resolve().parent.parent / "conf"


def read(group: str, name: str) -> dict[str, Any]:
    """The keys of ``conf/<group>/<name>.yaml`` over those of the files of the group that it names in ``defaults``."""
    own = yaml.safe_load((CONF / group / f"{name}.yaml").read_text())
    merged: dict[str, Any] = {}
    for base in own.pop("defaults", ()):
        merged |= read(group, base)
    return merged | own


def class_of(group: str, node: Mapping[str, Any]) -> type:
    """The class of a node of ``conf/<group>``."""
    check_targets({group: node})
    return target_class(node["_target_"], "_target_")


def construct(group: str, name: str, /, **changes: Any) -> Any:
    """The object that ``conf/<group>/<name>.yaml`` describes, ``changes`` in place of its values."""
    node = read(group, name) | changes
    cls = class_of(group, node)
    fields = dataclasses.fields(cls) if dataclasses.is_dataclass(cls) else ()
    field_of = {field.metadata.get("key", field.name): field.name for field in fields}
    arguments = {field_of.get(key, key): value for key, value in node.items() if key != "_target_"}
    return cls(**{key: tuple(value) if isinstance(value, list) else value for key, value in arguments.items()})


def monitors_of(experts: bool) -> dict[str, Any]:
    """Every monitor of ``conf/monitor`` that our loop fills in FP32; those of experts only for a model with them."""
    names = sorted(path.stem for path in (CONF / "monitor").glob("*.yaml"))
    monitors = {name: construct("monitor", name) for name in names}
    ours = {name: one for name, one in monitors.items() if not (one.needs.attached or one.needs.scaled)}
    return {name: monitor for name, monitor in ours.items() if experts or "router" not in monitor.needs.roles}
