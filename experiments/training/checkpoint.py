"""A run's folder held against other processes, and the checkpoint in it, whole or detectably damaged."""

from __future__ import annotations

import fcntl
import hashlib
import io
import os
import socket
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import Any

import torch

from foreshock.experiments import trace
from foreshock.models.trees import map_tensors

CHECKPOINT = "checkpoint.pt"


class RunError(Exception):
    """A run folder that cannot be used, or runs that failed."""


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold the run folder against a second process. Raises RunError at once if another one has it, and names it.

    The lock is the system's and ends with its process; what ``lock`` holds is for people: process, host, since when.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "lock", "a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            holder = file.read().strip() or "another process"
            raise RunError(f"run folder {folder} is in use by {holder}: wait for it, or stop it") from None
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()} since {datetime.now():%Y-%m-%d %H:%M:%S}\n")
        file.flush()
        yield


def save(folder: Path, state: Mapping[str, Any]) -> None:
    """Write the folder's checkpoint, its checksum first."""
    buffer = io.BytesIO()
    torch.save(compact(state), buffer)
    payload = buffer.getvalue()
    trace.write_whole(folder / CHECKPOINT, hashlib.sha256(payload).digest() + payload)


def load(folder: Path, device: torch.device) -> dict[str, Any] | None:
    """The folder's checkpoint, or None where it has none. Raises TraceError where it is damaged."""
    path = folder / CHECKPOINT
    if not path.exists():
        return None
    data = path.read_bytes()
    if hashlib.sha256(data[32:]).digest() != data[:32]:
        raise trace.damaged(path, "does not match its SHA-256", folder)
    state: dict[str, Any] = torch.load(io.BytesIO(data[32:]), map_location=device, weights_only=True)
    return state


def compact(state: Any) -> Any:
    """The same state without the memory around its views, which would be saved with them."""
    return map_tensors(lambda x: x.clone() if x.untyped_storage().nbytes() > x.nbytes else x, state)
