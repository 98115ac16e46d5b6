"""What stacking saves: ``python -m experiments.bench_stack [device=cuda] [sizes=8,64]``.

Run-steps per second of N nano runs in a stack, over those of one run at a time; one attention fault and one learning
rate in each half of the stack. Forward, backward, clip and AdamW of the training loops, without label and files: once
by themselves, both sides in turns in one process, medians; and once watched by the monitors of ``conf/config.yaml`` at
their cadences, one side after the other, means over ``WATCHED_STEPS``.

``operations``: torch's operations a run-step that compute or copy, views not counted. Each is a launch on a GPU, of
which the host makes some 100,000 to 200,000 a second, and their number is the same on every device. The monitors' are
counted over ``COUNTED_STEPS``, which no reading of the curvature falls into.

Needs PyTorch, PyYAML, SciPy and PyArrow alone, and so runs on a GPU machine without our environment.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from statistics import median
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from foreshock.experiments.gpt2_training import RandomTokens
from foreshock.experiments.plain_config import construct, monitors_of
from foreshock.experiments.training.engine import Engine
from foreshock.experiments.training.recorder import Recorder
from foreshock.experiments.training.single_engine import SingleEngine
from foreshock.experiments.training.stacked_engine import StackedEngine
from foreshock.experiments.training.stacked_watch import StackedWatch
from foreshock.experiments.training.train_config import TrainConfig
from foreshock.experiments.usage import fail, misused, show_help
from foreshock.faults.base import LearningRateScale, Sites
from foreshock.models.numerics import AttentionNumerics, SiteFault
from foreshock.models.transformer import Transformer, TransformerConfig
from foreshock.monitors.base import Monitor
from foreshock.monitors.watch import Watch

NANO = TransformerConfig(d_model=64, n_layers=2, n_heads=2, d_ff=256, context_length=64, vocab_size=256)
BATCH_SIZE = 16
HEALTHY = Sites(batch_size=BATCH_SIZE)
FAULTY = replace(
    HEALTHY, numerics=AttentionNumerics(tuple(SiteFault(site, "backward", "truncate", 5) for site in ("o", "do")))
)
TURNS, STEPS = 5, 10
MOST_RUNS = 4096
WARM_UP_STEPS, WATCHED_STEPS, COUNTED_STEPS = 50, 500, 60
GOAL = "at least 50 on one H200"
Step = Callable[[int], None]


def _config(device: str) -> TrainConfig:
    return construct("train", "default", steps=1000, batch_size=BATCH_SIZE, device=device, threads=1)


def _models(count: int, device: str) -> list[Transformer]:
    return [Transformer(NANO).initialise(torch.Generator().manual_seed(seed)).to(device) for seed in range(count)]


def _tokens(model: Transformer) -> RandomTokens:
    return RandomTokens(BATCH_SIZE, NANO.context_length, model.tokens.num_embeddings)


def single(config: TrainConfig, monitors: Mapping[str, Monitor]) -> Step:
    """A step of one run, watched by these monitors."""
    (model,) = _models(1, config.device)
    engine = SingleEngine(model, config, _tokens(model), 0)
    return _watched_step(engine, Watch(engine.anatomy, engine.optimizer, monitors), [FAULTY])


def stacked(config: TrainConfig, size: int, monitors: Sequence[Mapping[str, Monitor]]) -> Step:
    """A step of a stack, each run of it watched by monitors of its own."""
    models = _models(size, config.device)
    engine = StackedEngine(models, [config] * size, _tokens(models[0]), range(size))
    faster = replace(HEALTHY, lr_scale=LearningRateScale().times(10))
    sites = [faster] * (size // 2) + [FAULTY] * (size - size // 2)
    return _watched_step(engine, StackedWatch(engine.anatomy, engine.optimizer, monitors), sites)


def _watched_step(engine: Engine, watch: Watch, sites: Sequence[Sites]) -> Step:
    recorder, runs = Recorder(), range(len(sites))
    watch.record(0)

    def step(index: int) -> None:
        due = watch.due(index + 1)
        view = engine.step(index, sites, watch.places(due))
        watch.record(index + 1)
        recorder.add(index + 1, engine.tokens, watch.observe(view, due, runs))

    return step


def _seconds_a_step(step: Step, first: int, device: str, steps: int = STEPS) -> float:
    if device == "cuda":
        torch.cuda.synchronize()
    started = time.perf_counter()
    for index in range(first, first + steps):
        step(index)
    if device == "cuda":
        torch.cuda.synchronize()
    return (time.perf_counter() - started) / steps


def measure(device: str, size: int) -> dict[str, float]:
    """Milliseconds of a step of one run and of a stack, and how many times the run-steps a second the stack makes."""
    torch.set_num_threads(1)
    steps = {"single": single(_config(device), {}), "stack": stacked(_config(device), size, [{}] * size)}
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for turn in range(TURNS + 1):  # the first is warm-up
        for name, step in steps.items():
            seconds[name].append(_seconds_a_step(step, turn * STEPS, device))
    one, all_of_them = (median(values[1:]) for values in seconds.values())
    return {"single_ms": 1e3 * one, "stack_ms": 1e3 * all_of_them, "run_steps_per_s_ratio": size * one / all_of_them}


def watched(device: str, size: int) -> dict[str, Step]:
    """The same two, watched by the default monitors."""
    monitors = [monitors_of(experts=False) for _ in range(size)]
    return {
        "single": single(_config(device), monitors_of(experts=False)),
        "stack": stacked(_config(device), size, monitors),
    }


def measure_watched(device: str, size: int) -> dict[str, float]:
    """As ``measure``, with the default monitors."""
    seconds = []
    for step in watched(device, size).values():
        _seconds_a_step(step, 0, device, WARM_UP_STEPS)
        seconds.append(_seconds_a_step(step, WARM_UP_STEPS, device, WATCHED_STEPS))
    one, all_of_them = seconds
    return {
        "watched_single_ms": 1e3 * one,
        "watched_stack_ms": 1e3 * all_of_them,
        "watched_run_steps_per_s_ratio": size * one / all_of_them,
    }


class _Operations(TorchDispatchMode):
    """Counts torch's operations but for those whose result is a view, or memory not yet written."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        self.count += not (function.is_view or function.name().startswith("aten::empty"))
        return function(*args, **(kwargs or {}))


