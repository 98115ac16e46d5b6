"""The pieces of ``experiments.bench_gpt2``: rates, parts and kernels of a step, eigenproblems, costs of watching."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from foreshock.experiments.gpt2_sizes import Size, paper_fault
from foreshock.experiments.gpt2_training import Training, flops_a_token, in_turns, seconds
from foreshock.experiments.gpu_record import first_line
from foreshock.experiments.monitor_costs import monitor_costs
from foreshock.experiments.plain_config import monitors_of
from foreshock.monitors.eigen import on_host, values_alone, values_and_vectors

TURNS = 5
STEP = 200
"""The update that is measured, by its learning rate: the first after the warm-up."""

HEALTHY_NAME = "healthy"

DENSE_BF16_TFLOPS = 989.0
"""Of an H100 or H200 by their data sheet, which no matrix product reaches."""

Piece = tuple[str, str, Callable[[], dict[str, Any]]]


def ready(make: Callable[[], Training]) -> tuple[Training, dict[str, Any]]:
    """A training that is warm; how long its first step took, compilation in it, and the most memory it had.

    The memory is without what others hold; None on a CPU.
    """
    held_by_others = torch.cuda.memory_allocated()
    training = make()
    first_s = seconds(partial(training.step, 0), training.device)
    on_gpu = training.device.type == "cuda"
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
    training.step(1)
    peak = (torch.cuda.max_memory_allocated() - held_by_others) / 2**30 if on_gpu else None
    return training, {"first_step_s": first_s, "peak_gib": peak}


def rate(training: Training, step_s: float) -> dict[str, float]:
    """Tokens a second, and the model FLOP/s that they are, also as a share of what a Hopper GPU could do."""
    tokens_per_s = training.tokens_a_step / step_s
    flops = flops_a_token(training.model.config, sum(p.numel() for p in training.model.parameters()))
    tflops = tokens_per_s * flops / 1e12
    return {
        "tokens_per_s": tokens_per_s,
        "step_ms": 1e3 * step_s,
        "model_tflops": tflops,
        "share_of_hopper_peak": tflops / DENSE_BF16_TFLOPS,
    }


def step_rates(size: Size, micro_batch: int, compile: bool) -> dict[str, Any]:
    """Training steps of the healthy model, of its rivals, and with the paper's fault, measured in turns.

    A rival that cannot run is there with its error.
    """
    torch._dynamo.reset()  # a function is compiled for a few shapes only, then no more
    make = partial(size.training, micro_batch, compile)
    wanted = {
        HEALTHY_NAME: make,
        **{name: partial(make, **changes) for name, changes in size.rivals.items()},
        "fault on": partial(make, paper_fault()),
    }
    trainings: dict[str, Training] = {}
    found: dict[str, dict[str, Any]] = {}
    for name, build in wanted.items():
        try:
            trainings[name], found[name] = ready(build)
        except Exception as error:
            if name == HEALTHY_NAME:
                raise
            found[name] = {"error": first_line(error)}
    steps = {name: partial(training.step, STEP) for name, training in trainings.items()}
    taken = in_turns(steps, torch.device(size.train.device), TURNS)
    for name, training in trainings.items():
        found[name] |= rate(training, taken[name]) | {"time_over_healthy": taken[name] / taken[HEALTHY_NAME]}
    return found


def parts_of_a_step(size: Size) -> dict[str, float]:
    """Milliseconds of what a step is made of, and of the held-out label, which comes every ``every_steps``.

    ``watched sequences``: those of ``train.watched_sequences``, never compiled; ``eager micro-batch``: a whole one, as
    the last would be without that setting. ``tokens_per_s_if_...``: what either costs.
    """
    training, _ = ready(partial(size.training, size.micro_batches[0], True))
    config = training.config
    calls: dict[str, Callable[[], object]] = {
        "step": partial(training.step, STEP),
        "compiled micro-batch": training.unwatched_micro_batch,
        "eager micro-batch": training.eager_micro_batch,
        "watched sequences": training.backward_watched,
        "clip and AdamW": partial(training.update, STEP),
        "batch to the device": training.batch,
        "held-out label": partial(training.engine.held_out_loss, [training.sites]),
    }
    for call in calls.values():
        call()
    taken = in_turns(calls, training.device, TURNS)
    micro_batch = config.micro_batch or config.batch_size
    watched = config.watched_sequences or micro_batch
    share, without_s = watched / micro_batch, taken["step"] - taken["watched sequences"]
    all_compiled_s = without_s + share * taken["compiled micro-batch"]
    none_apart_s = without_s - (1 - share) * taken["compiled micro-batch"] + taken["eager micro-batch"]
    return {name: 1e3 * value for name, value in taken.items()} | {
        "micro_batches_a_step": config.batch_size // micro_batch,
        "watched_sequences": watched,
        "label_every_steps": config.held_out_every_steps,
        "tokens_per_s_if_all_were_compiled": training.tokens_a_step / all_compiled_s,
        "tokens_per_s_if_a_whole_micro_batch_were_watched": training.tokens_a_step / none_apart_s,
    }


def kernels_of(call: Callable[[], object], device: torch.device, count: int = 25) -> dict[str, Any]:
    """The operations of a call that took the device longest: milliseconds, and how many there were."""
    on_gpu = device.type == "cuda"
    activities = [ProfilerActivity.CUDA if on_gpu else ProfilerActivity.CPU]
    with profile(activities=activities) as found:
        seconds(call, device)
    spent = {
        event.key: (event.self_device_time_total if on_gpu else event.self_cpu_time_total, event.count)
        for event in found.key_averages()
    }
    dearest = sorted(spent.items(), key=lambda item: -item[1][0])[:count]
    return {
        "total_ms": sum(microseconds for microseconds, _ in spent.values()) / 1e3,
        "dearest": {name: {"ms": us / 1e3, "calls": calls} for name, (us, calls) in dearest},
    }


def kernels(size: Size) -> dict[str, Any]:
    """Where the device's time goes: a compiled micro-batch, one as large that is not, and what follows them."""
    training, _ = ready(partial(size.training, size.micro_batches[0], True))
    return {
        "compiled micro-batch": kernels_of(training.unwatched_micro_batch, training.device),
        "eager micro-batch": kernels_of(training.eager_micro_batch, training.device),
        "clip and AdamW": kernels_of(partial(training.update, STEP), training.device),
    }


