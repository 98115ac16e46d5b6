"""A run's folder held against other processes, and the checkpoint in it, whole or detectably damaged."""

from __future__ import annotations

import fcntl
import hashlib
import io
import os
import socket
from collections.abc import Collection, Iterator, Mapping
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


def load(folder: Path, device: torch.device, name: str = CHECKPOINT) -> dict[str, Any] | None:
    """A checkpoint of the folder, or None where it has none. Raises TraceError where it is damaged."""
    path = folder / name
    if not path.exists():
        return None
    try:
        payload = checked(path)
    except ValueError as error:
        raise trace.damaged(path, error, folder) from None
    state: dict[str, Any] = torch.load(io.BytesIO(payload), map_location=device, weights_only=True)
    return state


def checked(path: Path) -> bytes:
    """What a checkpoint holds. Raises ValueError where it is missing or does not match its SHA-256."""
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        raise ValueError("is missing") from None
    if hashlib.sha256(data[32:]).digest() != data[:32]:
        raise ValueError("does not match its SHA-256")
    return data[32:]


def keep(folder: Path, step: int) -> None:
    """Keep the folder's checkpoint, which is of this step, beside those that come after it."""
    trace.write_whole(folder / kept(step), (folder / CHECKPOINT).read_bytes())


def kept(step: int) -> str:
    """The name of a checkpoint that is kept."""
    return f"checkpoint-{step:09d}.pt"


def discard_kept(folder: Path, but: Collection[int] = ()) -> None:
    """Delete the checkpoints that were kept, but those of some steps."""
    names = {kept(step) for step in but}
    for path in folder.glob("checkpoint-*.pt"):
        if path.name not in names:
            path.unlink(missing_ok=True)


def discard(folder: Path) -> None:
    """Delete all checkpoints of a run that has ended."""
    (folder / CHECKPOINT).unlink(missing_ok=True)
    discard_kept(folder)


def compact(state: Any) -> Any:
    """The same state without the memory around its views, which would be saved with them."""
    return map_tensors(lambda x: x.clone() if x.untyped_storage().nbytes() > x.nbytes else x, state)
