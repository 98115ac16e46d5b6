"""Which classes a configuration may name: those that the project, or a module listed as a plugin, defines itself.

``_target_`` is text from a command line or a file. Without this check ``fault._target_=subprocess.Popen`` would start a
process.
"""

from __future__ import annotations

import difflib
import importlib
from collections.abc import Collection, Iterator, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import yaml

from foreshock.experiments.validation import check_distinct
from foreshock.names import importable, short

PACKAGES = {
    "fault": ("faults",),
    "model": ("models",),
    "monitor": ("monitors",),
    "data": ("experiments",),
    "train": ("experiments",),
    "track": ("analysis.detect.tracks",),
    "report_kind": ("analysis.reports.kinds",),
}
"""By group of the configuration, the project's own packages whose classes it may name. A class is called before it is
known to be of the right kind, so that a group takes none of a package that may start a process."""

CONF = Path(__file__).resolve().parent.parent / "conf"


def check_targets(config: Mapping[str, Any], plugins: Sequence[str] = ()) -> None:
    """Check every ``_target_`` of a configuration, at any depth, before any of them is imported; then import each.

    plugins: modules outside the project whose classes are allowed too. Raises ValueError that names the field, its
    value and what is allowed.
    """
    check_plugins(plugins)
    targets = list(_targets(config))
    for where, target in targets:
        module = target.rpartition(".")[0] if isinstance(target, str) else ""
        own = PACKAGES.get(where.split(".")[0], ())
        allowed = " or ".join((*own, f"a module in plugins={list(plugins)}"))
        if not _is_within(module, (*own, *plugins)):
            raise ValueError(f"{where}={target!r} is not allowed: a class of {allowed}{_nearest(target)}")
    for where, target in targets:
        target_class(target, where)


def check_plugins(plugins: Any) -> None:
    """Raises ValueError where ``plugins`` is no list of distinct names of modules."""
    if not isinstance(plugins, (list, tuple)) or not all(map(_is_module_name, plugins)):
        raise ValueError(f"plugins={plugins!r} is not allowed: a list of module names, such as [my_faults]")
    check_distinct(plugins, "plugins")


def target_class(target: str, where: str) -> type:
    """The class of a ``_target_`` that ``check_targets`` allows. Raises ValueError unless its module defines it.

    What a module has merely imported from elsewhere is not its own; a package may pass on what its modules define.
    """
    module, _, name = target.rpartition(".")
    try:
        found = getattr(importlib.import_module(importable(module)), name)
    except Exception as error:  # a plugin may raise anything
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise ValueError(f"{where}={target!r} cannot be loaded: {reason}{_nearest(target)}") from None
    if not isinstance(found, type) or not _is_within(short(found.__module__), (module,)):
        raise ValueError(f"{where}={target!r} is not allowed: {module} defines no class {name}{_nearest(target)}")
    return found


def _is_module_name(name: Any) -> bool:
    return isinstance(name, str) and all(part.isidentifier() for part in name.split("."))


def _is_within(name: str, packages: Collection[str]) -> bool:
    return any(name == package or name.startswith(f"{package}.") for package in packages)


def _targets(node: Any, where: str = "") -> Iterator[tuple[str, Any]]:
    children = node.items() if isinstance(node, Mapping) else enumerate(node) if isinstance(node, (list, tuple)) else ()
    for key, child in children:
        path = f"{where}.{key}".lstrip(".")
        if key == "_target_":
            yield path, child
        else:
            yield from _targets(child, path)


@lru_cache(maxsize=1)
def _known() -> tuple[str, ...]:
    """Every ``_target_`` of the files in conf/."""
    files = sorted(CONF.rglob("*.yaml"))
    return tuple(dict.fromkeys(target for file in files for _, target in _targets(yaml.safe_load(file.read_text()))))


def _nearest(target: Any) -> str:
    close = difflib.get_close_matches(str(target), _known(), n=1, cutoff=0.7)
    return f" (did you mean {close[0]!r}?)" if close and close[0] != target else ""
