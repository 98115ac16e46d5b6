"""What differs between two runs by their manifests: settings, data, sources, libraries."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from foreshock.analysis.runs.checks import flat
from foreshock.experiments import trace

COMMIT = "git_commit"
COMPARED = ("data_sha256", "sources", "fault_sha256", "versions", "device", trace.ATTACHED, COMMIT)
"""Keys of a manifest beside its configuration."""
IGNORED = ("seed", "monitor", "train.steps", "train.checkpoint_every_steps")
"""Keys of a configuration that change nothing that a canary is to find."""
NONE = "none"


class Change(NamedTuple):
    key: str
    before: str
    after: str


def changes(before: Mapping[str, Any], after: Mapping[str, Any]) -> list[Change]:
    """By key, what two manifests have otherwise; ``none`` where one of them lacks it."""
    left, right = (flat({"config": side["config"], **_present(side)}) for side in (before, after))
    keys = [key for key in dict.fromkeys([*left, *right]) if not _ignored(key)]
    found = [Change(key, str(left.get(key, NONE)), str(right.get(key, NONE))) for key in keys]
    return [change for change in found if change.before != change.after]


def _present(manifest: Mapping[str, Any]) -> dict[str, Any]:
    return {key: manifest[key] for key in COMPARED if manifest.get(key) is not None}


def _ignored(key: str) -> bool:
    own = key.removeprefix("config.")
    return own != key and any(own == name or own.startswith(f"{name}.") for name in IGNORED)
