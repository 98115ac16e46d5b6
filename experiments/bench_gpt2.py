"""GPT-2 124M on a GPU: tokens a second of training, and what monitors cost: ``python3 -m experiments.bench_gpt2``.

    python3 -m experiments.bench_gpt2 [device=cuda] [size=gpt2_124m] [out=results/gpu] [limit_s=480]

Model, training and fault are those of ``scale=gpu`` (``conf/{model/gpt2_124m,train/gpt2,fault/bf16_shift}.yaml``), the
monitors all of ``conf/monitor`` at their own cadences, the tokens random. Needs torch, triton, numpy, PyYAML and scipy.
Writes ``<out>/<device>-gpt2.json`` after every piece, what matters most first, and begins none near its limit.
``size=tiny`` is a rehearsal of the same pieces, on a CPU too. Exit code: 0, 1 if a piece failed, 2 where nothing can
be measured.
"""

from __future__ import annotations

import gc
import platform
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch.profiler import ProfilerActivity, profile

from experiments.gpt2_training import Training, flops_a_token, in_turns, seconds
from experiments.gpu_record import Record, file_name, first_line, machine
from experiments.monitor_costs import monitor_costs
from experiments.optimizer import TrainConfig
from experiments.plain_config import construct, monitors_of
from faults.base import Sites
from models.numerics import HEALTHY, AttentionNumerics
from models.transformer import TransformerConfig

ROOT = Path(__file__).resolve().parent.parent
LIMIT_S = 480.0
LONGEST_PIECE_S = 100.0
TURNS = 5
WARM_UP_STEPS = 2
PEAK_TFLOPS = 790.0
"""Of an H200, BF16 matrix products."""

GOALS = {"tokens_per_s": "at least 400,000", "share_of_step": "at most 0.02"}


@dataclass(frozen=True)
class Size:
    """What is trained: backend: the one with fault sites; micro_batches: the configured one first."""

    model: TransformerConfig
    train: TrainConfig
    backend: str
    compiler: str
    micro_batches: tuple[int, ...]

    @classmethod
    def gpt2_124m(cls, device: str) -> Size:
        train: TrainConfig = construct("train", "gpt2", device=device)
        others = tuple(size for size in (64, 16, 8) if size != train.micro_batch)
        return cls(construct("model", "gpt2_124m"), train, "triton", "inductor", (train.micro_batch, *others))

    @classmethod
    def tiny(cls, device: str) -> Size:
        """The same pieces in seconds, without kernels that would have to be built."""
        model = construct(
            "model", "gpt2_124m", d_model=32, n_layers=2, n_heads=2, d_ff=64, context_length=16, vocab_size=64
        )
        train = construct("train", "gpt2", device=device, batch_size=8, micro_batch=4, held_out_sequences=4)
        return cls(model, train, "reference", "aot_eager", (4, 2))

    def training(self, backend: str, micro_batch: int, compile: bool, numerics: AttentionNumerics) -> Training:
        """Raises ValueError where the backend cannot run on the device."""
        config = replace(self.train, micro_batch=micro_batch, compile=compile)
        model = replace(self.model, backend=backend).on(torch.device(config.device))
        return Training(model, config, numerics, self.compiler)


SIZES = {"gpt2_124m": Size.gpt2_124m, "tiny": Size.tiny}


def paper_fault() -> AttentionNumerics:
    return construct("fault", "bf16_shift").sites(0, Sites(batch_size=1)).numerics


def _allocated_gib(device: torch.device) -> float:
    return torch.cuda.memory_allocated() / 2**30 if device.type == "cuda" else 0.0


def ready(make: Callable[[], Training]) -> tuple[Training, dict[str, Any]]:
    """A training that is warm; how long its first step took, compilation in it, and the most memory it had.

    The memory is without what others hold; None on a CPU.
    """
    device_of_others = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    others = _allocated_gib(device_of_others)
    training = make()
    first_s = seconds(partial(training.step, 0), training.device)
    on_gpu = training.device.type == "cuda"
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
    for index in range(1, WARM_UP_STEPS):
        training.step(index)
    peak = torch.cuda.max_memory_allocated() / 2**30 - others if on_gpu else None
    return training, {"first_step_s": first_s, "peak_gib": peak}


def rate(training: Training, step_s: float) -> dict[str, float]:
    """Tokens a second, and the model FLOP/s that they are, also as a share of what the GPU can do."""
    tokens_per_s = training.tokens_a_step / step_s
    flops = flops_a_token(training.model.config, sum(p.numel() for p in training.parameters))
    tflops = tokens_per_s * flops / 1e12
    return {
        "tokens_per_s": tokens_per_s,
        "step_ms": 1e3 * step_s,
        "model_tflops": tflops,
        "share_of_peak": tflops / PEAK_TFLOPS,
    }


def step_rates(size: Size, micro_batch: int, compile: bool) -> dict[str, Any]:
    """Training steps on PyTorch's attention, on ours, and on ours with the paper's fault, measured in turns.

    One that cannot run is there with its error; ours has to.
    """
    torch._dynamo.reset()  # a function is compiled for a few shapes only, then no more
    wanted = {
        size.backend: (size.backend, HEALTHY),
        "sdpa": ("sdpa", HEALTHY),
        f"{size.backend}, fault on": (size.backend, paper_fault()),
    }
    trainings: dict[str, Training] = {}
    found: dict[str, dict[str, Any]] = {}
    for name, (backend, numerics) in wanted.items():
        try:
            trainings[name], found[name] = ready(partial(size.training, backend, micro_batch, compile, numerics))
        except Exception as error:
            if name == size.backend:
                raise
            found[name] = {"error": first_line(error)}
    steps = {name: partial(training.step, WARM_UP_STEPS) for name, training in trainings.items()}
    taken = in_turns(steps, torch.device(size.train.device), TURNS)
    for name, training in trainings.items():
        found[name] |= rate(training, taken[name]) | {"time_over_healthy": taken[name] / taken[size.backend]}
    return found


