"""What determines a run's trajectory, and what determines a monitor's readings of it.

A trajectory is the sequence of a run's weights. Its identity covers the model, the content of the data, the training,
the fault, the seed, PyTorch's version, and what the sources that train this run do: the engine, the optimizer, the
data, the models, the value classes of ``faults.base``, and this fault's own module wherever it lies, with what that
imports from beside it. Monitors, the watch and analysis are not in it: they change no bit of training, so that a new
monitor, a new fault or a docstring renames no run.

An observation is what one monitor reads of one trajectory. Its identity covers the monitor's configuration, its module
and the mathematics that the module imports, the jitter of the steps at which it reads, if any, and the trajectory.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any

from foreshock.experiments.training.source_code import ROOT, closure_of, digest_of, path_of
from foreshock.faults.base import LABELS
from foreshock.faults.card import BENIGN
from foreshock.monitors.cadence import JITTER_STEPS, Cadence

ENGINE = ("clipping", "engine", "gradients", "optimizer", "train_config", "data", "repetition", "early_end")
SINGLE, STACKED = ("single_engine", "loss_scaler"), ("stacked_engine", "stacked_optimizer")
INSTRUMENTS = ("anatomy", "taps", "stacked_taps", "recomputing", "products", "objective")
"""Modules of ``models`` that look at a step and change nothing of it, as do those of ``models/anatomies``."""
TRITON = ("flash*", "tiles")
"""Modules of ``models`` that a run on another backend does not use."""

CONTRACT = (
    "monitors.base",
    "monitors.cadence",
    "monitors.choices",
    "monitors.law",
    "monitors.needs",
    "monitors.signal",
    "monitors.watch",
)
"""What all monitors share, which has no number in it."""
WITHOUT_EFFECT = ("piece_s", "checkpoint_every_steps")
"""Keys of the training that change no weight."""

TOLD = ("faults.card", "faults.fit", "faults.log")
"""Modules of ``faults`` that say, check and measure what a fault does, and do nothing of it."""
ADDED = {"window_phase": 0}
"""Keys that faults did not always have, and the value that is what a fault without the key does."""
ADDED_TO = {"faults.router_frozen.RouterFrozen": {"layers": None}}
"""Likewise of one class of them."""
ADDED_TO_MODELS = {"dropout": 0.0}
"""Likewise of models."""

Config = Mapping[str, Any]


def trajectory_sources(config: Config) -> list[tuple[str, Path]]:
    """The files that determine a run's weights, by names that are the same in every clone. config: ``Run.nodes``."""
    return [*training_sources(config), *fault_sources(config["fault"])]


def training_sources(config: Config) -> Iterator[tuple[str, Path]]:
    """Those that train the run, but for its fault's own."""
    stacked = config["train"]["stack"] > 1
    training = ROOT / "experiments" / "training"
    for name in (*ENGINE, *SINGLE, *(STACKED if stacked else ())):
        yield f"experiments.training.{name}", training / f"{name}.py"
    left_out = {f"{name}.py" for name in INSTRUMENTS}
    left_out |= set() if stacked else {"stacked.py"}
    left_out |= set() if config["train"]["compile"] else {"compiled.py"}
    if config["model"]["backend"] != "triton":
        left_out |= {path.name for pattern in TRITON for path in (ROOT / "models").glob(f"{pattern}.py")}
    for path in (ROOT / "models").glob("*.py"):
        if path.name not in left_out:
            yield f"models.{path.stem}", path
    for module in ("faults.base", "faults.points", "faults.logged_numerics"):
        yield from _with_imports_from_beside(module)


def fault_sources(node: Config) -> Iterator[tuple[str, Path]]:
    """The modules of a fault's classes, from its configuration node, and what they import from beside them."""
    for target in _targets(node):
        yield from _with_imports_from_beside(target.rpartition(".")[0])


def _with_imports_from_beside(module: str) -> Iterator[tuple[str, Path]]:
    def follow(name: str, path: Path) -> bool:
        return name not in TOLD and (name.split(".")[0] == "faults" or _beside(module, name, path))

    return closure_of(module, follow)


def monitor_sources(module: str) -> Iterator[tuple[str, Path]]:
    """A monitor's module, and the mathematics that it imports: from beside it, of ``monitors`` and of ``models``."""

    def follow(name: str, path: Path) -> bool:
        ours = name.split(".")[0] in ("monitors", "models")
        return name not in CONTRACT and (ours or _beside(module, name, path))

    yield from closure_of(module, follow)


def _beside(module: str, other: str, path: Path) -> bool:
    """Whether another module is of the same package, or lies in the same folder."""
    own = path_of(module)
    return (other.split(".")[0] == module.split(".")[0]) or (own is not None and own.parent == path.parent)


def _targets(node: Any) -> Iterator[str]:
    children = node.values() if isinstance(node, Mapping) else node if isinstance(node, (list, tuple)) else ()
    if isinstance(node, Mapping) and "_target_" in node:
        yield node["_target_"]
    for child in children:
        yield from _targets(child)


def without_labels(node: Any) -> Any:
    """A fault's configuration node without what only tables say of it, at any depth, nor keys as good as none.

    A benign control stays one: it is judged as no fault, so that it has runs of its own.
    """
    if not isinstance(node, Mapping):
        return node
    added: Config = ADDED | ADDED_TO.get(str(node.get("_target_")), {})
    label = {"family": BENIGN} if node.get("family") == BENIGN else {}
    kept = {key: value for key, value in node.items() if key not in LABELS and added.get(key, ...) != value} | label
    return {key: without_labels(value) for key, value in kept.items()}


def without_added(model: Config) -> Config:
    """A model's configuration node without keys that are as good as none."""
    return {key: value for key, value in model.items() if ADDED_TO_MODELS.get(key, ...) != value}


def identifier(parts: Any) -> str:
    """The first 16 hex digits of the SHA-256 of anything that JSON can hold."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]


def observation_id(trajectory: str, node: Config, cadences: Iterable[Cadence]) -> str:
    """Of a monitor, from its configuration node and its signals' cadences: jittered readings are of that jitter."""
    parts = [trajectory, dict(node), monitor_digest(node["_target_"].rpartition(".")[0])]
    jitter = [JITTER_STEPS] if any(cadence.moves for cadence in cadences) else []
    return identifier([*parts, *jitter])


@cache
def monitor_digest(module: str) -> str:
    """Of a monitor's sources, which all runs of a process share."""
    return digest_of(monitor_sources(module))
