"""Whether a forward runs again inside a backward that has dropped its activations.

Who looks at a module's forward looks at the first one, which the rest of the network has seen.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

_now: ContextVar[bool] = ContextVar("recomputing", default=False)


def recomputing() -> bool:
    return _now.get()


@contextmanager
def recomputed() -> Iterator[None]:
    """The context of a second forward."""
    token = _now.set(True)
    try:
        yield
    finally:
        _now.reset(token)