def parts_of_a_step(size: Size) -> dict[str, float]:
    """Milliseconds of what a step is made of, and of the held-out label, which comes every ``every_steps``.

    ``watched micro-batch``: the last of a step, never compiled; ``tokens_per_s_if_all_were_compiled``: what that costs.
    """
    training, _ = ready(partial(size.training, size.backend, size.micro_batches[0], True, HEALTHY))
    config, model = training.config, training.model
    held_out = training.batch()[: config.held_out_sequences]

    @torch.no_grad()
    def label() -> None:
        for chunk in held_out.split(config.micro_batch):
            model.loss(chunk, HEALTHY)

    calls = {
        "step": partial(training.step, WARM_UP_STEPS),
        "unwatched micro-batch": training.unwatched_micro_batch,
        "watched micro-batch": training.micro_batch,
        "clip and AdamW": partial(training.update, WARM_UP_STEPS),
        "batch to the device": training.batch,
        "held-out label": label,
    }
    for call in calls.values():
        call()
    taken = in_turns(calls, training.device, TURNS)
    compiled_s = taken["step"] - taken["watched micro-batch"] + taken["unwatched micro-batch"]
    return {name: 1e3 * value for name, value in taken.items()} | {
        "micro_batches_a_step": config.batch_size // config.micro_batch,
        "label_every_steps": config.held_out_every_steps,
        "tokens_per_s_if_all_were_compiled": training.tokens_a_step / compiled_s,
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
    """Where the device's time goes, in a compiled micro-batch and in one that may be watched."""
    training, _ = ready(partial(size.training, size.backend, size.micro_batches[0], True, HEALTHY))
    return {
        "unwatched micro-batch": kernels_of(training.unwatched_micro_batch, training.device),
        "watched micro-batch": kernels_of(training.micro_batch, training.device),
        "clip and AdamW": kernels_of(partial(training.update, WARM_UP_STEPS), training.device),
    }


def costs_of_watching(size: Size, micro_batch: int) -> dict[str, Any]:
    training, _ = ready(partial(size.training, size.backend, micro_batch, True, HEALTHY))
    return monitor_costs(training, monitors_of(experts=False))


Piece = tuple[str, str, Callable[[], dict[str, Any]]]


def pieces(size: Size) -> Iterator[Piece]:
    """(part, name, work), what matters most first; a micro-batch is so many sequences."""
    first, *others = size.micro_batches

    def steps(micro_batch: int, compile: bool) -> Piece:
        how = "compiled" if compile else "eager"
        return "steps", f"micro-batch {micro_batch}, {how}", partial(step_rates, size, micro_batch, compile)

    yield steps(first, True)
    yield "monitors", f"micro-batch {first}", partial(costs_of_watching, size, first)
    yield "profile", "parts of a step", partial(parts_of_a_step, size)
    yield "profile", "kernels", partial(kernels, size)
    yield steps(first, False)
    for micro_batch in others:
        yield steps(micro_batch, True)
    yield "monitors", f"micro-batch {others[-1]}", partial(costs_of_watching, size, others[-1])
    for micro_batch in others:
        yield steps(micro_batch, False)


def measure(size: Size, record: Record) -> list[str]:
    """Every piece that there is time for; the names of those that failed."""
    late = []
    for part, name, work in pieces(size):
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        if not record.piece(part, name, work):
            late.append(f"{part}: {name}")
    return record.finish(late)


def _fail(message: str) -> NoReturn:
    print(f"error: {message}", file=sys.stderr)
    sys.exit(2)


def _found(device: str) -> dict[str, Any]:
    if device == "cuda":
        return machine()
    return {"device": "cpu", "python": platform.python_version(), "torch": torch.__version__}


def main(arguments: list[str]) -> None:
    given = {"device": "cuda", "size": "gpt2_124m", "out": str(ROOT / "results" / "gpu"), "limit_s": str(LIMIT_S)}
    for argument in arguments:
        key, _, value = argument.partition("=")
        if key not in given or not value:
            _fail(f"{argument!r} is not allowed: {', '.join(f'{name}=...' for name in given)}")
        given[key] = value
    device, name = given["device"], given["size"]
    if device not in ("cpu", "cuda"):
        _fail(f"device={device!r} is not allowed: cpu or cuda")
    if name not in SIZES:
        _fail(f"size={name!r} is not allowed: {' or '.join(SIZES)}")
    if device == "cuda" and not torch.cuda.is_available():
        _fail("device='cuda' needs a CUDA device that torch sees; device=cpu size=tiny rehearses")
    if device == "cpu" and name != "tiny":
        _fail(f"size={name!r} is not allowed with device='cpu', where it would take hours: size=tiny")
    try:
        limit_s = float(given["limit_s"])
    except ValueError:
        _fail(f"limit_s={given['limit_s']!r} is not allowed: seconds")
    torch.set_num_threads(1)
    found, size = _found(device), SIZES[name](device)
    path = Path(given["out"]) / file_name(found["device"], "-gpt2" if name == "gpt2_124m" else "-gpt2-tiny")
    found |= {"size": name, "batch_size": size.train.batch_size, "goals": GOALS}
    failed = measure(size, Record(path, found, ("steps", "monitors", "profile"), limit_s, LONGEST_PIECE_S))
    print(path)
    if failed:
        print(f"error: {len(failed)} failed: {'; '.join(failed)}", file=sys.stderr)
        sys.exit(1)


if __name__ == "__main__":
    main(sys.argv[1:])
