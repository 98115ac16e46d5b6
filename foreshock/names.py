"""Names of modules: ``faults.base`` in configurations and identities, ``foreshock.faults.base`` to Python."""

from __future__ import annotations

FOLDERS = ("analysis", "experiments", "faults", "models", "monitors")
"""The project's folders of Python code, which are packages of ``foreshock``."""


def importable(module: str) -> str:
    """The name by which Python imports a module, ours or another."""
    return f"foreshock.{module}" if module.split(".")[0] in FOLDERS else module


def short(module: str) -> str:
    """The name of a module without the package's: the same in a clone and where it is installed."""
    return module.removeprefix("foreshock.")
