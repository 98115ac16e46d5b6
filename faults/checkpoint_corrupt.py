"""A checkpoint that is damaged, lost or cannot be written."""

from __future__ import annotations

import os
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from foreshock.faults.card import InjectionCard
from foreshock.faults.corrupt import Corrupt, OperationFault
from foreshock.faults.operation import SystemOperation, Training
from foreshock.models.transformer import TransformerConfig

KINDS = ("truncated", "bitflip", "missing", "unwritable")
FULL_DEVICE = Path("/dev/full")
"""A device of Linux that has no space left for whatever is written to it."""


@dataclass(frozen=True)
class LostCheckpoint(SystemOperation):
    """The run stops before the update, and the checkpoint of that step cannot be loaded.

    kind: of ``KINDS``; back_steps: updates since the last whole checkpoint, None for the start of the run.
    """

    kind: str
    back_steps: int | None

    @property
    def idle(self) -> bool:
        return self.back_steps == 0

    def meets(self, other: Any) -> bool:
        return isinstance(other, LostCheckpoint)

    def check_fits(self, model: TransformerConfig, train: Training) -> None:
        if self.kind == "unwritable" and not FULL_DEVICE.exists():
            raise ValueError(f"fault.kind='unwritable' is not allowed here: this system has no {FULL_DEVICE}")

    def back_to(self, step: int) -> int:
        """The step of the last whole checkpoint before this one."""
        return 0 if self.back_steps is None else step - self.back_steps

    def write(self, path: Path, data: bytes) -> None:
        """Write a checkpoint's bytes as the fault leaves them. Raises OSError where it cannot be written."""
        if self.kind == "truncated":
            path.write_bytes(data[: len(data) // 2])
        elif self.kind == "bitflip":
            middle = len(data) // 2
            path.write_bytes(data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :])
        elif self.kind == "unwritable":
            descriptor = os.open(FULL_DEVICE, os.O_WRONLY)
            try:
                os.write(descriptor, data)
            finally:
                os.close(descriptor)


@dataclass(frozen=True)
class CheckpointCorrupt(OperationFault):
    """The run stops before the updates of a window, by default once, and its newest checkpoint cannot be loaded.

    What breaks: a bad disk, a full one, or a write that was cut short. No public report is named.
    ``kind``: ``truncated``: the first half of the file is there; ``bitflip``: the lowest bit of its middle byte is
    flipped; ``missing``: there is no file; ``unwritable``: the disk is full when it is written. The file is really
    written so and read back, and its SHA-256 gives it away. The run then goes on from the last whole checkpoint, of
    ``back_steps`` updates ago, and trains those updates again; it never goes on from what it cannot check. Its trace is
    cut back with it. The manifest says under ``events`` what the reader found and how many steps were lost, and the
    injection log has them as ``norm``, of several losses the root of the sum of their squares. As every batch is a
    function of seed and step, the weights after a step are those of the healthy run: what is lost is time. It does not
    model a damage that no checksum shows, nor a loader that does not go back.

    back_steps: at most the onset, None for the start, as with one checkpoint that is replaced each time; 0 is the
    healthy control. The first stop is after the run's first update. Raises ValueError on impossible values, by name.
    """

    kind: str
    back_steps: int | None = None

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"fault.kind={self.kind!r} is not allowed: one of {', '.join(KINDS)}")
        super().__post_init__()
        first = self.window.first
        if first == 0:
            raise ValueError("fault.onset=0 is not allowed: before the run's first update there is nothing to lose")
        if self.back_steps is not None and not 0 <= self.back_steps <= first:
            raise ValueError(
                f"fault.back_steps={self.back_steps} is not allowed: 0 (the healthy control) to {first}, the first "
                "faulty update, or null for all"
            )

    @cached_property
    def corrupt(self) -> Corrupt:
        return Corrupt("system", (LostCheckpoint(self.kind, self.back_steps),), self.window)

    def describe(self) -> InjectionCard:
        where, size = {"point": "system", "at": "checkpoint"}, {"kind": self.kind, "back_steps": self.back_steps}
        return InjectionCard(self.family, (self.injection("lost_checkpoint", where, size, self.back_steps == 0),))
