"""A training in each of two processes that share their gradients, for ``torchrun --nproc-per-node=2``.

python -m torch.distributed.run --nproc-per-node=2 -m tests.attaching.two_processes LOOP FOLDER

Trains twice, without a watch and with one. Every process leaves ``FOLDER/<rank>.pt``: the weights of both, and what its
watch has seen.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

import foreshock
from foreshock.monitors.base import Masked
from foreshock.writers import JsonLines
from tests.attaching.loops import batches, gpt

STEPS, ROWS = 12, 4
RANK = int(os.environ.get("RANK", 0))


class Kept:
    """Readings by step."""

    def __init__(self) -> None:
        self.by_step: dict[int, dict[str, Any]] = {}

    def __call__(self, step: int, readings: Any) -> None:
        self.by_step[step] = {
            name: (reading.value, reading.undefined) if isinstance(reading, Masked) else reading
            for name, reading in readings.items()
        }


def in_ddp(**options: Any) -> tuple[nn.Module, Any]:
    """A loop of one's own."""
    from torch.nn.parallel import DistributedDataParallel

    if not dist.is_initialized():
        dist.init_process_group("gloo")
    model = gpt()
    wrapped = DistributedDataParallel(model)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
    watch = foreshock.attach(wrapped, optimizer, **options) if options else None
    for batch in batches(STEPS, 2 * ROWS):
        own = batch.chunk(2)[RANK]
        loss = wrapped(own[:, :-1], own[:, 1:])[1]
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if watch is not None:
            watch.step(loss)
        optimizer.zero_grad()
    if watch is not None:
        watch.close()
    return model, watch


def in_trainer(**options: Any) -> tuple[nn.Module, Any]:
    """The ``Trainer`` of Hugging Face."""
    from tests.integrations.trainer import fit

    callback = None
    if options:
        from foreshock.integrations.transformers import WatchCallback

        callback = WatchCallback(**options)
    folder = Path(sys.argv[2]) / "trainer"
    model = fit(folder, STEPS, callback, parts=2, ddp_backend="gloo", ddp_find_unused_parameters=False)
    return model, callback and callback.watch


def in_lightning(**options: Any) -> tuple[nn.Module, Any]:
    """The ``Trainer`` of Lightning."""
    from tests.integrations.test_lightning import WatchCallback, fit

    callback = WatchCallback(**options) if options else None
    model = fit(callback, STEPS, parts=2, devices=2, strategy="ddp")
    return model, callback and callback.watch


LOOPS: dict[str, Callable[..., tuple[nn.Module, Any]]] = {
    "ddp": in_ddp,
    "trainer": in_trainer,
    "lightning": in_lightning,
}


def main() -> None:
    loop, folder = sys.argv[1], Path(sys.argv[2])
    torch.set_num_threads(1)
    without, _ = LOOPS[loop]()
    kept = Kept()
    watched, watch = LOOPS[loop](
        out=folder / "trace",
        every_steps=3,
        on_readings=kept,
        actions="snapshot",
        writers=[JsonLines(folder / "readings.jsonl")],
    )
    left: dict[str, Any] = {
        "without": weights_of(without),
        "watched": weights_of(watched),
        "readings": kept.by_step,
        "steps": watch.steps,
        "stopped": watch.stopped,
        "tracebacks": dict(watch.tracebacks),
    }
    torch.save(left, folder / f"{RANK}.pt")
    if dist.is_initialized():
        dist.destroy_process_group()


def weights_of(model: nn.Module) -> dict[str, Tensor]:
    return {name: weight.detach().clone() for name, weight in model.state_dict().items()}


if __name__ == "__main__":
    main()
