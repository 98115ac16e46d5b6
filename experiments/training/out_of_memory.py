"""A device that runs out of memory, as an error that says what to lower."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from foreshock.experiments.build import Run


class OutOfMemory(Exception):
    """The device cannot hold the run; one line with its size and the setting to lower."""


@contextmanager
def out_of_memory_named(run: Run) -> Iterator[None]:
    """Raise OutOfMemory in place of the allocator's own error."""
    try:
        yield
    except torch.OutOfMemoryError:
        at_a_time, context = run.train.micro_batch or run.train.batch_size, run.model_config.context_length
        lower = "train.micro_batch" if at_a_time > 1 else "model.context_length, or choose a smaller model"
        if run.train.stack > 1:
            lower = f"train.stack={run.train.stack}"
        raise OutOfMemory(
            f"{run.device.type} is out of memory at {at_a_time} of train.batch_size={run.train.batch_size} sequences "
            f"of model.context_length={context} at a time (train.micro_batch={run.train.micro_batch}): lower {lower}"
        ) from None
