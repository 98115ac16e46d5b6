"""What two models are made of: the tensors of their weight files, and what their manifests say."""

from __future__ import annotations

from collections.abc import Mapping
from math import prod
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from foreshock.analysis.probes.changes import changes
from foreshock.analysis.probes.step import Step, judged
from foreshock.experiments.trace import ATTACHED, Trace

NAME = "architecture"
OF_THE_MODEL = ("config.model.", f"{ATTACHED}.", "sources.models.")
"""Beginnings of keys that say what a model is."""

Tensors = Mapping[str, tuple[tuple[int, ...], str]]


def compare(runs: tuple[Trace, Trace] | None, weights: tuple[Path, Path] | None) -> Step:
    """Names, shapes and dtypes of tensors, and the manifests' keys of the model, of what there is; old before new.

    Raises ValueError where a weight file is missing or no safetensors file.
    """
    compared, findings, notes = [], [], []
    if runs is not None:
        found = changes(*(run.manifest for run in runs))
        findings += [f"{c.key} {c.before} -> {c.after}" for c in found if c.key.startswith(OF_THE_MODEL)]
        notes += [f"{c.key} {c.before} -> {c.after}" for c in found if not c.key.startswith(OF_THE_MODEL)]
        compared.append(f"the manifests of {runs[0].run_id} and {runs[1].run_id}")
    if weights is not None:
        before, after = (tensors(path, key) for path, key in zip(weights, ("old_weights", "new_weights"), strict=True))
        compared.append(f"{_count(before):,} parameters with {_count(after):,}")
        findings += _tensor_changes(before, after)
    return judged(NAME, ", ".join(compared), findings, tuple(notes))


def tensors(path: Path, key: str) -> Tensors:
    """Shape and dtype by name; no tensor is loaded."""
    try:
        with safe_open(path, framework="numpy") as file:
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118  (it is no mapping)
            return {name: (tuple(part.get_shape()), part.get_dtype()) for name, part in slices.items()}
    except FileNotFoundError:
        raise ValueError(f"{key}={path} does not exist") from None
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{key}={path} is no safetensors file: {error}") from None


def _tensor_changes(before: Tensors, after: Tensors) -> list[str]:
    gone = [f"tensor {name} is gone" for name in sorted(before.keys() - after.keys())]
    new = [f"tensor {name} is new" for name in sorted(after.keys() - before.keys())]
    other = [
        f"tensor {name} {_said(before[name])} -> {_said(after[name])}"
        for name in sorted(before.keys() & after.keys())
        if before[name] != after[name]
    ]
    return [*gone, *new, *other]


def _said(tensor: tuple[Any, str]) -> str:
    shape, dtype = tensor
    return f"{dtype} {list(shape)}"


def _count(of: Tensors) -> int:
    return sum(prod(shape) for shape, _ in of.values())
