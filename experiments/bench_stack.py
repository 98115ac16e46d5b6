"""What stacking saves: ``python -m experiments.bench_stack [device=cuda] [sizes=8,64]``.

Run-steps per second of N nano runs in a stack, over those of one run at a time; one attention fault and one learning
rate in each half of the stack. Forward, backward, clip and AdamW of the training loops, without monitors, label and
files. Both sides are measured in turns in one process; medians. Needs PyTorch alone, and so runs on a GPU machine
without our environment.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from statistics import median

import torch

from experiments.optimizer import TrainConfig, adamw, learning_rate, set_learning_rate
from experiments.stacked_optimizer import StackedAdamW
from faults.base import LearningRateScale
from models.numerics import HEALTHY, AttentionNumerics, SiteFault
from models.stacked import StackedNumerics, StackedTransformer
from models.transformer import Transformer, TransformerConfig

NANO = TransformerConfig(d_model=64, n_layers=2, n_heads=2, d_ff=256, context_length=64, vocab_size=256)
FAULTY = AttentionNumerics(tuple(SiteFault(site, "backward", "truncate", 5) for site in ("o", "do")))
BATCH_SIZE = 16
TURNS, STEPS = 5, 10
GOAL = "at least 50 on one H200"


def _config(device: str) -> TrainConfig:
    """conf/train/default.yaml, as far as a step needs it."""
    return TrainConfig(
        steps=1000,
        batch_size=BATCH_SIZE,
        learning_rate=1e-3,
        warmup_steps=200,
        schedule="constant",
        final_lr_fraction=0.1,
        betas=(0.9, 0.95),
        weight_decay=0.1,
        clip=1.0,
        held_out_sequences=64,
        held_out_every_steps=10,
        stop_drawup_nats=None,
        checkpoint_every_steps=500,
        device=device,
        threads=1,
        stack=1,
        precision="fp32",
        micro_batch=None,
        compile=False,
    )


def _models(count: int, device: str) -> list[Transformer]:
    return [Transformer(NANO).initialise(torch.Generator().manual_seed(seed)).to(device) for seed in range(count)]


def single(config: TrainConfig) -> Callable[[int], None]:
    (model,) = _models(1, config.device)
    optimizer, parameters = adamw(model, config), list(model.parameters())
    tokens_BT1 = torch.randint(NANO.vocab_size, (BATCH_SIZE, NANO.context_length + 1), device=config.device)

    def step(index: int) -> None:
        optimizer.zero_grad(set_to_none=True)
        model.loss(tokens_BT1, FAULTY).backward()
        torch.nn.utils.clip_grad_norm_(parameters, config.clip)
        set_learning_rate(optimizer, learning_rate(config, index), LearningRateScale())
        optimizer.step()

    return step


def stacked(config: TrainConfig, size: int) -> Callable[[int], None]:
    model = StackedTransformer(_models(size, config.device))
    optimizer = StackedAdamW(model, [config] * size)
    numerics = StackedNumerics((HEALTHY,) * (size // 2) + (FAULTY,) * (size - size // 2))
    scales = [LearningRateScale().times(10)] * (size // 2) + [LearningRateScale()] * (size - size // 2)
    tokens_NBT1 = torch.randint(NANO.vocab_size, (size, BATCH_SIZE, NANO.context_length + 1), device=config.device)

    def step(index: int) -> None:
        model.loss(tokens_NBT1, numerics).sum().backward()
        model.take_gradients()
        optimizer.clip()
        optimizer.step(index, scales)

    return step


def _seconds_a_step(step: Callable[[int], None], first: int, device: str) -> float:
    if device == "cuda":
        torch.cuda.synchronize()
    started = time.perf_counter()
    for index in range(first, first + STEPS):
        step(index)
    if device == "cuda":
        torch.cuda.synchronize()
    return (time.perf_counter() - started) / STEPS


def measure(device: str, size: int) -> dict[str, float]:
    """Milliseconds of a step of one run and of a stack, and how many times the run-steps a second the stack makes."""
    torch.set_num_threads(1)
    steps = {"single": single(_config(device)), "stack": stacked(_config(device), size)}
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for turn in range(TURNS + 1):  # the first is warm-up
        for name, step in steps.items():
            seconds[name].append(_seconds_a_step(step, turn * STEPS, device))
    one, all_of_them = (median(values[1:]) for values in seconds.values())
    return {"single_ms": 1e3 * one, "stack_ms": 1e3 * all_of_them, "run_steps_per_s_ratio": size * one / all_of_them}


def main(arguments: list[str]) -> None:
    given = dict(argument.split("=", 1) for argument in arguments if "=" in argument)
    device, sizes = given.pop("device", "cpu"), given.pop("sizes", "8")
    if given or any("=" not in argument for argument in arguments) or not sizes.replace(",", "").isdigit():
        sys.exit("usage: python -m experiments.bench_stack [device=cpu] [sizes=8,64]")
    print(f"torch {torch.__version__}, {device}; goal: {GOAL}")
    for size in map(int, sizes.split(",")):
        print(json.dumps({"size": size, **measure(device, size)}))


if __name__ == "__main__":
    main(sys.argv[1:])
