"""``attach`` for a model and an optimizer of Hugging Face Accelerate.

model, optimizer, batches = accelerator.prepare(model, optimizer, batches)
watch = attach(model, optimizer)
for batch in batches:
    with accelerator.accumulate(model):
        loss = model(**batch).loss
        accelerator.backward(loss)
        optimizer.step()
        if accelerator.sync_gradients:
            watch.step(loss)
        optimizer.zero_grad()
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Unpack

import torch
from torch import nn

import foreshock
from foreshock.integrations import missing, options_of

try:
    from accelerate import PartialState
    from accelerate.optimizer import AcceleratedOptimizer
except ModuleNotFoundError as error:
    raise missing("accelerate", error) from None

if TYPE_CHECKING:
    from foreshock.attaching.options import Given
    from foreshock.attaching.watch import AttachedWatch


def attach(
    model: nn.Module, optimizer: torch.optim.Optimizer, steps_done: int = 0, **options: Unpack[Given]
) -> AttachedWatch:
    """``foreshock.attach`` with the optimizer that Accelerate has wrapped, and its GradScaler.

    The first process writes; the others watch their own rows of the batch and print nothing. steps_done: updates
    before this watch, of a training that is resumed. Raises what ``foreshock.attach`` does.
    """
    chosen = options_of(options, PartialState().is_main_process, steps_done)
    if isinstance(optimizer, AcceleratedOptimizer):
        chosen.setdefault("scaler", optimizer.scaler)
        optimizer = optimizer.optimizer
    watch: AttachedWatch = foreshock.attach(model, optimizer, **chosen)
    return watch