def operations(step: Step, steps: int, first: int) -> float:
    """Mean number of operations of a step."""
    with _Operations() as operations:
        for index in range(first, first + steps):
            step(index)
    return operations.count / steps


def count(device: str, size: int) -> dict[str, float]:
    """Operations a run-step, of one run and of a stack, by themselves and watched."""
    plain = {"single": single(_config(device), {}), "stack": stacked(_config(device), size, [{}] * size)}
    found = {}
    for prefix, steps, counted in (("", plain, 1), ("watched_", watched(device, size), COUNTED_STEPS)):
        for name, step in steps.items():
            for index in range(WARM_UP_STEPS):
                step(index)
            of_a_step = operations(step, counted, WARM_UP_STEPS)
            found[f"{prefix}{name}_operations"] = of_a_step / (size if name == "stack" else 1)
    return found


def main(arguments: list[str]) -> None:
    show_help(arguments, __doc__)
    given = dict(argument.split("=", 1) for argument in arguments if "=" in argument)
    device, sizes = given.pop("device", "cpu"), given.pop("sizes", "8")
    if given or any("=" not in argument for argument in arguments):
        misused("python -m experiments.bench_stack [device=cpu] [sizes=8,64]")
    if device not in ("cpu", "cuda"):
        fail(f"device={device!r} is not allowed: cpu or cuda")
    if device == "cuda" and not torch.cuda.is_available():
        fail("device='cuda' is not allowed here: torch sees no CUDA device; device=cpu runs anywhere")
    if not all(size.isdigit() and 1 <= int(size) <= MOST_RUNS for size in sizes.split(",")):
        fail(f"sizes={sizes} is not allowed: numbers of runs from 1 to {MOST_RUNS}, such as 8,64")
    print(f"torch {torch.__version__}, {device}; goal: {GOAL}")
    for size in map(int, sizes.split(",")):
        print(json.dumps({"size": size, **measure(device, size), **count(device, size)}))
        print(json.dumps({"size": size, **measure_watched(device, size)}))


if __name__ == "__main__":
    main(sys.argv[1:])