def eigenproblems(size: Size) -> dict[str, Any]:
    """Milliseconds a symmetric matrix takes by where many of them are solved, as the spectra and the alignment ask."""
    device, found = torch.device(size.train.device), {}
    d_head, d_model = size.model.d_head, size.model.d_model
    for solve, dtype, width, count in (
        (values_alone, torch.float64, d_head, 512),
        (values_alone, torch.float64, 2 * d_head, 128),
        (values_alone, torch.float64, d_model, 48),
        (values_and_vectors, torch.float32, d_model, 12),
    ):
        x = torch.randn(count, width, 2 * width, dtype=dtype, device=device)
        gram = x @ x.mT
        calls = {"device": partial(solve, gram), "cores of the host": partial(on_host, solve, gram)}
        for call in calls.values():
            call()
        taken = in_turns(calls, device, TURNS)
        name = f"{solve.__name__.replace('_', ' ')}, {count} of width {width}"
        found[name] = {where: 1e3 * spent / count for where, spent in taken.items()}
    return found


def costs_of_watching(size: Size, micro_batch: int, compile: bool) -> dict[str, Any]:
    training, _ = ready(partial(size.training, micro_batch, compile))
    return monitor_costs(training, monitors_of(experts=False))


def pieces(size: Size) -> Iterator[Piece]:
    """(part, name, work), what matters most first; a micro-batch is so many sequences."""
    first, *others = size.micro_batches

    def named(micro_batch: int, compile: bool) -> str:
        return f"micro-batch {micro_batch}, {'compiled' if compile else 'eager'}"

    def steps(*how: Any) -> Piece:
        return "steps", named(*how), partial(step_rates, size, *how)

    def monitors(*how: Any) -> Piece:
        return "monitors", f"monitors at {named(*how)}", partial(costs_of_watching, size, *how)

    yield steps(first, True)
    yield monitors(first, True)
    yield "profile", "parts of a step", partial(parts_of_a_step, size)
    yield "profile", "kernels", partial(kernels, size)
    yield "profile", "eigenproblems", partial(eigenproblems, size)
    yield steps(first, False)
    for micro_batch in others:
        yield steps(micro_batch, True)
    yield monitors(others[-1], False)  # where memory or the compiler fails above
    for micro_batch in others:
        yield steps(micro_batch, False)
