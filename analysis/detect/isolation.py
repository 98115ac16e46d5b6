"""A stranger's code in a process of its own, with limits, from which numbers come back and nothing else.

The process gets series of z-scores and no name, seed, fault, onset, label or result of anyone. It starts afresh (no
fork), in an empty folder that is removed, in a session of its own that is ended as one. What it sends is never
unpickled or parsed as code: raw FP64 of the number that was asked for, or a short text for people. It may still read
files that this user may read: isolation guards a board against accidents and against reaching into it, and is no jail.

On a socket, the parent's request: ``s`` (statistics) or ``c`` (calibrate), the number of the rule (uint32), the number
of series (uint32), their lengths (uint64), their values. The answer: ``v`` and the values (none for ``c``); ``e`` or
``s`` with a length (uint32) and a text; ``m``, out of memory. All little-endian.
"""

from __future__ import annotations

import json
import math
import os
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np

WORKER = Path(__file__).with_name("entrant_worker.py")
MOST_BYTES, MOST_CHARACTERS = 1 << 16, 300
"""Of a text that a stranger's code sends, and of what is shown of it."""

MINIMAL_S = 1e-3
"""A socket takes a timeout of 0 for another mode: what is left at the end."""

THREADS = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")


class Failed(Exception):
    """A stranger's code that did not do what was asked, with the reason in one line."""


LARGEST = {"time_limit_s": 86_400, "memory_limit_gib": 65_536}
"""A day, and what no machine has."""


@dataclass(frozen=True)
class Limits:
    """What a detector may use of one contest: its answers' time together, and memory. Raises ValueError by key."""

    time_s: float = 120.0
    memory_gib: float = 4.0

    def __post_init__(self) -> None:
        for key, value in (("time_limit_s", self.time_s), ("memory_limit_gib", self.memory_gib)):
            if not 0 < value <= LARGEST[key]:
                raise ValueError(f"{key}={value} is not allowed: above 0, at most {LARGEST[key]:,}")


DEFAULT_LIMITS = Limits()


class Worker:
    """A started detector file. ``signals``: what it asks for. Close it, or use it as a context.

    Raises Failed where the file cannot be loaded within the limits.
    """

    def __init__(self, path: Path, limits: Limits) -> None:
        self._limits, self._left_s = limits, limits.time_s
        self._rules, self._closed = 0, False
        self._deadline = time.monotonic() + self._left_s
        self._folder = tempfile.TemporaryDirectory(prefix="entrant-", ignore_cleanup_errors=True)
        self._socket, theirs = socket.socketpair()
        with theirs:
            self._process = subprocess.Popen(
                self._command(path, theirs.fileno()),
                cwd=self._folder.name,
                env={"PATH": os.defpath, "HOME": self._folder.name} | dict.fromkeys(THREADS, "1"),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                pass_fds=[theirs.fileno()],
                start_new_session=True,
            )
        try:
            self.signals = self._signals()
        except Failed:
            self.close()
            raise

    def _command(self, path: Path, number: int) -> list[str]:
        memory = int(self._limits.memory_gib * 2**30)
        cpu_s = math.ceil(self._limits.time_s) + 1
        search = json.dumps([str(Path(part).resolve()) for part in sys.path])
        return [sys.executable, "-I", "-B", str(WORKER), *map(str, (number, memory, cpu_s, path.resolve(), search))]

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End the process and everything that it started in its session."""
        if self._closed:
            return
        self._closed = True
        self._socket.close()
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        self._folder.cleanup()

    def calibrate(self, healthy: Sequence[np.ndarray]) -> int:
        """The number of the rule that the file makes of healthy series, each (T,). Raises Failed."""
        self._ask(b"c", 0, healthy)
        self._rules += 1
        return self._rules

    def statistic(self, rule: int, x: np.ndarray) -> np.ndarray:
        """What a rule says of a series, (T,) -> (T,), FP64; 0 is the file's own rule. Raises Failed."""
        return np.frombuffer(self._ask(b"s", rule, [x], 8 * len(x)), "<f8").astype(float)

    def _signals(self) -> tuple[str, ...]:
        self._deadline = time.monotonic() + self._left_s
        names = self._answer(b"s", 0).decode(errors="replace")
        self._left_s = self._deadline - time.monotonic()
        return tuple(_plain(name) for name in names.split("\n") if name)

    def _ask(self, kind: bytes, rule: int, series: Sequence[np.ndarray], size: int = 0) -> bytes:
        """Send a request and take its answer of so many bytes; the time goes off what is left."""
        lengths = struct.pack(f"<I{len(series)}Q", len(series), *map(len, series))
        values = b"".join(np.asarray(x, "<f8").tobytes() for x in series)
        self._deadline = time.monotonic() + self._left_s
        try:
            self._socket.settimeout(max(self._left_s, MINIMAL_S))
            self._socket.sendall(struct.pack("<cI", kind, rule) + lengths + values)
        except TimeoutError:
            raise self._late() from None
        except OSError:
            raise self._gone() from None
        answer = self._answer(b"v", size)
        self._left_s = self._deadline - time.monotonic()
        return answer

    def _answer(self, wanted: bytes, size: int) -> bytes:
        kind = self._take(1)
        if kind == b"m":
            raise Failed(f"used more than {self._limits.memory_gib:g} GiB (memory_limit_gib)")
        if kind == wanted == b"v":
            return self._take(size)
        if kind in (wanted, b"e"):
            (length,) = struct.unpack("<I", self._take(4))
            text = self._take(min(length, MOST_BYTES))
            if kind == wanted:
                return text
            raise Failed(_plain(text.decode(errors="replace")))
        raise Failed("answered with something else than numbers")

    def _take(self, size: int) -> bytes:
        parts = bytearray()
        while len(parts) < size:
            try:
                self._socket.settimeout(max(self._deadline - time.monotonic(), MINIMAL_S))
                part = self._socket.recv(min(size - len(parts), 1 << 20))
            except TimeoutError:
                raise self._late() from None
            except OSError:
                part = b""
            if not part:
                raise self._gone()
            parts += part
        return bytes(parts)

    def _late(self) -> Failed:
        self.close()
        return Failed(f"did not return within {self._limits.time_s:g} s (time_limit_s)")

    def _gone(self) -> Failed:
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(1.0)  # it has closed its end; its exit code comes a moment later
        code = self._process.poll()
        self.close()
        said = "" if code is None else f" with exit code {code}" if code >= 0 else f" by signal {-code}"
        return Failed(f"ended itself{said}")


def _plain(text: str) -> str:
    """One short line of printable characters."""
    return " ".join("".join(c if c.isprintable() else " " for c in text).split())[:MOST_CHARACTERS]
