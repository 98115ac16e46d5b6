"""AdamW on FP32 master weights, and the learning-rate schedule as a function of the step."""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import nn

from foreshock.experiments.training.train_config import TrainConfig
from foreshock.faults.base import LearningRateScale
from foreshock.faults.schedule import Schedule
from foreshock.models.corruption import Log
from foreshock.models.transformer import parameter_group


def learning_rate(config: TrainConfig, step: int) -> float:
    """The scheduled learning rate of update ``step`` (from 0), before any fault."""
    if step < config.warmup_steps:
        return config.learning_rate * (step + 1) / config.warmup_steps
    if config.schedule == "constant":
        return config.learning_rate
    progress = (step - config.warmup_steps) / max(1, config.steps - 1 - config.warmup_steps)
    floor = config.final_lr_fraction
    return config.learning_rate * (floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * min(1.0, progress))))


def adamw(model: nn.Module, config: TrainConfig) -> torch.optim.AdamW:
    """AdamW over the FP32 parameters; matrices decay, norms do not. Each group's ``name`` is its parameter group."""
    groups: dict[tuple[str, bool], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        groups.setdefault((parameter_group(name), parameter.ndim >= 2), []).append(parameter)
    return torch.optim.AdamW(
        [
            {"params": parameters, "weight_decay": config.weight_decay if decays else 0.0, "name": name}
            for (name, decays), parameters in groups.items()
        ],
        lr=config.learning_rate,
        betas=config.betas,
        fused=True,
    )


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float, scale: LearningRateScale) -> None:
    """Give each parameter group the scheduled rate times its own factor."""
    for group in optimizer.param_groups:
        group["lr"] = rate * getattr(scale, group["name"])


def rates_of(optimizer: torch.optim.Optimizer, rate: float) -> dict[str, float]:
    """One scheduled rate for each parameter group that the model has, by name."""
    return {group["name"]: rate for group in optimizer.param_groups}


def rate_of(config: TrainConfig, step: int, schedule: Schedule, log: Log | None = None) -> float:
    """The learning rate of update ``step`` in a schedule that may be faulty."""
    healthy = learning_rate(config, step)
    if schedule == Schedule():
        return healthy
    own = replace(config, warmup_steps=schedule.warmup_of(config.warmup_steps))
    rate = learning_rate(own, step - schedule.first_step)
    if log is not None:
        before, after = torch.tensor([healthy, rate], dtype=torch.float64)
        log.add("schedule", schedule, "learning_rate", before, after)
    return rate
