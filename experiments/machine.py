"""What a run needs of the machine that trains it, held against what the machine has: threads and memory.

These are no part of a run's configuration: another machine may train it. They are checked where training is about to
begin, not where a run is built, so that a laptop still lists, plans and scores what a larger machine trains.
"""

from __future__ import annotations

import os

import joblib
import torch

from foreshock.experiments.build import Run
from foreshock.experiments.training.out_of_memory import OutOfMemory
from foreshock.models.transformer import Transformer, TransformerConfig

BYTES_OF_A_PARAMETER = 16
"""FP32 weight, gradient and the two moments of AdamW."""
BYTES_OF_A_TOKEN = 8
"""int64, as batches hold them."""


def check_machine(run: Run) -> None:
    """Raises ValueError for more threads than this machine's processor has, and OutOfMemory for a run that cannot fit.

    Threads: of the cores that this process may use (``joblib.cpu_count``). Memory: ``least_bytes`` against all that
    the device has, free or not; swap is left out.
    """
    cores = joblib.cpu_count()
    if run.train.threads > cores:
        raise ValueError(
            f"train.threads={run.train.threads} is not allowed here: 1 to {cores}, the cores that this process may use"
        )
    sizes = least_bytes(run)
    needed, there = sum(sizes.values()), device_bytes(run.device)
    if needed > there:
        field = max(sizes, key=lambda name: sizes[name])
        raise OutOfMemory(
            f"{field} is too large for this machine: the run takes at least {needed / 2**30:,.1f} GiB of the "
            f"{there / 2**30:,.1f} GiB of {run.device.type}'s memory, {sizes[field] / 2**30:,.1f} GiB of them for this"
        )


def count_parameters(config: TransformerConfig) -> int:
    """Of a model built on the meta device: nothing is allocated."""
    with torch.device("meta"):
        return sum(p.numel() for p in Transformer(config).parameters())


def least_bytes(run: Run) -> dict[str, int]:
    """Bytes that a run holds at the same time at the very least, by the fields that decide them.

    At an update: weights, gradients and AdamW's moments in FP32. In a forward: weights, and the logits of a micro-batch
    in FP32, (B, T, V). The larger of the two, each with the tokens and targets of a batch and of the held-out one.
    Activations come on top of that.
    """
    model, train = run.model_config, run.train
    row = (model.context_length + 1) * BYTES_OF_A_TOKEN
    at_a_time = train.micro_batch or train.batch_size
    sequences = f"train.{'micro_batch' if train.micro_batch else 'batch_size'}={at_a_time}"
    held_out = f"train.held_out_sequences={train.held_out_sequences}"
    size = f"model.d_model={model.d_model}, model.n_layers={model.n_layers}, model.d_ff={model.d_ff}"
    parameters, logits = count_parameters(model), at_a_time * model.context_length * (model.vocab_size or 0)
    batches = {held_out: train.held_out_sequences * row, f"train.batch_size={train.batch_size}": train.batch_size * row}
    update = {f"the model of {size}": BYTES_OF_A_PARAMETER * parameters, **batches}
    forward = {f"the model of {size}": 4 * parameters, **batches}
    forward[sequences] = forward.get(sequences, 0) + 4 * logits
    return max(update, forward, key=lambda sizes: sum(sizes.values()))


def device_bytes(device: torch.device) -> int:
    """All of a device's memory."""
    if device.type == "cuda":
        total: int = torch.cuda.mem_get_info(device)[1]
        return total
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
