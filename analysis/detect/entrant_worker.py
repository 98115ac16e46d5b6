"""The process that runs a stranger's detector: series come in, numbers go out. Needs numpy, and nothing of ours.

``detect.isolation`` starts it and says how they talk. It is run as a script, so that what the project knows of the
runs is in no memory that a detector can reach.
"""

from __future__ import annotations

import importlib.util
import json
import resource
import socket
import struct
import sys
from contextlib import suppress
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

MOST_BYTES = 1 << 16
"""Of a text, as ``analysis.detect.isolation`` takes it."""

REAL_NUMBERS = "biuf"
"""Kinds of dtype that a statistic may have."""


class Unusable(Exception):
    """What a detector has or returns is no detector's; the message says what is needed."""


def limit(memory_bytes: int, cpu_s: int) -> None:
    """Bound this process for good. A system that cannot bound one of them leaves it to the parent's clock."""
    for what, most in ((resource.RLIMIT_AS, memory_bytes), (resource.RLIMIT_CPU, cpu_s), (resource.RLIMIT_CORE, 0)):
        with suppress(ValueError, OSError):
            resource.setrlimit(what, (most, most))


def load(path: Path) -> tuple[ModuleType, list[str]]:
    """The detector's module and its signals. Raises Unusable where it is none, or whatever its own code raises."""
    spec = importlib.util.spec_from_file_location(f"entrant_{path.stem}", path)
    if spec is None or spec.loader is None:
        raise Unusable("it is not a Python file")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    if not callable(getattr(module, "statistic", None)):
        raise Unusable("it has no function statistic(x)")
    signals = getattr(module, "signals", ())
    if not isinstance(signals, (list, tuple)) or not all(isinstance(name, str) for name in signals):
        raise Unusable(f"signals={signals!r} is not allowed: a list of signal names")
    return module, list(signals)


def statistic(rule: Any, x: np.ndarray) -> np.ndarray:
    """(T,) -> (T,), FP64. Raises Unusable on another shape, or on what are no real numbers."""
    values = np.asarray(rule.statistic(x.copy()))
    if values.shape != x.shape:
        raise Unusable(f"statistic returned shape {values.shape} for {x.shape}: one value a sample is needed")
    if values.dtype.kind not in REAL_NUMBERS:
        raise Unusable(f"statistic returned dtype {values.dtype}: real numbers are needed")
    return values.astype("<f8")


class Link:
    """One end of the socket."""

    def __init__(self, number: int) -> None:
        self._socket = socket.socket(fileno=number)
        self._socket.set_inheritable(False)

    def take(self, size: int) -> bytes:
        """Exactly so many bytes. Ends the process where the parent has gone."""
        parts = bytearray()
        while len(parts) < size:
            part = self._socket.recv(min(size - len(parts), 1 << 20))
            if not part:
                sys.exit(0)
            parts += part
        return bytes(parts)

    def series(self) -> list[np.ndarray]:
        (count,) = struct.unpack("<I", self.take(4))
        lengths = struct.unpack(f"<{count}Q", self.take(8 * count))
        return [np.frombuffer(self.take(8 * length), "<f8").copy() for length in lengths]

    def give(self, kind: bytes, content: bytes = b"") -> None:
        self._socket.sendall(kind + content)

    def say(self, kind: bytes, said: str) -> None:
        text = said.encode(errors="replace")[:MOST_BYTES]
        self.give(kind, struct.pack("<I", len(text)) + text)


def serve(link: Link, module: ModuleType) -> None:
    """Answer requests until the parent hangs up. Rule 0 is the file's own; calibrations are numbered from 1."""
    rules: list[Any] = [module]
    while True:
        kind, number = struct.unpack("<cI", link.take(5))
        series = link.series()
        where = "calibrate" if kind == b"c" else "statistic"
        try:
            if kind == b"c":
                rules.append(module.calibrate(series) if hasattr(module, "calibrate") else module)
                if not callable(getattr(rules[-1], "statistic", None)):
                    raise Unusable("calibrate returned something without a function statistic(x)")
                answer = b""
            else:
                answer = b"".join(statistic(rules[number], x).tobytes() for x in series)
        except MemoryError:
            link.give(b"m")
        except Unusable as error:
            link.say(b"e", str(error))
        except BaseException as error:  # whatever a stranger's code raises
            link.say(b"e", f"{where} raised {type(error).__name__}: {error}")
        else:
            link.give(b"v", answer)


def main(arguments: list[str]) -> None:
    number, memory_bytes, cpu_s, path, search = arguments
    link = Link(int(number))
    sys.path[:] = json.loads(search)
    limit(int(memory_bytes), int(cpu_s))
    try:
        module, signals = load(Path(path))
    except MemoryError:
        link.give(b"m")
    except Unusable as error:
        link.say(b"e", str(error))
    except BaseException as error:  # whatever a stranger's code raises
        link.say(b"e", f"{type(error).__name__}: {error}")
    else:
        link.say(b"s", "\n".join(signals))
        serve(link, module)


if __name__ == "__main__":
    main(sys.argv[1:])
