"""A run's folder held against other processes, and the checkpoint in it, whole or detectably damaged."""

from __future__ import annotations

import fcntl
import hashlib
import io
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from experiments import trace
from models.trees import map_tensors


class RunError(Exception):
    """A run folder that cannot be used: held by another process, or with a damaged checkpoint."""


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold the run folder against a second process. Raises RunError at once if another one has it."""
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "lock", "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise RunError(f"run folder {folder} is in use by another process: wait for it, or stop it") from None
        yield


def save(folder: Path, state: Mapping[str, Any]) -> None:
    """Write the folder's checkpoint, its checksum first."""
    buffer = io.BytesIO()
    torch.save(compact(state), buffer)
    payload = buffer.getvalue()
    trace.write_whole(folder / "checkpoint.pt", hashlib.sha256(payload).digest() + payload)


def load(folder: Path, device: torch.device) -> dict[str, Any] | None:
    """The folder's checkpoint, or None where it has none. Raises RunError where it is damaged."""
    path = folder / "checkpoint.pt"
    if not path.exists():
        return None
    data = path.read_bytes()
    if hashlib.sha256(data[32:]).digest() != data[:32]:
        raise RunError(f"checkpoint {path} is corrupted (checksum): delete the run's folder to run it again")
    return torch.load(io.BytesIO(data[32:]), map_location=device, weights_only=True)


def compact(state: Any) -> Any:
    """The same state without the memory around its views, which would be saved with them."""
    return map_tensors(lambda x: x.clone() if x.untyped_storage().nbytes() > x.nbytes else x, state)
