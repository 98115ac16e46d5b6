"""``foreshock.attach`` inside the training loops of other libraries, each an extra of its own.

    foreshock.integrations.transformers   a callback of the Hugging Face ``Trainer``
    foreshock.integrations.lightning      a callback of Lightning's ``Trainer``
    foreshock.integrations.accelerate     ``attach`` for what ``accelerator.prepare`` returns

A library is imported with the module that is named after it, and by nothing else.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def missing(extra: str, error: ModuleNotFoundError) -> ImportError:
    """What to raise where a library is not installed; extra: the one that brings it."""
    library = (error.name or extra).partition(".")[0]
    return ImportError(
        f"foreshock.integrations.{extra} needs {library}, which is not installed: pip install 'foreshock[{extra}]'"
    )


def options_of(options: Mapping[str, Any], first_process: bool, steps_done: int) -> dict[str, Any]:
    """Options of ``foreshock.attach`` for one process of a training.

    Every process watches its own rows of the batch; the first alone writes and speaks. A training that was resumed has
    a watch of its own, whose steps count from there, and a folder of its own, ``<out>-from-<step>``.
    """
    chosen = dict(options)
    if not first_process:
        return {**chosen, "out": None, "quiet": True}
    if chosen.get("out") is not None and steps_done:
        chosen["out"] = f"{chosen['out']}-from-{steps_done}"
    return chosen
