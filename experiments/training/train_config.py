"""How a model is trained: the keys of ``conf/train``."""

from __future__ import annotations

import math
from dataclasses import dataclass

from foreshock.models.precision import PRECISIONS

SCHEDULES = ("constant", "cosine")
MOST_STEPS = 10_000_000
MOST_THREADS = 1024


@dataclass(frozen=True)
class TrainConfig:
    """How a model is trained. Every field is a key of ``conf/train/*.yaml``.

    steps: optimizer updates; batch_size: sequences; schedule: ``constant`` or ``cosine`` (to
    ``final_lr_fraction`` of the peak at the last step), each after a linear warm-up;
    weight_decay: on matrices only; clip: global gradient norm, or None;
    held_out_*: the label's loss on a fixed held-out batch; stop_drawup_nats: end the run as
    ``diverged`` once that loss stands so far above its minimum, or None to train on;
    device: ``auto``, ``cpu`` or ``cuda``; threads: of torch in this process; stack: how many runs of an experiment
    train together along a model axis at most, 1 for each by itself; runs that cannot be stacked stay by themselves;
    precision: ``fp32``, or ``bf16`` or ``fp16`` for autocast over FP32 weights (``models.precision``), ``fp16`` with
    dynamic loss scaling (``experiments.training.loss_scaler``);
    micro_batch: sequences that go through the model at a time, or None for the whole batch; watched_sequences: so many
    of the last micro-batch are one of their own, which monitors look at, best a power of 2; None for all of it;
    compile: run all but the watched ones through ``torch.compile`` (``models.compiled``);
    piece_s: leave off after so many seconds, to be resumed by the same command, or None. It determines no result and
    is no part of a run's identity.
    """

    steps: int
    batch_size: int
    learning_rate: float
    warmup_steps: int
    schedule: str
    final_lr_fraction: float
    betas: tuple[float, float]
    weight_decay: float
    clip: float | None
    held_out_sequences: int
    held_out_every_steps: int
    stop_drawup_nats: float | None
    checkpoint_every_steps: int
    device: str
    threads: int
    stack: int
    precision: str
    micro_batch: int | None
    watched_sequences: int | None
    compile: bool
    piece_s: float | None = None

    def __post_init__(self) -> None:
        for field in (
            "steps",
            "batch_size",
            "held_out_sequences",
            "held_out_every_steps",
            "checkpoint_every_steps",
            "threads",
            "stack",
        ):
            if getattr(self, field) < 1:
                raise ValueError(f"train.{field}={getattr(self, field)} is not allowed: at least 1")
        for field, most in (("steps", MOST_STEPS), ("threads", MOST_THREADS)):
            if getattr(self, field) > most:
                raise ValueError(f"train.{field}={getattr(self, field)} is not allowed: at most {most}")
        if self.held_out_every_steps > self.steps:
            raise ValueError(
                f"train.held_out_every_steps={self.held_out_every_steps} is not allowed: at most train.steps="
                f"{self.steps}, or the loss that tells a divergence is never read"
            )
        for field in ("learning_rate", "clip", "stop_drawup_nats", "piece_s"):
            value = getattr(self, field)
            if value is not None and not 0 < value < math.inf:
                raise ValueError(f"train.{field}={value} is not allowed: above 0")
        for field in ("warmup_steps", "weight_decay"):
            if not 0 <= getattr(self, field) < math.inf:
                raise ValueError(f"train.{field}={getattr(self, field)} is not allowed: 0 or more")
        if not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"train.betas={list(self.betas)} is not allowed: each from 0 to below 1")
        if not 0 <= self.final_lr_fraction <= 1:
            raise ValueError(f"train.final_lr_fraction={self.final_lr_fraction} is not allowed: 0 to 1")
        if self.schedule not in SCHEDULES:
            raise ValueError(f"train.schedule={self.schedule!r} is not allowed: one of {', '.join(SCHEDULES)}")
        if self.schedule == "cosine" and self.warmup_steps >= self.steps:
            raise ValueError(
                f"train.warmup_steps={self.warmup_steps} leaves no step to decay: below train.steps={self.steps}"
            )
        if self.device not in ("auto", "cpu", "cuda"):
            raise ValueError(f"train.device={self.device!r} is not allowed: one of auto, cpu, cuda")
        if self.precision not in PRECISIONS:
            raise ValueError(f"train.precision={self.precision!r} is not allowed: one of {', '.join(PRECISIONS)}")
        if self.micro_batch is not None and not 1 <= self.micro_batch <= self.batch_size:
            raise ValueError(
                f"train.micro_batch={self.micro_batch} is not allowed: 1 to train.batch_size={self.batch_size}, or null"
            )
        at_a_time = self.micro_batch or self.batch_size
        if self.watched_sequences is not None and not 1 <= self.watched_sequences <= at_a_time:
            raise ValueError(
                f"train.watched_sequences={self.watched_sequences} is not allowed: 1 to the {at_a_time} sequences of "
                "a micro-batch, or null for all of them"
            )
        if self.compile and (self.watched_sequences or at_a_time) == self.batch_size:
            raise ValueError(
                f"train.compile=True would compile nothing: with train.micro_batch={self.micro_batch} and "
                f"train.watched_sequences={self.watched_sequences} monitors look at the whole batch, and what they "
                f"look at is not compiled; set train.watched_sequences to a few of its {self.batch_size} sequences"
            )
