"""Signals that exports hold, and the columns that trackers commonly give them."""

from __future__ import annotations

import re

from foreshock.monitors.signal import Signal

OPTIMIZATION, EVALUATION, EFFICIENCY = "optimization", "evaluation", "efficiency"

KNOWN = {
    signal.name: signal
    for signal in (
        Signal("train_loss_raw", "nats/token", "up", family=OPTIMIZATION),
        Signal("held_out_loss", "nats/token", "up", family=EVALUATION),
        Signal("grad_global_norm", "1", "up", family=OPTIMIZATION),
        Signal("learning_rate", "1", "both", family=OPTIMIZATION),
        Signal("loss_scale", "1", "down", family=OPTIMIZATION),
        Signal("tokens_per_sec", "tokens/s", "down", family=EFFICIENCY),
        Signal("mfu", "%", "down", family=EFFICIENCY),
    )
}
"""By name: what one's own columns may be called without a unit and a direction of harm."""

SPELLINGS = {
    "train_loss_raw": ("train/loss", "train_loss", "training_loss", "loss", "train/cross_entropy", "loss/train"),
    "held_out_loss": (
        "eval/loss", "eval_loss", "validation/loss", "validation_loss", "val/loss", "val_loss", "valid_loss",
        "loss/val", "held_out_loss",
    ),
    "grad_global_norm": (
        "train/grad_norm", "grad_norm", "gradient_norm", "global_grad_norm", "grad/norm", "optim/total_grad_norm",
        "grad_global_norm",
    ),
    "learning_rate": ("train/learning_rate", "learning_rate", "lr", "train/lr"),
    "loss_scale": ("loss_scale", "train/loss_scale", "grad_scale"),
    "tokens_per_sec": ("tokens_per_sec", "tokens_per_second", "throughput/tokens_per_sec"),
    "mfu": ("mfu", "train/mfu"),
}  # fmt: skip
"""By signal the columns that are taken for it, the likeliest first."""

KEYS = {
    "step": ("step", "global_step", "_step", "train/global_step", "iteration", "iter", "trainer/global_step"),
    "run": ("run_id", "run", "run_name", "run/name"),
    "seed": ("seed",),
    "cell": ("cell", "group"),
    "role": ("role",),
    "tokens": ("tokens", "tokens_seen", "train/tokens"),
}
"""By what a column says of a row, the columns that are taken for it; a global step before a tracker's own counter."""


def plain(column: str) -> str:
    """A column's name without what spellings differ in: capitals, spaces, dashes, dots."""
    return re.sub(r"[\s\-.]+", "_", column.strip().lower())


def spelled(columns: list[str], spellings: tuple[str, ...]) -> str | None:
    """The column that is spelled in the likeliest of these ways; None where none is."""
    by_plain: dict[str, str] = {}
    for column in columns:
        by_plain.setdefault(plain(column), column)
    return next((by_plain[spelling] for spelling in spellings if spelling in by_plain), None)
