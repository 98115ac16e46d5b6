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


def compare(old: Trace, new: Trace, old_weights: Path | None, new_weights: Path | None) -> Step:
    """Names, shapes and dtypes of tensors where both files are there, and the manifests' keys of the model.

    Raises ValueError where a weight file is missing or no safetensors file.
    """
    found = changes(old.manifest, new.manifest)
    findings = [f"{c.key} {c.before} -> {c.after}" for c in found if c.key.startswith(OF_THE_MODEL)]
    notes = [f"{c.key} {c.before} -> {c.after}" for c in found if not c.key.startswith(OF_THE_MODEL)]
    compared = f"the manifests of {old.run_id} and {new.run_id}"
    if old_weights is not None and new_weights is not None:
        before, after = tensors(old_weights, "old_weights"), tensors(new_weights, "new_weights")
        compared += f", {_count(before):,} parameters with {_count(after):,}"
        findings += _tensor_changes(before, after)
    return judged(NAME, compared, findings, tuple(notes))


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
