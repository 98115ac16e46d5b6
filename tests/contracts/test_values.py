"""Every leaf of conf/ refuses values that make no sense, in one line that names it, before anything is trained."""

import copy
import functools
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import SimpleNamespace

import pytest
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from experiments.build import build_run
from experiments.cli import CONF
from experiments.reproduce import chosen_experiment
from experiments.scoring import check_settings
from experiments.settings import ReproduceCommand, check_command
from experiments.trace import TraceError

BAD = (None, "", -1, 0, float("nan"), float("inf"), 1e300, "x", [], [1], 10**29, {"a": 1})
RUN_GROUPS = ("data", "fault", "model", "train")
EXPERIMENTS = ("early_warning", "natural_bf16", "paper_router_batch", "paper_router_grid", "reference_set_dense")
"""Between them they have every key of an experiment that is scored."""


def options(group: str) -> list[str]:
    return sorted(path.stem for path in (Path(CONF) / group).glob("*.yaml"))


@functools.cache
def composed(config: str, *overrides: str) -> dict:
    with initialize_config_dir(CONF, version_base="1.3"):
        return OmegaConf.to_container(compose(config, list(overrides)), resolve=True)


def leaves(node: Mapping, path: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    """Paths to every value of a node; of names that are the user's own, the first."""
    for index, (key, value) in enumerate(node.items()):
        if index and path[-1:] in (("faults",), ("detectors",), ("figure",), ("should_ignore",), ("cases",), ("laws",)):
            return
        if isinstance(value, Mapping) and value:
            yield from leaves(value, (*path, key))
        elif key != "_target_":
            yield (*path, key)


def changed(node: Mapping, path: tuple[str, ...], value: object) -> dict:
    node = copy.deepcopy(node)
    place = functools.reduce(lambda at, key: at[key], path[:-1], node)
    place[path[-1]] = value
    return node


def corpus(config, context_length) -> SimpleNamespace:
    return SimpleNamespace(vocab_size=256, digest="d")


def refusal(check, node: Mapping, path: tuple[str, ...], value: object) -> str | None:
    """What is said of a changed value, or None where it is taken. Any other error is a failure of the test."""
    try:
        check(changed(node, path, value))
    except (ValueError, OSError, TraceError) as error:
        return str(error)
    return None
